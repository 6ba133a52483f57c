"""The receiving thread of a worker: it keeps the main thread fed, and holds few messages ahead (worker)."""

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
from sqspipes_mp.worker.context import Delivery
from sqspipes_mp.worker.receive.prefetch import LONG, ask
from sqspipes_mp.worker.recycle import Lifetime
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.send.outgoing import Done, Release

log = logging.getLogger("sqspipes_mp.worker")

#: Longest wait of one receive, seconds (Amazon SQS API Reference, ReceiveMessage: WaitTimeSeconds).
LONG_POLL = 20.0
#: Messages of a receive from which more wait in the queue.
_FULL = 10
#: Longest wait for demand, seconds. Bounds the cost of a ``demand.set()`` that falls between the look and the wait.
_LONGEST_REST = 1.0


class _NoMemory(Exception):
    """There was no memory to decode the body of ``delivery``; the cause is the MemoryError."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery


class Intake(threading.Thread):
    """Receives until told to stop, then says STOPPED."""

    def __init__(self, parts: Parts, lifetime: Lifetime) -> None:
        super().__init__(name="intake", daemon=True)
        self._context = context = parts.context
        self._ready = parts.ready
        self._failures = parts.failures
        self._outbox = parts.outbox
        self._lifetime = lifetime
        self._queues = context.assignment.plan.inputs[context.stage.index]
        self._lease = context.assignment.plan.first_lease
        self._stale_after = context.settings.visibility / 2
        self._round_trip = 0.02
        task = context.stage.task
        #: Reads the bodies of others' queues; None in a queue of the pipeline's own.
        self._read = reader(task.decode) if isinstance(task.input, str) else None
        #: Messages that begin in one mean run time.
        self._at_once = task.batch or task.threads

    def run(self) -> None:
        context = self._context
        try:
            while not context.no_more.is_set():
                count = self._ask()
                if count:
                    self._receive(count)
                else:
                    context.demand.wait(min(_LONGEST_REST, self._stale_after / 4))
                    context.demand.clear()
                self._return_stale()
        except BaseException as error:
            # A worker that receives no more must not look alive.
            context.fault(error)
        finally:
            self._ready.close()
            context.say(Kind.STOPPED)

    def _ask(self) -> int:
        context = self._context
        idle = self._ready.idle
        if not idle and time.monotonic() - self._ready.taken_at > self._stale_after:
            # Behind a call, a turn or a caller that takes this long, a message would be released again and again, each
            # time one delivery nearer to the dead-letter queue.
            return 0
        waiting = self._ready.waiting
        room = context.room if context.left is None else max(0, min(context.room, context.left - waiting))
        return ask(
            waiting=waiting,
            idle=idle,
            mean=context.mean,
            round_trip=self._round_trip,
            limit=self._limit(),
            room=room,
            batch=context.connection.fetch,
            ahead=context.connection.ahead,
            at_once=self._at_once,
        )

    def _limit(self) -> int | None:
        """Return how many messages may wait beside the running ones; None: by time."""
        task, mean = self._context.stage.task, self._context.mean
        if task.prefetch is not None or task.batch is None or mean is None or mean >= LONG:
            return task.prefetch
        # The next batch of calls is gathered while this one runs.
        return task.batch

    def _receive(self, count: int) -> None:
        context = self._context
        asked_at, leased_at = time.monotonic(), lease_now()
        batch = self._fetch(count)
        context.backlog = len(batch) >= _FULL
        if not batch:
            return
        if context.fifo and any(received.group == ONE_GROUP for received in batch):
            self._mind_one_group()
        if len(batch) == count:
            self._round_trip += (time.monotonic() - asked_at - self._round_trip) / 8
        leased_at = self._leased_at(batch, leased_at, asked_at)
        if lease_now() > leased_at + self._lease * 3 / 4:
            # The machine slept, or C code kept the GIL, with the messages on their way. Nobody extends them yet: their
            # leases are over, or about to be.
            log.info("%s: %d messages came too late to be begun here", context.stage.name, len(batch))
            return
        context.board.add(context.slot, RECEIVED, len(batch))
        deliveries: list[Delivery] = []
        unopened = iter(batch)
        try:
            for received in unopened:
                if delivery := self._open(received, leased_at):
                    deliveries.append(delivery)  # noqa: PERF401  (kept, though the next one may raise)
        except _NoMemory as short:
            others = [self._undecoded(received, leased_at) for received in unopened]
            self._run_out(deliveries, short.delivery, others, short.__cause__)
        else:
            self._ready.put(deliveries)

    def _leased_at(self, batch: list[Received], sent_at: float, sent_at_monotonic: float) -> float:
        """Return when the leases of a batch began at the earliest (``lease_now``).

        ``sent_at``, ``sent_at_monotonic``: when the request was sent, by either clock.
        """
        if (known := batch[0].leased_at) is not None:
            return known
        # A long poll may have waited for the messages. Their leases began between the request and its longest end,
        # however long this process stood still after that.
        awake = lease_now() - slept(sent_at, sent_at_monotonic)
        return min(max(sent_at, awake - self._lease / 4), sent_at + LONG_POLL)

    def _fetch(self, count: int) -> list[Received]:
        """Receive; without memory for the messages have this worker replaced, and return none."""
        context = self._context
        try:
            return context.connection.receive(
                self._queues, count, LONG_POLL, self._lease, attributes=self._read is not None
            )
        except MemoryError:
            log.warning(
                "%s: there was no memory to receive messages; this worker is replaced, and what was on its way is "
                "visible again within %g s",
                context.stage.name, self._lease,
            )  # fmt: skip
            self._lifetime.recycle("MemoryError", starved=True)
            return []

    def _run_out(
        self, before: list[Delivery], one: Delivery, after: list[Delivery], error: BaseException | None
    ) -> None:
        """Have this worker replaced, and release the messages received along with ``one``, which it cannot decode.

        Other messages may fill the memory, so ``one`` is not charged. The number of deliveries limits its tries, and
        its backoff spares workers and neighbours meanwhile. Where nobody counts deliveries, ``one`` is charged.
        """
        self._lifetime.recycle("MemoryError", starved=True)
        received, name = one.received, self._context.stage.name
        uncounted = not received.receives
        delivery = one.attempt if uncounted else received.receives
        if is_last(
            one.attempt if uncounted else one.attempt - 1, received.receives, self._context.stage.task.max_attempts
        ):
            reason = MemoryError(f"there was no memory to decode its body, at delivery number {delivery}")
            reason.__cause__ = error
            self._failures.dead_letter(one, reason, self._outbox.put)
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
        context = self._context
        lease, failed, until = context.open_lease(received, leased_at, self._lease)
        try:
            message = self._decode(received)
        except MemoryError as error:
            raise _NoMemory(Delivery(received, _shell(received), lease, failed + 1, until)) from error
        except BaseException as error:
            # decode= is the user's, and may raise anything: the body fails, not the worker.
            unread = Delivery(received, _shell(received), lease, failed + 1, until)
            self._failures.dead_letter(unread, error, self._outbox.put)
            return None
        if message is None:
            # decode= found nothing in it for the task (a test event, say): deleted without a call.
            self._tell_of_nothing(received)
            nothing = Delivery(received, _shell(received), lease, failed + 1, until)
            self._outbox.put(Done(Completion(received.handle), nothing, dropped=True))
            return None
        alone = context.shared and context.is_suspect(received)
        return Delivery(received, message, lease, failed + 1, until, alone)

    def _undecoded(self, received: Received, leased_at: float) -> Delivery:
        """Return a delivery that is to be released: with a lease, not decoded."""
        lease, failed, until = self._context.open_lease(received, leased_at, self._lease)
        return Delivery(received, _shell(received), lease, failed + 1, until)

    def _mind_one_group(self) -> None:
        """Say once in a run that only one worker at a time can have work here, unless ``group=`` asked for that."""
        context, stage = self._context, self._context.stage
        if stage.task.group is not None or context.board.stage(stage.index, ONE_GROUP_TOLD):
            return
        context.board.set_stage(stage.index, ONE_GROUP_TOLD, 1)
        log.warning(
            "%s: what comes from %s is all in one FIFO group, %r, as sqspipes sends it: one worker at a time gets any "
            "of it, and a failed message holds up the rest (retries wait %g s at most). Run the stage before this one "
            "with sqspipes_mp, too; if the order is wanted, say so: Task(group=lambda value: %r)",
            stage.name, ", ".join(self._queues), ONE_GROUP, ONE_GROUP_BACKOFF, ONE_GROUP,
        )  # fmt: skip

    def _tell_of_nothing(self, received: Received) -> None:
        """Say once in a run that a message is deleted without a call: a decode that forgot its return does that."""
        context, stage = self._context, self._context.stage
        if context.board.stage(stage.index, NOTHING_TOLD):
            return
        context.board.set_stage(stage.index, NOTHING_TOLD, 1)
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
                self._context.check_process()
        return decode(received.body, received.handle.message_id)

    def _return_stale(self) -> None:
        """Release messages that have waited for half a visibility timeout: another worker may be free."""
        lease = self._lease
        stale = self._ready.take_older(
            lease_now() - self._stale_after, lambda delivery: delivery.until - lease, fifo=self._context.fifo
        )
        if stale:
            self._outbox.put(Release(tuple(stale), 0.0))


def _shell(received: Received) -> Message:
    """Return a message in place of one that was not decoded."""
    return Message(None, {}, received.handle.message_id, received.handle.message_id, 0)
