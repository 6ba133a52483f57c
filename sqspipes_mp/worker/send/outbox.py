"""The carrying threads of a worker: outputs are sent, then inputs deleted, in full batches (worker).

No input is deleted before its outputs were accepted: the broker's ``complete`` keeps that order, the library's promise.
Releases and dead letters go the same way; on FIFO the batches of a group are carried one after the other.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from sqspipes_mp.brokers.base import Completion, Handle, OutputsRefused
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import LeaseState, id_digest
from sqspipes_mp.ipc.statistics import CANCELLED, DONE, OUTPUTS_DROPPED, RETRIED, SENT, SlotField
from sqspipes_mp.pipeline.task import TaskCallback
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.fifo_order import GroupOrder
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.request_limit import Limit
from sqspipes_mp.worker.send.accepted_calls import Accepted
from sqspipes_mp.worker.send.backlog import Backlog, Batch
from sqspipes_mp.worker.send.failures import Failures
from sqspipes_mp.worker.send.outgoing import Done, Item, Letter, Release

log = logging.getLogger("sqspipes_mp.worker")

#: Items that may wait, in batches, before the main thread has to.
_BACKLOG_BATCHES = 8
#: Seconds after which a carrier without work ends, but for the last one.
_IDLE = 20.0


class Outbox:
    """A bounded queue of finished work and the threads that carry it away.

    A carrier starts where a full batch waits and all others are under way, and ends when it has long had nothing to do.
    """

    def __init__(
        self,
        context: WorkerContext,
        ready: Ready,
        order: GroupOrder,
        failures: Failures,
        accepted: Accepted | None = None,
    ) -> None:
        self._context = context
        self._ready = ready
        self._order = order
        self._failures = failures
        #: The accepted calls of a source; None for a stage with an input.
        self.accepted = accepted
        connection = context.connection
        self._batch = connection.batch
        self._most = _BACKLOG_BATCHES * self._batch
        self._linger = connection.linger
        self._backlog = Backlog(batch=self._batch, linger=self._linger, by_group=context.fifo)
        self._limit = Limit(connection.carriers)
        #: Number of the last item that is to wait for no company.
        self._hurried = 0
        self._closing = False
        self._lock = threading.RLock()
        #: Wakes carriers, and those that wait for room or for an item's end.
        self._work, self._changed = threading.Condition(self._lock), threading.Condition(self._lock)
        #: Carriers, and those of them that have nothing to do.
        self._carriers: list[threading.Thread] = []
        self._resting = 0
        with self._lock:
            self._start_carrier()

    # -- main thread, intake ------------------------------------------------------------------------------------

    def put(self, item: Item, *, waits: bool = True) -> None:
        """Queue an item; waits while too much is queued.

        ``waits=False``: for the thread that hears orders, which must hear a stop. Its items have leases, or a place
        among a source's calls, and so a bound.
        """
        backlog = self._backlog
        with self._lock:
            if waits and len(backlog.items) >= self._most:
                self._changed.wait_for(lambda: len(backlog.items) < self._most or self._context.faulted.is_set())
            # Not a method of the backlog's: each message passes here.
            backlog.last += 1
            backlog.items.append((backlog.last, item))
            count = len(backlog.items)
            # Waking a carrier costs as much as the rest of this method: only when there is something for it to do.
            if count == 1 or count >= self._batch or not isinstance(item, Done) or not self._linger:
                self._call_carrier()

    def hurry(self) -> None:
        """Have the queued items carried without waiting for a full batch: no other is coming just now."""
        if self._backlog.items and self._hurried != self._backlog.last:
            with self._lock:
                self._hurried = self._backlog.last
                self._call_carrier()

    def wait_carried(self, patience: float | None = None) -> None:
        """Wait until each item put before was carried away, or none is any more after a fault.

        Items that other threads put meanwhile are not waited for. ``patience``: seconds to wait at most.
        """
        self.hurry()
        with self._lock:
            last = self._backlog.last
            self._changed.wait_for(lambda: self._backlog.passed(last) or self._context.faulted.is_set(), patience)

    def close(self) -> None:
        """Carry everything away and end the carriers; then release what had to wait for the other workers' stop."""
        with self._lock:
            self._closing = True
            self._work.notify_all()
        while self._carriers:
            self._carriers[-1].join()
            self._carriers.pop()
        left, context = self._failures.left, self._context
        while left and not (context.release.wait(1.0) or context.faulted.is_set()):
            pass
        if not context.faulted.is_set():
            for item in left:
                self._release(item)

    # -- carriers -----------------------------------------------------------------------------------------------

    def _call_carrier(self) -> None:
        """Wake a carrier, or start one where a full batch waits for it."""
        if self._resting:
            self._work.notify()
        elif not self._closing and self._wants_another() and len(self._carriers) < self._allowed():
            self._start_carrier()

    def _wants_another(self) -> bool:
        """Whether a full batch waits; for a second carrier also an urgent item: the first one may be stuck."""
        if self._backlog.full or len(self._carriers) > 1 or not self._backlog.items:
            return self._backlog.full
        number, first = self._backlog.items[0]
        return number <= self._hurried or not isinstance(first, Done)

    def _start_carrier(self) -> None:
        carrier = threading.Thread(target=self._carry, name=f"outbox-{len(self._carriers)}", daemon=True)
        try:
            # It waits for the lock, which is held here.
            carrier.start()
        except (RuntimeError, MemoryError) as error:
            if not self._carriers:
                raise
            log.debug("%s: one carrier less: %s", self._context.stage.name, error)
            return
        self._carriers.append(carrier)

    def _allowed(self) -> int:
        return self._limit.allowed(self._backlog.under_way, self._context.connection.throttles, time.monotonic())

    def _carry(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                if isinstance(batch.items[0], Done):
                    self._complete([item for item in batch.items if isinstance(item, Done)])
                else:
                    self._carry_one(batch.items[0])
                # The intake may be waiting for room for new leases.
                self._context.demand.set()
                with self._lock:
                    self._backlog.carried(batch)
                    self._changed.notify_all()
        except BaseException as error:
            # After a silent end the main thread would wait for room for ever.
            self._context.fault(error)
            with self._lock:
                self._changed.notify_all()
                self._work.notify_all()

    def _next_batch(self) -> Batch | None:
        """Wait for a batch; None: this carrier ends."""
        backlog = self._backlog
        with self._lock:
            while not self._context.faulted.is_set():
                now = time.monotonic()
                may = backlog.under_way < self._allowed()
                if may and (batch := backlog.pick(now, math.inf if self._closing else self._hurried)):
                    if backlog.items:
                        self._call_carrier()
                    self._changed.notify_all()
                    return batch
                if not backlog.items and self._closing:
                    self._work.notify_all()
                    return None
                wait = min(_IDLE, backlog.patience(now)) if may else 1.0
                if backlog.items and wait == _IDLE:
                    # They wait for their groups; others that come meanwhile wake nobody.
                    wait = self._linger
                self._resting += 1
                woken = self._work.wait(wait)
                self._resting -= 1
                if not (woken or backlog.items or self._closing) and len(self._carriers) > 1:
                    self._carriers.remove(threading.current_thread())
                    return None
            return None

    def _complete(self, batch: list[Done]) -> None:
        context = self._context
        if context.fifo:
            batch = [item for item in batch if self._may_complete(item)]
        if context.counted and (steps := [item.step for item in batch if item.step is not None]):
            context.say(Kind.STEP, {}, json.dumps(steps).encode())
        by_completion = {id(item.completion): item for item in batch}

        def sent(completion: Completion) -> None:
            delivery = by_completion[id(completion)].delivery
            if delivery is not None:
                context.leases.set_state(delivery.lease, LeaseState.SENT)

        stale: set[Handle] = set()
        try:
            if batch:
                still_ours = self._order.check(batch)
                stale.update(context.connection.complete([item.completion for item in batch], sent, still_ours))
        except OutputsRefused as some:
            stale.update(some.stale)
            batch = self._refused(batch, some)
        self._close_done(batch, stale)

    def _close_done(self, batch: list[Done], stale: set[Handle]) -> None:
        """Free the leases of completed messages, count them, and have their callbacks run."""
        context = self._context
        done = sent = dropped = 0
        for item in batch:
            if (delivery := item.delivery) is not None:
                if item.completion.input in stale:
                    self._failures.lost_in_outbox(delivery, self._carry_one)
                    continue
                context.close_lease(delivery.lease)
                if delivery.attempt > 1:
                    context.forget_charges(delivery)
            elif self.accepted is not None:
                if item.call is not None:
                    self.accepted.add(item.call)
                if item.end is not None:
                    self.accepted.end(item.end)
            if item.anew:
                continue
            done += item.end is None and not item.dropped
            sent += len(item.completion.outputs)
            dropped += item.dropped
            for callback in item.callbacks:
                self._ready.put_callback(partial(_run_callback, callback, item))
        if dropped:
            context.count(OUTPUTS_DROPPED, dropped)
        context.note_contact()
        context.count(DONE, done)
        context.count(SENT, sent)

    def _may_complete(self, item: Done) -> bool:
        """On FIFO let go of a message whose lease is lost, or that would overtake such a one of its group."""
        delivery = item.delivery
        if delivery is None or (self._context.holds(delivery) and not self._order.blocks(delivery)):
            return True
        self._failures.lost_in_outbox(delivery, self._carry_one)
        return False

    def _refused(self, batch: Sequence[Done], some: OutputsRefused) -> list[Done]:
        """See to the calls with a refused output, and release those held up by them; return the completed ones."""
        reasons = {id(completion): error for completion, error in some.refused}
        unsent = {id(completion) for completion in some.unsent}
        completed = []
        #: Calls of a source behind the refused one of their group; they have no message that could come again.
        again: list[Done] = []
        for item in batch:
            error = reasons.get(id(item.completion))
            if error is not None:
                self._failures.refused(item, error, self._carry_one)
                if item.delivery is None:
                    # A source's call: left out, it is over.
                    item.completion = replace(item.completion, outputs=())
                    completed.append(item)
            elif id(item.completion) not in unsent:
                completed.append(item)
            elif item.delivery is not None:
                self._failures.hand_back([item.delivery], self._carry_one)
            else:
                again.append(item)
        if again:
            self._complete(again)
        return completed

    def _carry_one(self, item: Item) -> None:
        if isinstance(item, Release):
            self._release(item)
        elif isinstance(item, Done):
            self._complete([item])
        else:
            self._dead_letter(item)

    def _release(self, item: Release) -> None:
        context = self._context
        if item.charge:
            for delivery in item.deliveries:
                self._mark(delivery, LeaseState.CHARGING)
                context.charge(delivery)
                context.connection.extend([delivery.received.handle], item.seconds, attempts=delivery.attempt)
                self._closed((delivery,), RETRIED)
            return
        for delivery in item.deliveries:
            self._mark(delivery, LeaseState.CLOSING)
        context.connection.extend([delivery.received.handle for delivery in item.deliveries], item.seconds)
        self._closed(item.deliveries, None)

    def _dead_letter(self, item: Letter) -> None:
        context = self._context
        if not context.connection.keeps_charges:
            # (In SQLite it is one transaction that looks at the receipt: there the keeper may extend the lease.)
            if context.leases.state(item.delivery.lease) is LeaseState.FAILED:
                # Charged here and not by the keeper, which would write a second letter.
                context.charge(item.delivery)
            self._mark(item.delivery, LeaseState.CLOSING)
        stale: list[Handle] = context.connection.dead_letter([item.letter])
        self._closed((item.delivery,), None if stale else item.counter)
        context.forget_charges(item.delivery)
        if item.counter == CANCELLED:
            context.board.forget_cancelled(id_digest(item.delivery.received.handle.message_id))

    def _mark(self, delivery: Delivery, state: LeaseState) -> None:
        self._context.leases.set_state(delivery.lease, state)

    def _closed(self, deliveries: Sequence[Delivery], counter: SlotField | None) -> None:
        for delivery in deliveries:
            self._context.close_lease(delivery.lease)
        if counter is not None:
            self._context.count(counter, len(deliveries))


def _run_callback(callback: TaskCallback, item: Done) -> None:
    """Run one ``TaskCallback`` (in the main thread); its failure is logged and costs nothing else."""
    try:
        callback.callback(*callback.callback_args)
    except BaseException:
        # The message is done; running it again for its callback would be worse than this line.
        name = item.delivery.received.handle.message_id if item.delivery else "of a source"
        log.exception("the callback of message %s failed; the message itself is done", name)
