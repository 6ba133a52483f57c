"""One message's run: the function is called, then its outputs, or its failure, go to the outbox (worker).

The main thread runs one message after the other; in thread mode (``threads``) several threads are in here at once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqspipes_mp.brokers.base import Completion, End, Output, OutputsRefused
from sqspipes_mp.errors import HELD, LATE, BrokerError, OutputError
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import Cause, LeaseState
from sqspipes_mp.ipc.statistics import OUTPUTS_DROPPED, PAUSED
from sqspipes_mp.messages.envelope import Message
from sqspipes_mp.messages.ids import mark, token
from sqspipes_mp.pipeline.current import set_current
from sqspipes_mp.pipeline.outputs import DROPPED, Product, Unchanged
from sqspipes_mp.pipeline.task import Continue
from sqspipes_mp.pipeline.value_ends import KEEP, RESUME, end_of, is_awaited, is_kept
from sqspipes_mp.worker.context import Delivery
from sqspipes_mp.worker.recycle import Lifetime
from sqspipes_mp.worker.run.function import Late
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.send.continuing import continuation, first_hop
from sqspipes_mp.worker.send.outgoing import Done, Release

log = logging.getLogger("sqspipes_mp.worker")

#: Seconds that a last attempt's dead letter may take before the run is ended by its error.
_LETTER_PATIENCE = 5.0
#: Seconds for which results are hidden that the caller takes only after those of another message.
_LET_GO = 5.0
#: Weight of the newest message in the mean run time.
_NEWEST = 0.2


class _LeaseLost(Exception):
    """The message is another worker's."""


class _Behind(Exception):
    """The message would overtake an earlier one of its group, whose outputs were refused or whose lease was lost."""


class _Faulted(Exception):
    """The broker refuses for good; this worker ends, and the keeper releases its messages."""


#: Made by a call: the products with a result or a callback, the outputs to send, the number of drops, and whether the
#: last output continues the message.
Made = tuple[list[Product], Sequence[Output], int, bool]


class Runner:
    """Takes deliveries from ``ready``; their outputs go to the outbox and, through ``results``, to the caller."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._context = context = parts.context
        self._function = parts.function
        self._ready = parts.ready
        self._failures = parts.failures
        self._order = parts.order
        self._outbox = parts.outbox
        self._products = parts.products
        self._results = parts.results
        self._flush = partial(parts.outbox.wait_carried, _LETTER_PATIENCE)
        self.lifetime = Lifetime(context)
        self._sends = bool(context.stage.outputs)
        #: Whether nobody but a map that is resumed later would have this stage's results.
        self._unheard = self._results is None and not self._sends

    # -- the main loop ------------------------------------------------------------------------------------------

    def run(self, serve: Callable[[], None]) -> None:
        """Run messages by a main loop until told to stop, then release those not begun."""
        serve()
        if not self._context.full_stop.is_set():
            self._hand_over()
        self._give_back()

    def serve(self) -> None:
        """Run one message after the other until told to stop."""
        context, ready = self._context, self._ready
        while not context.no_more.is_set():
            if ready.callbacks:
                self._parts.run_callbacks()
            if (delivery := ready.take()) is not None:
                self.serve_one(delivery)
                continue
            if ready.closed:
                break
            if not context.backlog:
                # With one, the next receive is a round trip away: what is here may wait for a full batch.
                self._outbox.hurry()
            ready.hungry()
            ready.wait(context.no_more.is_set)

    def _hand_over(self) -> None:
        """Before a planned replacement, release messages not started, also those the receive in flight still brings."""
        ready, stopping = self._ready, self._context.full_stop.is_set
        closed = False
        while not (closed or stopping()):
            # Asked first: nothing is put after the closing.
            closed = ready.closed
            self._parts.run_callbacks()
            if held := ready.take_all():
                self._outbox.put(Release(tuple(held), 0.0))
            if not closed:
                ready.wait(stopping)

    def _give_back(self) -> None:
        """Release messages not started or not acknowledged, at a drain once no worker would receive them again."""
        context, results = self._context, self._results
        held: list[Delivery] = []
        let_go = False
        if results is not None:
            let_go = results.wait_taken()
            held = [done.delivery for done in results.take_unacknowledged() if done.delivery is not None]
        if context.full_stop.is_set():
            while not (context.release.is_set() or context.faulted.is_set()):
                context.release.wait(1.0)
                self._parts.run_callbacks()
            held = [*self._ready.take_all(), *held]
        if held:
            # After a let-go the successor is to receive others first: the caller waits for one of them.
            self._outbox.put(Release(tuple(held), _LET_GO if let_go and not context.full_stop.is_set() else 0.0))

    # -- one message --------------------------------------------------------------------------------------------

    def serve_one(self, delivery: Delivery, lane: int = 0) -> None:
        """Run one message, and count the time until the next can begin."""
        began = time.monotonic()
        self.process(delivery, lane)
        self.note_time(began)

    def note_time(self, began: float) -> None:
        """Count a message's, or a batch's, time towards the mean, its turn and its results' way included.

        A value that several threads overwrite is made good by the next.
        """
        seconds = max(time.monotonic() - began, self._function.interval)
        mean = self._context.mean
        self._context.mean = seconds if mean is None else mean + (seconds - mean) * _NEWEST

    def process(self, delivery: Delivery, lane: int = 0) -> bool:
        """Run one message; ``lane``: its call's number among those that run at once. False: it did not get through."""
        context, function = self._context, self._function
        if not context.holds(delivery):
            # Lost before it began here: nothing of it may happen twice because of us.
            self.lost(delivery)
            return False
        if function.paced and not function.pace(self._outbox.hurry):
            self.keep(delivery)
            return False
        received = delivery.received
        context.leases.start(delivery.lease, time.monotonic(), lane, received.body, received.attributes)
        # In this order: whoever pauses the stage sees a call that has begun before, or this sees the pause.
        if context.board.stage(context.stage.index, PAUSED):
            self._parts.pause.not_begun([delivery])
            return False
        if self.lifetime.counts:
            self.lifetime.begins(1)
        function.announce(delivery, lane)
        try:
            self._finish(delivery, *self._run(delivery))
            passed = True
        except BaseException as error:
            passed = False
            self._did_not_pass(delivery, error)
        finally:
            set_current(None)
            context.board.put(context.slot, function.starts[lane], 0)
        if self.lifetime.counts:
            self.lifetime.ends()
        return passed

    def _did_not_pass(self, delivery: Delivery, error: BaseException) -> None:
        context = self._context
        if isinstance(error, _LeaseLost):
            self.lost(delivery)
        elif isinstance(error, _Behind):
            self.hand_back([delivery])
            self.hand_back(self._order.take_waiting(delivery))
        elif isinstance(error, _Faulted):
            # The queue service refuses this worker; the message is not to blame.
            context.leases.set_state(delivery.lease, LeaseState.DONE)
            context.fault(error.__cause__ or error)
            context.drain()
        elif isinstance(error, Late):
            self._failures.late(delivery, str(error), self._outbox.put, self._flush, held=str(error) == HELD)
        else:
            # Each exception of the user's code, SystemExit and KeyboardInterrupt too, is the message's failure.
            self.failed(delivery, error)

    def _run(self, delivery: Delivery) -> Made:
        """Call the function. Returns what it made."""
        message = delivery.message
        value = self._function.call(message.value)
        if self._function.is_generator:
            try:
                return self._stream(delivery, value)
            finally:
                # A slow caller or queue service from here on is no time of the function's.
                self._function.ended()
        return self._single(delivery, value)

    def _single(self, delivery: Delivery, value: Any) -> Made:
        message, chain = delivery.message, delivery.chain
        if isinstance(value, Continue):
            yielded = 0 if chain is None else chain.yielded
            return [], (continuation(delivery, self._context, self._products, value.state, yielded),), 0, True
        if chain is None:
            product = self._products.make(value, message, message.parent, 0)
        else:
            product = self._products.make(value, message, chain.first, chain.yielded)
        if product.output is None:
            return [product], (), int(self._sends or product.value is DROPPED), False
        return [product], (product.output,), 0, False

    def _stream(self, delivery: Delivery, generator: Any) -> Made:
        """Send a generator's outputs as they come, in batches; the input stays until the last was accepted."""
        message, parent = delivery.message, first_hop(delivery)
        products: list[Product] = []
        outputs: list[Output] = []
        wanted = self._results is not None or (self._unheard and (is_kept(message.meta) or is_awaited(message.meta)))
        # Outputs are numbered over a whole chain: a call that runs again may continue at another place.
        index = 0 if delivery.chain is None else delivery.chain.yielded
        dropped = 0
        began = time.monotonic_ns()
        while True:
            try:
                value = self._function.next_of(generator, began)
            except StopIteration as end:
                self._function.took(began)
                if not isinstance(end.value, Continue):
                    return products, outputs, dropped, False
                going_on = continuation(delivery, self._context, self._products, end.value.state, index)
                if outputs:
                    # Accepted first: once the continuation is sent, this call is never made again.
                    self._function.aside(delivery, partial(self._send_some, delivery, tuple(outputs)))
                return products, (going_on,), dropped, True
            product = self._products.make(value, message, parent, index)
            index += 1
            if product.output is not None:
                outputs.append(product.output)
            dropped += product.value is DROPPED or (self._sends and product.output is None)
            if product.callback is not None or (wanted and product.value is not DROPPED):
                products.append(product)
            if len(outputs) >= self._context.connection.batch:
                began += self._function.aside(delivery, partial(self._send_some, delivery, tuple(outputs)))
                outputs.clear()

    def _send_some(self, delivery: Delivery, outputs: tuple[Output, ...]) -> None:
        """Send outputs of a generator that goes on, unless its message is lost."""
        context = self._context
        if context.fifo:
            # These do not go through the carrier, and must not overtake what it still has of the group.
            self._outbox.wait_carried()
            if context.faulted.is_set():
                raise _Faulted
            if not context.holds(delivery):
                raise _LeaseLost
            if self._order.blocks(delivery):
                raise _Behind
        still_ours = (lambda _: context.holds(delivery)) if context.fifo else None
        part = Completion(delivery.received.handle, outputs, last=False)
        try:
            lost = context.connection.complete([part], None, still_ours)
        except OutputsRefused as refused:
            raise refused.refused[0][1] from None
        except BrokerError as error:
            raise _Faulted from error
        if lost:
            raise _LeaseLost
        if context.counted:
            # Before the end of their input, which may be a dead letter's.
            blob = json.dumps([(token(delivery.message.id), None, _marks(outputs), 0)]).encode()
            context.say(Kind.STEP, {}, blob)

    def _finish(
        self, delivery: Delivery, products: list[Product], outputs: Sequence[Output], dropped: int, continues: bool
    ) -> None:
        """Mark a message done, and pass its outputs and results on. Raises ``Late``, and the errors of pickling."""
        context = self._context
        # json_default=, group=, priority= and pickling have run code of the user's since the call.
        context.check_process()
        blobs = []
        end = None
        if KEEP in delivery.message.meta or (self._unheard and RESUME in delivery.message.meta):
            end = self._end(delivery.message, products, outputs)
        if self._results is not None:
            ident = self._result_id(delivery)
            made = [product for product in products if product.value is not DROPPED]
            blobs = [(f"{ident}/{item.number}", self._results.pack(item.value)) for item in made]
        if dropped:
            context.count(OUTPUTS_DROPPED, dropped)
        if cause := context.leases.finish(delivery.lease):
            raise Late(HELD if cause is Cause.HOLD else LATE)
        received = delivery.received
        done = Done(Completion(received.handle, tuple(outputs), group=received.group, end=end), delivery)
        if continues:
            done.continues = True
        for product in products:
            if product.callback is not None:
                done.callbacks += (product.callback,)
        if context.counted:
            self._pass_counted(done, blobs)
        elif self._results is None:
            self._outbox.put(done)
        else:
            self._pass_results(done, blobs)

    def _end(self, message: Message, products: list[Product], outputs: Sequence[Output]) -> End | None:
        """Return the end of a message whose value a map has fed; None where other messages follow it.

        The products get the results as JSON has them, so that they are the same in each run. Raises ``OutputError``
        for a result that is no JSON, where the results are kept.
        """
        texts: list[str] = []
        for place, product in enumerate(() if self._sends else products):
            if product.value is not DROPPED:
                try:
                    texts.append(self._products.kept(product.value))
                except OutputError as error:
                    if is_kept(message.meta):
                        raise
                    log.warning(
                        "%s: a map that is resumed will not have the result of message %s: %s",
                        self._context.stage.name, message.id, error,
                    )  # fmt: skip
                    continue
                products[place] = product._replace(value=json.loads(texts[-1]))
        return None if outputs and not texts else end_of(message, tuple(texts))

    def _pass_counted(self, done: Done, blobs: list[tuple[str, bytes]]) -> None:
        """Pass on a message of a ``map``, whose caller is told of each step."""
        assert done.delivery is not None
        delivery, message = done.delivery, done.delivery.message
        children, number = _marks(done.completion.outputs), delivery.received.receives
        name, hop = token(message.id), mark(message.parent)
        if blobs:
            self._pass_results(done, blobs, {"token": name, "hop": hop, "children": children, "delivery": number})
            return
        done.step = (name, hop, children, number)
        if self._results is None:
            self._outbox.put(done)
        else:
            self._results.follow(done)

    def _pass_results(
        self, done: Done, blobs: list[tuple[str, bytes]], header: dict[str, object] | None = None
    ) -> None:
        """Hand results to the caller; the message is deleted once the caller has acknowledged them."""
        assert self._results is not None
        assert done.delivery is not None
        if not blobs:
            self._results.follow(done)
        elif not self._results.send(done, blobs, header):
            self.keep(done.delivery)

    def _result_id(self, delivery: Delivery) -> str:
        """Return the id by which the caller drops a result it was handed before.

        Only where the queue drops a second message with the same hop is that hop one message's: on a standard SQS
        queue the results of a copied message would be dropped for those of another. The ledger of ``map`` tells by
        hops of messages that it knows.
        """
        received = delivery.received
        vouched = self._context.connection.keeps_charges or received.handle.queue.endswith(".fifo")
        return first_hop(delivery) if vouched or self._context.counted else received.handle.message_id

    # -- messages that do not get through -----------------------------------------------------------------------

    def settle(self, delivery: Delivery, value: Any) -> bool:
        """Pass on what a batch gave for one of its messages; False: an exception, or a value that cannot be sent."""
        try:
            if not isinstance(value, BaseException):
                self._finish(delivery, *self._single(delivery, value))
                return True
            error = value
        except BaseException as refused:
            error = refused
        self.failed(delivery, error)
        return False

    def failed(self, delivery: Delivery, error: BaseException) -> None:
        """See to a message whose call raised."""
        if isinstance(error, Unchanged):
            if self._context.ending.asks():
                # It was asked to end, and had nothing to show yet.
                self.hand_back([delivery])
                return
            error = error.verdict()
        self._failures.failed(delivery, error, self._outbox.put, self._flush)
        self.lifetime.failed(error)

    def lost(self, delivery: Delivery) -> None:
        """Let go of a message that is another worker's, and of what follows it in its group."""
        self._failures.lost(delivery, self._outbox.put)

    def hand_back(self, deliveries: list[Delivery]) -> None:
        """Release messages that are not to blame for anything."""
        self._failures.hand_back(deliveries, self._outbox.put)

    def keep(self, *deliveries: Delivery) -> None:
        """Have messages that were not begun, or whose results nobody took, released at the worker's end or pause."""
        if self._context.full_stop.is_set():
            self._failures.left += [Release((delivery,), 0.0) for delivery in deliveries]
        else:
            self._parts.pause.not_begun(deliveries)


def _marks(outputs: Sequence[Output]) -> list[int]:
    return [mark(output.hop) for output in outputs]
