"""One message's run: the function is called, then its outcome goes to the outbox (worker).

The main thread takes one after the other; in thread mode (``threads``) several threads are in here at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqspipes_mp.brokers.base import Completion, Output, OutputsRefused
from sqspipes_mp.errors import HELD, LATE, BrokerError, TaskTimeout
from sqspipes_mp.ipc.leases import Cause, LeaseState
from sqspipes_mp.ipc.report.words import short_id
from sqspipes_mp.ipc.scoreboard import FAILED, OUTPUTS_DROPPED
from sqspipes_mp.messages.ids import mark, token
from sqspipes_mp.pipeline.current import set_current
from sqspipes_mp.pipeline.function import DROPPED, Product
from sqspipes_mp.pipeline.task import TaskCallback
from sqspipes_mp.worker.context import Delivery
from sqspipes_mp.worker.recycle import Lifetime
from sqspipes_mp.worker.run.function import Late
from sqspipes_mp.worker.run.leaving import give_back, hand_over
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.send.failures import decide_on, decide_on_late, log_retry
from sqspipes_mp.worker.send.outgoing import Done, Release
from sqspipes_mp.worker.send.policy import Decision

#: Seconds that a last attempt's dead letter may take before the run is ended by its error.
_LETTER_PATIENCE = 5.0


class _LeaseLost(Exception):
    """The message is somebody else's by now."""


class _Behind(Exception):
    """The message would overtake an earlier one of its group, whose outputs were refused."""


class _Faulted(Exception):
    """The broker refuses for good; this worker ends, and the keeper gives back what it has."""


class Runner:
    """Takes deliveries from ``ready``; what comes of them goes to ``outbox`` or, through ``results``, to the caller."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._station = station = parts.station
        self._caller = parts.caller
        self._ready = parts.ready
        self._outbox = parts.outbox
        self._products = parts.products
        self._results = parts.results
        #: Received, not run, and to go back once no worker of this engine would take it again.
        self.back: list[Delivery] = []
        self._charged: list[Delivery] = []
        self.lifetime = Lifetime(station)
        self._sends = bool(station.stage.outputs)
        self._counted = station.orders.plan.counted
        #: What the running messages have become so far, by their leases (map).
        self._children: dict[int, list[int]] = {}

    def run(self, serve: Callable[[], None]) -> None:
        """Run messages by the worker's main loop until told to stop, then release those not begun."""
        serve()
        if not self._station.full_stop.is_set():
            hand_over(self._parts)
        give_back(self._parts, self.back, self._charged)

    def serve(self) -> None:
        """Run one message after the other until told to stop."""
        station, ready = self._station, self._ready
        while not station.no_more.is_set():
            self._parts.run_callbacks()
            delivery = ready.take()
            if delivery is not None:
                if len(ready) < 10:
                    station.demand.set()
                self.serve_one(delivery)
                continue
            if ready.closed:
                break
            if not station.backlog:
                # With one, the next receive is a round trip away: what is here may wait for a full batch.
                self._outbox.hurry()
            ready.hungry()
            station.demand.set()
            ready.wait(station.no_more.is_set)

    def serve_one(self, delivery: Delivery, seat: int = 0) -> None:
        """Run one message, and tell how long it took until the next can begin."""
        self._caller.serve(self.process, delivery, seat)

    def process(self, delivery: Delivery, seat: int = 0) -> bool:
        """Run one message; ``seat``: its call's place among those that run at once. False: it goes back or is lost."""
        station = self._station
        if not station.holds(delivery):
            # It was somebody else's before it began here: nothing of it may happen twice because of us.
            self.lost(delivery)
            return False
        if not self._caller.pace(self._outbox.hurry):
            self.back.append(delivery)
            return False
        self.lifetime.begins(1)
        received = delivery.received
        station.region.start(delivery.lease, time.monotonic(), seat, received.body, received.attributes)
        self._caller.announce(delivery)
        try:
            self._finish(delivery, *self._run(delivery))
            passed = True
        except _LeaseLost:
            self.lost(delivery)
            passed = False
        except _Behind:
            self.hand_back([delivery])
            self._return_followers(delivery)
            passed = False
        except _Faulted as fault:
            # Whatever the queue service has against us, the message is not to blame.
            station.region.set_state(delivery.lease, LeaseState.DONE)
            station.fault(fault.__cause__ or fault)
            station.drain()
            passed = False
        except Late as late:
            self._late(delivery, str(late))
            passed = False
        except BaseException as error:
            # Whatever the user's code raises, SystemExit and KeyboardInterrupt included, is the message's failure.
            self.failed(delivery, error)
            passed = False
        finally:
            set_current(None)
        self.lifetime.ends()
        return passed

    def settle(self, delivery: Delivery, value: Any) -> bool:
        """Take what a batch gave for one of its messages; False: an exception, or nothing that can be sent."""
        try:
            if not isinstance(value, BaseException):
                self._children[delivery.lease] = []
                self._finish(delivery, *self._single(delivery, value))
                return True
            error = value
        except BaseException as refused:
            error = refused
        self.failed(delivery, error)
        return False

    def lost(self, delivery: Delivery) -> None:
        """Let go of a message that is somebody else's by now, and of what follows it in its group."""
        self._station.close_lease(delivery.lease)
        self._return_followers(delivery)

    def _return_followers(self, delivery: Delivery) -> None:
        followers = self._ready.take_group(delivery.received.group) if self._station.fifo else []
        if followers:
            self.hand_back(followers)

    def hand_back(self, deliveries: list[Delivery]) -> None:
        """Give back messages that are not to blame for anything, now or, if the run ends, with the rest."""
        for delivery in deliveries:
            self._station.region.set_state(delivery.lease, LeaseState.DONE)
        if self._station.full_stop.is_set():
            self.back += deliveries
        else:
            self._outbox.put(Release(tuple(deliveries), 0.0))

    def _run(self, delivery: Delivery) -> tuple[list[Product], Completion, int]:
        self._children[delivery.lease] = []
        value = self._caller.call(delivery.message.value)
        if not self._caller.is_generator:
            return self._single(delivery, value)
        try:
            return self._stream(delivery, value)
        finally:
            # What comes now, a slow caller or queue service, is no time of the function's.
            self._caller.ended()

    def _single(self, delivery: Delivery, value: Any) -> tuple[list[Product], Completion, int]:
        message, handle = delivery.message, delivery.received.handle
        product = self._products.make(value, message, message.parent, 0)
        outputs = () if product.output is None else (product.output,)
        return [product], Completion(handle, outputs), int(self._drops(product))

    def _stream(self, delivery: Delivery, generator: Any) -> tuple[list[Product], Completion, int]:
        """Send a generator's outputs as they come, in batches, the input staying undeleted until the last."""
        message, handle = delivery.message, delivery.received.handle
        products: list[Product] = []
        outputs: list[Output] = []
        index = dropped = 0
        began = time.monotonic_ns()
        while True:
            try:
                value = self._caller.next_of(generator, began)
            except StopIteration:
                self._caller.took(began)
                return products, Completion(handle, tuple(outputs)), dropped
            product = self._products.make(value, message, message.parent, index)
            index += 1
            if product.output is not None:
                outputs.append(product.output)
            dropped += self._drops(product)
            if product.callback is not None or (self._results is not None and product.value is not DROPPED):
                products.append(product)
            if len(outputs) >= self._station.connection.batch:
                began += self._caller.aside(delivery, partial(self._send_some, delivery, tuple(outputs)))
                outputs.clear()

    def _send_some(self, delivery: Delivery, outputs: tuple[Output, ...]) -> None:
        """Send what a generator has given lately, unless its message is somebody else's by now."""
        station = self._station
        if station.fifo:
            # These go past the carrier, and must not overtake what it still has of the group.
            self._outbox.wait_carried()
            if station.faulted.is_set():
                raise _Faulted
            if not station.holds(delivery):
                raise _LeaseLost
            if self._outbox.holds_back(delivery):
                raise _Behind
        still_ours = (lambda _: station.holds(delivery)) if station.fifo else None
        part = Completion(delivery.received.handle, outputs, last=False)
        try:
            lost = station.connection.complete([part], None, still_ours)
        except OutputsRefused as refused:
            raise refused.refused[0][1] from None
        except BrokerError as error:
            raise _Faulted from error
        if lost:
            raise _LeaseLost
        self._count(delivery, outputs)

    def _drops(self, product: Product) -> bool:
        return product.value is DROPPED or (self._sends and product.output is None)

    def _finish(self, delivery: Delivery, products: list[Product], completion: Completion, dropped: int) -> None:
        station = self._station
        # What makes an output of a value is the user's, too: json_default=, group=, priority=, pickling.
        station.check_process()
        blobs = []
        if self._results is not None:
            ident = self._result_id(delivery)
            kept = [product for product in products if product.value is not DROPPED]
            blobs = [(f"{ident}/{place}", self._results.pack(item.value)) for place, item in enumerate(kept)]
        if dropped:
            station.count(OUTPUTS_DROPPED, dropped)
        station.region.set_state(delivery.lease, LeaseState.DONE)
        # In this order: the supervisor marks the call, then looks whether it runs, and leaves what is done to us.
        if cause := station.region.late_for(delivery.lease):
            raise Late(HELD if cause is Cause.HOLD else LATE)
        callbacks: tuple[TaskCallback, ...] = tuple(item.callback for item in products if item.callback is not None)
        done = Done(completion, delivery, callbacks)
        self._count(delivery, completion.outputs)
        message = delivery.message
        if not blobs or self._results is None:
            if self._counted:
                done.step = (token(message.id), mark(message.parent), self._children.pop(delivery.lease))
            if self._results is None:
                self._outbox.put(done)
            else:
                self._results.follow(done)
        elif not self._results.send(
            done, blobs, {"token": token(message.id), "hop": mark(message.parent)} if self._counted else None
        ):
            self.back.append(delivery)

    def _result_id(self, delivery: Delivery) -> str:
        """Return what the results of a message are known by: the caller drops what it was handed before.

        Only where the queue drops a second message with the same hop is that hop one message's: on a standard SQS
        queue whoever copied it would have the results of other messages dropped. The ledger of ``map`` tells by hops,
        of messages that it knows.
        """
        received = delivery.received
        vouched = self._station.connection.keeps_charges or received.handle.queue.endswith(".fifo")
        return delivery.message.parent if vouched or self._counted else received.handle.message_id

    def _count(self, delivery: Delivery, outputs: Sequence[Output]) -> None:
        if self._counted:
            self._children.setdefault(delivery.lease, []).extend([mark(output.hop) for output in outputs])

    def _late(self, delivery: Delivery, why: str) -> None:
        """Charge a call that came back too late, as the keeper does with one that was killed for it."""
        station = self._station
        error = TaskTimeout(station.stage.name, os.getpid(), why)
        self._settle_failure(delivery, error, decide_on_late(delivery, station, held=why == HELD))

    def failed(self, delivery: Delivery, error: BaseException) -> None:
        decision, error = decide_on(error, delivery, self._station)
        self._settle_failure(delivery, error, decision)

    def _settle_failure(self, delivery: Delivery, error: BaseException, decision: Decision) -> None:
        station = self._station
        station.check_process()
        station.count(FAILED, 1)
        # Its call is over: should this worker die now, it is not to blame for that, but for this.
        station.region.set_state(delivery.lease, LeaseState.FAILED)
        if decision.action == "dead":
            self._outbox.bury(delivery, error)
            if decision.report and not station.full_stop.is_set():
                # With no grace the report is this worker's end, and the letter would not say why.
                self._outbox.wait_carried(_LETTER_PATIENCE)
        elif decision.report:
            self._charged.append(delivery)
        else:
            log_retry(error, delivery, station, decision.delay)
            self._outbox.put(Release((delivery,), decision.delay, charge=True))
        if decision.report:
            station.end_run(error, short_id(delivery.message.parent))
        # What came after it in its FIFO group must not overtake it.
        self._return_followers(delivery)
        if isinstance(error, MemoryError):
            self.lifetime.recycle("MemoryError")
