"""The carrying threads of a worker: outputs are sent, then inputs deleted, in full batches (worker).

Nothing is deleted before its outputs were accepted; that order is the library's promise and is kept by the broker's
``complete``. Giving back and dead-lettering go the same way, so that one thread's order is everybody's order on FIFO.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from sqspipes_mp.brokers.base import Completion, Handle, OutputsRefused
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import LeaseState
from sqspipes_mp.ipc.scoreboard import ACCEPTED, DEAD, DONE, FINISHED, OUTPUTS_DROPPED, RETRIED, SENT, SlotField
from sqspipes_mp.pipeline.task import TaskCallback
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.send.failures import letter_of, tell_buried
from sqspipes_mp.worker.send.lost import StillOurs
from sqspipes_mp.worker.send.outgoing import Bury, Done, Release
from sqspipes_mp.worker.send.refusals import Refusals

log = logging.getLogger("sqspipes_mp.worker")

#: Items that may wait, in batches, before the main thread has to.
_BACKLOG_BATCHES = 8


class Outbox:
    """A bounded queue of finished work and the threads that carry it away."""

    def __init__(self, station: WorkerContext, ready: Ready) -> None:
        self._station = station
        self._ready = ready
        self._items: deque[Done | Release | Bury] = deque()
        self._changed = threading.Condition()
        self._hurry = False
        self._closing = False
        #: Items put so far, and of these, carried.
        self._put = self._carried = 0
        self._counting = threading.Lock()
        self._batch = station.connection.batch
        self._most = _BACKLOG_BATCHES * self._batch
        # Within a FIFO group, and for a source's count of accepted calls, order matters: one carrier.
        ordered = station.fifo or station.stage.is_source
        self._refusals = Refusals(station, ready)
        self._linger = 0.0 if station.fifo else station.connection.linger
        count = 1 if ordered else station.connection.carriers
        self._carriers = [threading.Thread(target=self._carry, name=f"outbox-{n}", daemon=True) for n in range(count)]
        for carrier in self._carriers:
            carrier.start()

    # -- main thread, intake ------------------------------------------------------------------------------------

    def put(self, item: Done | Release | Bury) -> None:
        """Queue an item; waits while too much is queued."""
        with self._changed:
            if len(self._items) >= self._most:
                self._changed.wait_for(lambda: len(self._items) < self._most or self._station.faulted.is_set())
            self._items.append(item)
            self._put += 1
            count = len(self._items)
            # Waking a carrier costs as much as the rest of this method: only when there is something for it to do.
            if count == 1 or count >= self._batch or not isinstance(item, Done) or not self._linger:
                self._changed.notify_all()

    def bury(self, delivery: Delivery, error: BaseException) -> None:
        """Dead-letter a message with ``error`` as its reason."""
        letter = letter_of(error, delivery, self._station)
        tell_buried(error, delivery, self._station)
        self.put(Bury(delivery, letter))

    def hurry(self) -> None:
        """Carry what is here without waiting for a full batch: nothing else is coming just now."""
        if self._items and not self._hurry:
            with self._changed:
                self._hurry = True
                self._changed.notify_all()

    def wait_carried(self, patience: float | None = None) -> None:
        """Wait until everything put so far was carried away (FIFO: by one carrier), or nothing is any more.

        ``patience``: seconds to wait at most.

        What other threads put meanwhile is not waited for, or it might never end.
        """
        self.hurry()
        with self._changed:
            last = self._put
            self._changed.wait_for(lambda: self._carried >= last or self._station.faulted.is_set(), patience)

    def holds_back(self, delivery: Delivery) -> bool:
        """Tell whether a message that runs would overtake one of its group that was refused or lost meanwhile."""
        return self._refusals.holds_back(delivery)

    def close(self) -> None:
        """Carry everything away and end the carriers."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for carrier in self._carriers:
            carrier.join()
        for item in self._refusals.wait_left():
            self._give_back(item)

    # -- carriers -----------------------------------------------------------------------------------------------

    def _carry(self) -> None:
        try:
            while batch := self._next_batch():
                if isinstance(batch[0], Done):
                    self._complete([item for item in batch if isinstance(item, Done)])
                else:
                    self._carry_one(batch[0])
                # There is room for new leases, which the intake may be waiting for.
                self._station.demand.set()
                with self._changed:
                    self._carried += len(batch)
                    self._changed.notify_all()
        except BaseException as error:
            # A carrier that ends silently would leave the main thread waiting for room for ever.
            self._station.fault(error)
            with self._changed:
                self._changed.notify_all()

    def _next_batch(self) -> list[Done] | list[Release] | list[Bury]:
        with self._changed:
            while not self._station.faulted.is_set():
                if not self._items:
                    self._hurry = False
                    if self._closing:
                        return []
                    self._changed.wait()
                    continue
                wait = self._patience(self._items[0])
                if wait <= 0:
                    taken = self._take()
                    self._changed.notify_all()
                    return taken
                self._changed.wait(wait)
            return []

    def _patience(self, first: Done | Release | Bury) -> float:
        """Return how long the first item may still wait for company."""
        if not isinstance(first, Done) or self._hurry or self._closing or len(self._items) >= self._batch:
            return 0.0
        return first.at + self._linger - time.monotonic()

    def _take(self) -> list[Done] | list[Release] | list[Bury]:
        item = self._items.popleft()
        if isinstance(item, Release):
            return [item]
        if isinstance(item, Bury):
            return [item]
        batch = [item]
        while self._items and len(batch) < self._batch:
            following = self._items[0]
            if not isinstance(following, Done):
                break
            self._items.popleft()
            batch.append(following)
        return batch

    def _complete(self, batch: list[Done]) -> None:
        station = self._station
        if station.fifo:
            batch = [item for item in batch if self._may_complete(item)]
        if steps := [item.step for item in batch if item.step is not None]:
            station.say(Kind.STEP, {}, json.dumps(steps).encode())
        by_completion = {id(item.completion): item for item in batch}

        def sent(completion: Completion) -> None:
            delivery = by_completion[id(completion)].delivery
            if delivery is not None:
                station.region.set_state(delivery.lease, LeaseState.SENT)

        stale: set[Handle] = set()
        try:
            if batch:
                still_ours = StillOurs(station, batch) if station.fifo else None
                stale.update(station.connection.complete([item.completion for item in batch], sent, still_ours))
        except OutputsRefused as some:
            stale.update(some.stale)
            batch, others = self._refusals.take(batch, some)
            for other in others:
                self._carry_one(other)
        carried: list[Done] = []
        for item in batch:
            if item.delivery is not None:
                if item.completion.input in stale:
                    self._let_go(item.delivery)
                    continue
                station.close_lease(item.delivery.lease)
                station.forget_charges(item.delivery)
            carried.append(item)
            for callback in item.callbacks:
                self._ready.put_callback(partial(_run_callback, callback, item))
        if dropped := sum(item.dropped for item in carried):
            station.count(OUTPUTS_DROPPED, dropped)
        with self._counting:
            board, slot = station.board, station.slot
            board.add(slot, DONE, sum(not (item.ended or item.dropped) for item in carried))
            board.add(slot, SENT, sum(len(item.completion.outputs) for item in carried))
            board.add(slot, ACCEPTED, sum(item.calls for item in carried))
            if any(item.ended for item in carried):
                board.put(slot, FINISHED, 1)

    def _may_complete(self, item: Done) -> bool:
        """On FIFO let go of a message that may be somebody else's by now, or would overtake such a one of its group."""
        delivery = item.delivery
        if delivery is None or (self._station.holds(delivery) and not self._refusals.holds_back(delivery)):
            return True
        self._let_go(delivery)
        return False

    def _let_go(self, delivery: Delivery) -> None:
        """Give up a lost message, and give back what this worker has of its FIFO group behind it."""
        if self._refusals.holds_back(delivery):
            # It is one of these: perhaps still ours, and then to be had by others at once.
            backs = self._refusals.go_back(delivery)
        else:
            log.warning(
                "%s: the lease of message %s was lost while it ran; whoever has it now completes it",
                self._station.stage.name,
                delivery.received.handle.message_id,
            )
            self._station.close_lease(delivery.lease)
            backs = self._refusals.followers(delivery)
        for back in backs:
            self._give_back(back)

    def _carry_one(self, item: Release | Bury) -> None:
        if isinstance(item, Release):
            self._give_back(item)
        else:
            self._bury_now(item)

    def _give_back(self, item: Release) -> None:
        station = self._station
        if item.charge:
            for delivery in item.deliveries:
                self._close((delivery,), LeaseState.CHARGING)
                station.charge(delivery)
                station.connection.extend([delivery.received.handle], item.seconds, attempts=delivery.attempt)
                self._closed((delivery,), RETRIED)
            return
        self._close(item.deliveries, LeaseState.CLOSING)
        station.connection.extend([delivery.received.handle for delivery in item.deliveries], item.seconds)
        self._closed(item.deliveries, None)

    def _bury_now(self, item: Bury) -> None:
        if not self._station.connection.keeps_charges:
            # Where it is one transaction, which looks at the receipt, the keeper does no harm, and keeps it ours.
            self._close((item.delivery,), LeaseState.CHARGING)
        stale: list[Handle] = self._station.connection.dead_letter([item.letter])
        self._station.forget_charges(item.delivery)
        self._closed((item.delivery,), None if stale else DEAD)

    def _close(self, deliveries: Sequence[Delivery], state: LeaseState) -> None:
        for delivery in deliveries:
            self._station.region.set_state(delivery.lease, state)

    def _closed(self, deliveries: Sequence[Delivery], counter: SlotField | None) -> None:
        for delivery in deliveries:
            self._station.close_lease(delivery.lease)
        if counter is not None:
            with self._counting:
                self._station.board.add(self._station.slot, counter, len(deliveries))


def _run_callback(callback: TaskCallback, item: Done) -> None:
    """Run one ``TaskCallback`` (in the main thread); its failure is logged and costs nothing else."""
    try:
        callback.callback(*callback.callback_args)
    except BaseException:
        # The message is done; re-running it for its callback would be worse than saying so.
        name = item.delivery.received.handle.message_id if item.delivery else "of a source"
        log.exception("the callback of message %s failed; the message itself is done", name)
