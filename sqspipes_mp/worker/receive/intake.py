"""The receiving thread of a worker: keeps the main thread fed, and holds no more than it must (worker)."""

from __future__ import annotations

import logging
import random
import threading
import time

from sqspipes_mp.brokers.base import Completion, Received
from sqspipes_mp.host.clock import lease_now, slept
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.scoreboard import NOTHING_TOLD, ONE_GROUP_TOLD, RECEIVED
from sqspipes_mp.messages.attempts import ONE_GROUP, ONE_GROUP_BACKOFF, is_last, pause
from sqspipes_mp.messages.envelope import Message, decode
from sqspipes_mp.pipeline.foreign import reader
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.receive.prefetch import LONG, ask
from sqspipes_mp.worker.recycle import Lifetime
from sqspipes_mp.worker.send.outbox import Outbox
from sqspipes_mp.worker.send.outgoing import Done, Release

log = logging.getLogger("sqspipes_mp.worker")

#: Longest wait of one receive, seconds (Amazon SQS API Reference, ReceiveMessage: WaitTimeSeconds).
LONG_POLL = 20.0
#: A receive that brings so many leaves more behind.
_FULL = 10
#: Longest rest while nothing is wanted, seconds: a wake-up that comes between a look and the rest is not lost for long.
_LONGEST_REST = 1.0


class _NoMemory(Exception):
    """There was a MemoryError (its cause) when ``delivery`` was decoded, whose message is a shell."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery


class Intake(threading.Thread):
    """Receives until told to stop, then says STOPPED."""

    def __init__(self, station: WorkerContext, ready: Ready, outbox: Outbox, lifetime: Lifetime) -> None:
        super().__init__(name="intake", daemon=True)
        self._station = station
        self._ready = ready
        self._outbox = outbox
        self._lifetime = lifetime
        self._queues = station.orders.plan.inputs[station.stage.index]
        self._lease = station.orders.plan.first_lease
        self._stale_after = station.settings.visibility / 2
        self._round_trip = 0.02
        task = station.stage.task
        #: What reads the bodies of others; None in a queue of the pipeline's own.
        self._read = reader(task.decode) if isinstance(task.input, str) else None
        #: Messages that one mean run time takes care of.
        self._at_once = task.batch or task.threads

    def run(self) -> None:
        station = self._station
        try:
            while not station.no_more.is_set():
                count = self._ask()
                if count:
                    self._receive(count)
                else:
                    station.demand.wait(min(_LONGEST_REST, self._stale_after / 4))
                    station.demand.clear()
                self._return_stale()
        except BaseException as error:
            # Whatever it is, a worker that receives no more must not look alive.
            station.fault(error)
        finally:
            self._ready.close()
            station.say(Kind.STOPPED)

    def _ask(self) -> int:
        station = self._station
        idle = self._ready.idle
        if not idle and time.monotonic() - self._ready.taken_at > self._stale_after:
            # What would wait behind what runs (or waits for its turn, or for the caller to take its result) would only
            # go back again and again, each time one delivery nearer to the dead-letter queue.
            return 0
        waiting = self._ready.waiting
        room = station.room if station.left is None else max(0, min(station.room, station.left - waiting))
        return ask(
            waiting=waiting,
            idle=idle,
            mean=station.mean,
            round_trip=self._round_trip,
            limit=self._limit(),
            room=room,
            batch=station.connection.fetch,
            ahead=station.connection.ahead,
            at_once=self._at_once,
        )

    def _limit(self) -> int | None:
        """Return how many messages may wait beside those running; None = by time."""
        task, mean = self._station.stage.task, self._station.mean
        if task.prefetch is not None or task.batch is None or mean is None or mean >= LONG:
            return task.prefetch
        # The next batch is gathered while this one runs.
        return task.batch

    def _receive(self, count: int) -> None:
        station = self._station
        asked_at, leased_at = time.monotonic(), lease_now()
        batch = self._fetch(count)
        station.backlog = len(batch) >= _FULL
        if not batch:
            return
        if station.fifo and any(received.group == ONE_GROUP for received in batch):
            self._mind_one_group()
        if len(batch) == count:
            self._round_trip += (time.monotonic() - asked_at - self._round_trip) / 8
        leased_at = self._leased_at(batch, leased_at, asked_at)
        if lease_now() > leased_at + self._lease * 3 / 4:
            # The machine slept, or C code kept the GIL, with the messages on their way: nobody extends them yet, so
            # they are about to be somebody else's, or are by now.
            log.info("%s: %d messages came too late to be begun here", station.stage.name, len(batch))
            return
        station.board.add(station.slot, RECEIVED, len(batch))
        deliveries: list[Delivery] = []
        unopened = iter(batch)
        try:
            for received in unopened:
                if delivery := self._open(received, leased_at):
                    deliveries.append(delivery)  # noqa: PERF401  (kept, whatever the next one raises)
        except _NoMemory as short:
            others = [self._undecoded(received, leased_at) for received in unopened]
            self._run_out(deliveries, short.delivery, others, short.__cause__)
        else:
            self._ready.put(deliveries)

    def _leased_at(self, batch: list[Received], sent_at: float, sent_at_monotonic: float) -> float:
        """Return when the leases of a batch began, at the earliest; the request was sent at these times."""
        if (known := batch[0].leased_at) is not None:
            return known
        # A long poll may have waited for them: they began some time between the request and its end at the latest,
        # however long this process came to nothing after that.
        awake = lease_now() - slept(sent_at, sent_at_monotonic)
        return min(max(sent_at, awake - self._lease / 4), sent_at + LONG_POLL)

    def _fetch(self, count: int) -> list[Received]:
        """Receive; where there is no memory for the messages, have this worker replaced, and hold none."""
        station = self._station
        try:
            return station.connection.receive(
                self._queues, count, LONG_POLL, self._lease, attributes=self._read is not None
            )
        except MemoryError:
            log.warning(
                "%s: there was no memory to receive messages; this worker is replaced, and what was on its way is "
                "visible again within %g s",
                station.stage.name, self._lease,
            )  # fmt: skip
            self._lifetime.recycle("MemoryError", starved=True)
            return []

    def _run_out(
        self, before: list[Delivery], one: Delivery, after: list[Delivery], error: BaseException | None
    ) -> None:
        """Have this worker replaced, and leave to others what it received along with ``one``, which it cannot decode.

        Other messages may be what fills the memory, so nothing is charged; what limits the tries of ``one`` is the
        number of deliveries, and their backoff keeps it away from workers and neighbours meanwhile. Where nobody counts
        deliveries, ``one`` is charged, or it would come for ever.
        """
        self._lifetime.recycle("MemoryError", starved=True)
        received, name = one.received, self._station.stage.name
        uncounted = not received.receives
        delivery = one.attempt if uncounted else received.receives
        if is_last(one.attempt if uncounted else one.failed, received.receives, self._station.stage.task.max_attempts):
            reason = MemoryError(f"there was no memory to decode its body, at delivery number {delivery}")
            reason.__cause__ = error
            self._outbox.bury(one, reason)
        else:
            delay = pause(delivery, received.group, random.uniform)
            log.warning(
                "%s: there was no memory to decode message %s (%d characters, delivery number %d); it is visible again "
                "in %.1f s, and this worker is replaced",
                name, received.handle.message_id, len(received.body), delivery, delay,
            )  # fmt: skip
            self._outbox.put(Release((one,), delay, charge=uncounted))
        if others := (*before, *after):
            self._outbox.put(Release(others, 0.0))

    def _open(self, received: Received, leased_at: float) -> Delivery | None:
        station = self._station
        lease, failed, until = station.open_lease(received, leased_at, self._lease)
        try:
            message = self._decode(received)
        except MemoryError as error:
            raise _NoMemory(Delivery(received, _shell(received), lease, failed, until)) from error
        except BaseException as error:
            # decode= is the user's, so anything may come: the body is what fails, not the worker.
            self._outbox.bury(Delivery(received, _shell(received), lease, failed, until), error)
            return None
        if message is None:
            # decode= says that there is nothing in it for the task (a test event, say): deleted without a call.
            self._tell_of_nothing(received)
            nothing = Delivery(received, _shell(received), lease, failed, until)
            self._outbox.put(Done(Completion(received.handle), nothing, dropped=True))
            return None
        return Delivery(received, message, lease, failed, until, station.is_suspect(received))

    def _undecoded(self, received: Received, leased_at: float) -> Delivery:
        """Return what is to go back as it came, with a lease but not decoded."""
        lease, failed, until = self._station.open_lease(received, leased_at, self._lease)
        return Delivery(received, _shell(received), lease, failed, until)

    def _mind_one_group(self) -> None:
        """Say once in a run that only one worker at a time can have work here, unless that was asked for."""
        station, stage = self._station, self._station.stage
        if stage.task.group is not None or station.board.stage(stage.index, ONE_GROUP_TOLD):
            return
        station.board.set_stage(stage.index, ONE_GROUP_TOLD, 1)
        log.warning(
            "%s: what comes from %s is all in one FIFO group, %r, as sqspipes sends it: one worker at a time gets any "
            "of it, and a failed message holds up the rest (retries wait %g s at most). Run the stage before this one "
            "with sqspipes_mp, too; if the order is wanted, say so: Task(group=lambda value: %r)",
            stage.name, ", ".join(self._queues), ONE_GROUP, ONE_GROUP_BACKOFF, ONE_GROUP,
        )  # fmt: skip

    def _tell_of_nothing(self, received: Received) -> None:
        """Say once in a run that messages are deleted unseen: a decode that forgot its return looks just the same."""
        station, stage = self._station, self._station.stage
        if station.board.stage(stage.index, NOTHING_TOLD):
            return
        station.board.set_stage(stage.index, NOTHING_TOLD, 1)
        log.warning(
            "%s: decode gave None for message %s, so it is deleted without a call and counts as dropped; others will "
            "be without a further word. If it was not to be, look whether decode returns a value on every path",
            stage.name, received.handle.message_id,
        )  # fmt: skip

    def _decode(self, received: Received) -> Message | None:
        if self._read is not None:
            try:
                return self._read(received)
            finally:
                # decode= is the user's, and may have forked.
                self._station.check_process()
        return decode(received.body, received.handle.message_id)

    def _return_stale(self) -> None:
        """Give back what has waited unstarted for half a visibility timeout: another worker may be free."""
        lease = self._lease
        stale = self._ready.take_older(
            lease_now() - self._stale_after, lambda delivery: delivery.until - lease, fifo=self._station.fifo
        )
        if stale:
            self._outbox.put(Release(tuple(stale), 0.0))


def _shell(received: Received) -> Message:
    """Return what stands for a message whose body says nothing."""
    return Message(None, {}, received.handle.message_id, received.handle.message_id, 0)
