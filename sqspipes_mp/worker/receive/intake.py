"""The receiving threads of a worker: they keep the main thread fed, and hold few messages ahead (worker)."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sqspipes_mp.brokers.base import Completion, Received
from sqspipes_mp.host.clock import lease_now, slept
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import id_digest
from sqspipes_mp.ipc.statistics import LAST_RECEIVE, NOTHING_TOLD, ONE_GROUP_TOLD, RECEIVED
from sqspipes_mp.messages.attempts import ONE_GROUP, ONE_GROUP_BACKOFF, is_last, pause
from sqspipes_mp.messages.chain import chain_of
from sqspipes_mp.messages.envelope import Message, decode
from sqspipes_mp.pipeline.foreign_bodies import reader
from sqspipes_mp.worker.context import Delivery
from sqspipes_mp.worker.receive.prefetch import LONG, another, ask, depth
from sqspipes_mp.worker.recycle import Lifetime
from sqspipes_mp.worker.request_limit import Limit
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.send.continuing import early, is_fifo, put_off
from sqspipes_mp.worker.send.outgoing import Done, Release

log = logging.getLogger("sqspipes_mp.worker")

#: Longest wait of one receive, seconds (Amazon SQS API Reference, ReceiveMessage: WaitTimeSeconds).
LONG_POLL = 20.0
#: Wait of a receive beside others, seconds: long enough for SQS to look at all of its servers.
_EXTRA_POLL = 1.0
#: Messages of a receive from which more wait in the queue.
_FULL = 10
#: Seconds before its due time from which a message may run: the clocks of two machines differ.
_EARLY = 1.0
#: Longest wait for demand, seconds. Bounds the cost of a ``demand.set()`` that falls between the look and the wait.
_LONGEST_REST = 1.0


class _NoMemory(Exception):
    """There was no memory to decode the body of ``delivery``; the cause is the MemoryError."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery


class Intake:
    """Receives until told to stop, then says STOPPED.

    Its first thread looks at every level and waits in long polls. While replies come full, further threads receive at
    the level they came from, as many as it takes to have two round trips of work here or on its way.
    """

    def __init__(self, parts: Parts, lifetime: Lifetime) -> None:
        self._context = context = parts.context
        self._ready = parts.ready
        self._failures = parts.failures
        self._outbox = parts.outbox
        self._pause = parts.pause
        self._lifetime = lifetime
        self._queues = context.assignment.plan.inputs[context.stage.index]
        self._lease = context.assignment.plan.first_lease
        self._stale_after = context.settings.visibility / 2
        self._round_trip = 0.02
        #: Mean bytes of a reply; None before the first.
        self._reply: int | None = None
        task = context.stage.task
        #: Reads the bodies of others' queues; None in a queue of the pipeline's own.
        self._read = reader(task.decode) if isinstance(task.input, str) else None
        #: Messages that begin in one mean run time.
        self._at_once = task.batch or task.threads
        self._limit = Limit(context.connection.receivers)
        #: Guards the fields below.
        self._lock = threading.Lock()
        #: Messages asked for by the receives under way, and how many receives these are.
        self._asked = self._under_way = 0
        #: The highest level whose newest reply had all messages asked for: there may be more.
        self._full: str | None = None
        #: Wakes one of the further threads for each receive that is wanted.
        self._wanted = threading.Semaphore(0)
        #: Further threads, and those of them that wait.
        self._others = self._waiting = 0
        self._alive = 1
        self._threads = [threading.Thread(target=self._lead, name="intake", daemon=True)]

    def start(self) -> None:
        self._threads[0].start()

    def join(self, timeout: float) -> None:
        """Wait for the receives under way, seconds at most."""
        until = time.monotonic() + timeout
        for thread in list(self._threads):
            thread.join(max(0.0, until - time.monotonic()))

    # -- threads ------------------------------------------------------------------------------------------------

    def _lead(self) -> None:
        """Receive from all levels, and wait where nothing is wanted."""
        context = self._context
        with self._guarded():
            while not context.no_more.is_set():
                count, _ = self._reserve(first=True)
                if count:
                    self._receive(self._queues, count, LONG_POLL)
                else:
                    if self._pause.paused and not self._asked:
                        self._pause.quiet()
                    context.demand.wait(min(_LONGEST_REST, self._stale_after / 4))
                    context.demand.clear()
                self._return_stale()

    def _help(self) -> None:
        """Receive from the level with a backlog, each time another receive is wanted."""
        with self._guarded():
            while True:
                with self._lock:
                    self._waiting += 1
                self._wanted.acquire()
                if self._context.no_more.is_set():
                    return
                count, full = self._reserve(first=False)
                if count and full is not None:
                    self._receive((full,), count, _EXTRA_POLL if len(self._queues) == 1 else 0.0)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Report a thread's error, and say STOPPED after the last thread."""
        try:
            yield
        except BaseException as error:
            # A worker that receives no more must not look alive.
            self._context.fault(error)
        finally:
            with self._lock:
                self._alive -= 1
                last = not self._alive
            # The others are here no later than their receives.
            for _ in range(self._others):
                self._wanted.release()
            if last:
                self._ready.close()
                self._context.say(Kind.STOPPED)

    def _reserve(self, *, first: bool) -> tuple[int, str | None]:
        """Return how many messages to ask for now, and the level with a backlog; have another thread ask, too.

        ``first``: for the thread that looks at every level. The messages count as on their way until ``_receive`` ends.
        """
        with self._lock:
            if not first and (self._full is None or not self._another()):
                return 0, None
            count = self._ask(first=first)
            if count:
                self._asked += count
                self._under_way += 1
                if self._another() and self._ask():
                    self._call_another()
            else:
                # Woken once a whole batch fits again.
                self._ready.low = max(1, self._depth() - self._asked)
            return count, self._full

    def _another(self) -> bool:
        context = self._context
        allowed = self._limit.allowed(self._under_way, context.connection.throttles, time.monotonic())
        return self._under_way < allowed and another(
            under_way=self._under_way, mean=context.mean, backlog=self._full is not None, reply=self._reply
        )

    def _call_another(self) -> None:
        if self._waiting:
            self._waiting -= 1
            self._wanted.release()
        elif self._others + 1 < self._context.connection.receivers and not self._context.no_more.is_set():
            thread = threading.Thread(target=self._help, name=f"intake-{self._others + 1}", daemon=True)
            try:
                # It waits for the lock, which is held here.
                thread.start()
            except (RuntimeError, MemoryError) as error:
                log.debug("%s: one receive less under way: %s", self._context.stage.name, error)
                return
            self._threads.append(thread)
            self._others += 1
            self._alive += 1
            self._wanted.release()
            self._waiting -= 1

    # -- receiving ----------------------------------------------------------------------------------------------

    def _ask(self, *, first: bool = False) -> int:
        context = self._context
        if context.paused or self._pause.paused:
            if not self._pause.paused:
                self._pause.follow()
            return 0
        idle = self._ready.idle
        if not idle and time.monotonic() - self._ready.taken_at > self._stale_after:
            # Behind a call, a turn or a caller that takes this long, a message would be released again and again, each
            # time one delivery nearer to the dead-letter queue.
            return 0
        waiting = self._ready.waiting
        if not (first and idle and not waiting):
            # A hungry main thread does not wait for a further thread's receive, which may be stuck, or find nothing.
            waiting += self._asked
        room = context.room - self._asked
        if context.left is not None:
            room = min(room, context.left - self._ready.waiting - self._asked)
        return ask(
            waiting=waiting,
            idle=idle,
            mean=context.mean,
            round_trip=self._round_trip,
            limit=self._most(),
            room=max(0, room),
            batch=context.connection.fetch,
            ahead=context.connection.ahead,
            at_once=self._at_once,
        )

    def _depth(self) -> int:
        return depth(self._context.mean, self._round_trip, self._most(), self._at_once)

    def _most(self) -> int | None:
        """Return how many messages may wait beside the running ones; None: by time."""
        task, mean = self._context.stage.task, self._context.mean
        if task.prefetch is not None or task.batch is None or mean is None or mean >= LONG:
            return task.prefetch
        # The next batch of calls is gathered while this one runs.
        return task.batch

    def _receive(self, queues: Sequence[str], count: int, wait: float) -> None:
        """Receive ``count`` messages that were reserved, and hand them to the main thread."""
        try:
            self._take_in(queues, count, wait)
        finally:
            with self._lock:
                # Only now, that each message has its lease: else others would count on the same room.
                self._asked -= count
            if self._pause.paused:
                # The leading thread tells that nothing is under way any more.
                self._context.demand.set()

    def _take_in(self, queues: Sequence[str], count: int, wait: float) -> None:
        asked_at, leased_at = time.monotonic(), lease_now()
        batch: list[Received] = []
        try:
            batch = self._fetch(queues, count, wait)
        finally:
            self._came(queues, batch, count, time.monotonic() - asked_at)
        if not batch:
            return
        context = self._context
        if context.fifo and any(received.group == ONE_GROUP for received in batch):
            self._mind_one_group()
        unsaid = batch[0].leased_at is None
        leased_at = self._leased_at(batch, leased_at, asked_at)
        if unsaid and context.long_call_since(asked_at, self._lease / 4):
            batch, leased_at = self._confirmed(batch)
        if lease_now() > leased_at + self._lease * 3 / 4:
            # The machine slept, or C code kept the GIL, with the messages on their way. Nobody extends them yet: their
            # leases are over, or about to be.
            log.info("%s: %d messages came too late to be begun here", context.stage.name, len(batch))
            return
        context.board.put(context.slot, LAST_RECEIVE, time.monotonic_ns())
        context.count(RECEIVED, len(batch))
        deliveries: list[Delivery] = []
        unopened = iter(batch)
        if self._excess(batch):
            self._outbox.put(Release(tuple(self._undecoded(received, leased_at) for received in unopened), 0.0))
            return
        try:
            for received in unopened:
                if delivery := self._open(received, leased_at):
                    deliveries.append(delivery)  # noqa: PERF401  (kept, though the next one may raise)
        except _NoMemory as short:
            others = [self._undecoded(received, leased_at) for received in unopened]
            self._run_out(deliveries, short.delivery, others, short.__cause__)
        else:
            self._ready.put(deliveries)
            self._pause.give_back()

    def _came(self, queues: Sequence[str], batch: Sequence[Received], count: int, seconds: float) -> None:
        """Count the end of a receive from any of ``queues``, and learn from its reply."""
        with self._lock:
            self._under_way -= 1
            if len(batch) == count:
                self._round_trip += (seconds - self._round_trip) / 8
            if batch:
                size = sum(map(len, [received.body for received in batch]))
                self._reply = size if self._reply is None else self._reply + (size - self._reply) // 4
            self._context.backlog = len(batch) >= _FULL
            level = batch[0].handle.queue if batch else queues[-1]
            if self._full in queues[: queues.index(level) + 1]:
                self._full = None
            if batch and len(batch) >= count and (self._full is None or self._place(level) < self._place(self._full)):
                self._full = level

    def _excess(self, batch: Sequence[Received]) -> bool:
        """Tell whether messages of a lower level came while a higher one has a backlog, and no more are wanted."""
        full = self._full
        if full is None or self._place(batch[0].handle.queue) <= self._place(full):
            return False
        return self._ready.waiting >= max(self._depth(), self._ready.idle)

    def _place(self, level: str) -> int:
        return self._queues.index(level)

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

    def _confirmed(self, batch: list[Received]) -> tuple[list[Received], float]:
        """Extend messages whose reply a long call may have kept unread; return those still ours, leased anew."""
        leased_at = lease_now()
        stale = set(self._context.connection.extend([received.handle for received in batch], self._lease))
        if stale:
            log.info("%s: %d messages came too late to be begun here", self._context.stage.name, len(stale))
        groups = {received.group for received in batch if received.handle in stale} if self._context.fifo else set()
        return [each for each in batch if each.handle not in stale and each.group not in groups], leased_at

    def _fetch(self, queues: Sequence[str], count: int, wait: float) -> list[Received]:
        """Receive; without memory for the messages have this worker replaced, and return none."""
        context = self._context
        try:
            found = context.connection.receive(queues, count, wait, self._lease, attributes=self._read is not None)
        except MemoryError:
            log.warning(
                "%s: there was no memory to receive messages; this worker is replaced, and what was on its way is "
                "visible again within %g s",
                context.stage.name, self._lease,
            )  # fmt: skip
            self._lifetime.recycle("MemoryError", starved=True)
            return []
        context.note_contact()
        return found

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
            delay = pause(delivery, received.group if self._context.fifo else None, random.uniform)
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
        delivery = Delivery(received, message, lease, failed + 1, until, alone)
        if received.receives != 1 and context.board.cancelled(id_digest(received.handle.message_id)):
            self._failures.cancelled(delivery, self._outbox.put)
            return None
        if "chain" not in message.meta and "not_before" not in message.meta:
            return delivery
        return self._in_time(replace(delivery, chain=chain_of(message, context.stage.name)))

    def _in_time(self, delivery: Delivery) -> Delivery | None:
        """Return a message that may have to wait; None: it is too early, and has gone back uncharged."""
        rest = early(delivery, self._context)
        if rest <= _EARLY:
            return delivery
        # In flight it would count towards a limit of SQS, 120,000. SQLite has no limit, and may know the message's hop.
        # In a FIFO queue no single message can be delayed.
        stays = self._context.connection.keeps_charges or is_fifo(delivery)
        self._outbox.put(Release((delivery,), rest) if stays else put_off(delivery, rest))
        return None

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
