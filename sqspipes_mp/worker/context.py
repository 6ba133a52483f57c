"""The state that the threads of one worker share: its assignment, its events, its leases (worker)."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sqspipes_mp.brokers.base import Connection, Received, count_requests
from sqspipes_mp.host.clock import lease_now
from sqspipes_mp.ipc.birth import Assignment, orphaned
from sqspipes_mp.ipc.channel import EXIT_OK, Channel, Kind, ParentGone
from sqspipes_mp.ipc.leases import LEASES, LeaseState, id_digest
from sqspipes_mp.ipc.report.report import pack_exception
from sqspipes_mp.ipc.request_meter import RequestMeter
from sqspipes_mp.ipc.statistics import CALL_STARTED, EXPECTED, LAST_CONTACT, PAUSED, RESTS, SlotField
from sqspipes_mp.messages.chain import Chain
from sqspipes_mp.messages.envelope import Message
from sqspipes_mp.pipeline.current import Ending


@dataclass(frozen=True, slots=True)
class Delivery:
    """A received message in this worker."""

    received: Received
    message: Message
    #: Index of its entry in the lease table.
    lease: int
    #: Number of this attempt, from 1: the failed ones before it, and itself.
    attempt: int
    #: When the receive's lease ends (``lease_now``); the keeper may have extended it.
    until: float
    #: It ran beside others when their worker died: nothing else may run beside it.
    alone: bool = False
    #: Its place in its chain; None: it is no continuation.
    chain: Chain | None = None

    @property
    def alone_in_group(self) -> bool:
        """Whether the FIFO group has no other message: its name is the message's own hop id, as the engine chose it."""
        first = self.message.parent if self.chain is None else self.chain.first
        return self.received.group == first != self.message.id


#: Why a worker is replaced that has no file descriptor left.
NO_DESCRIPTOR = "it had no file descriptor left (ulimit -n): does the function open some and keep them?"


def no_thread(error: BaseException) -> bool:
    """Tell whether an error says that the system lets this process start no thread."""
    return isinstance(error, RuntimeError) and str(error).startswith("can't start new thread")


class WorkerContext:
    """The worker's shared state."""

    def __init__(self, assignment: Assignment, connection: Connection, channel: Channel) -> None:
        self.assignment = assignment
        self.stage = assignment.stage
        self.settings = assignment.plan.settings
        self.connection = connection
        self.channel = channel
        self.board = assignment.board
        self.slot = assignment.slot
        count_requests(connection, RequestMeter(self.board, self.slot))
        self.leases = assignment.board.region(assignment.region)
        self.fifo = assignment.plan.pipeline.fifo
        #: Whether the caller of ``map`` counts the messages that come of each value.
        self.counted = assignment.plan.counted
        #: Says to calls that run whether they are to come to an end.
        self.ending = Ending(lambda: self.paused)
        #: Set at a drain: no call begins.
        self.full_stop = threading.Event()
        #: Set at a drain and before a planned replacement: nothing more is received.
        self.no_more = threading.Event()
        #: Set at a drain and while the stage is paused: no call begins.
        self.hold = threading.Event()
        #: Wakes the intake: there may be room for more messages, or none is wanted any more.
        self.demand = threading.Event()
        #: Set once each worker of this engine has stopped receiving: held messages may be released.
        self.release = threading.Event()
        #: Set once this worker has reported a fault: it ends, and the keeper releases its messages.
        self.faulted = threading.Event()
        #: Seconds from one message's begin until the next can begin (batch mode: one batch's), a moving average; None
        #: before the first.
        self.mean: float | None = None
        #: When a call ended last that took longer than a quarter of the first lease, monotonic seconds.
        self.long_call_ended = float("-inf")
        #: Whether the newest receive brought a full batch: the next one is likely to as well.
        self.backlog = False
        #: Messages this worker may still begin; None: any number.
        self.left: int | None = None
        task = self.stage.task
        #: The policy for a call that raised: the task's own, or the engine's.
        self.on_error = self.settings.on_error if task.on_error is None else task.on_error
        self.threads = task.threads
        #: Whether several messages may run at once here, so that one may have to run alone.
        self.shared = self.threads > 1 or task.batch is not None
        self._queues = {name: place for place, name in enumerate(assignment.plan.queue_names)}
        # The newest one freed is the next one used, so that few pages of the table are ever touched.
        self._free = list(range(LEASES))
        self._charging = threading.Lock()
        self._counting = threading.Lock()
        self._pid = os.getpid()
        self._recycling = threading.Lock()
        #: Whether this worker has asked for its replacement.
        self._replaced = False

    def check_process(self) -> None:
        """End a forked copy of this worker that came back from the user's code."""
        if os.getpid() != self._pid:
            os._exit(EXIT_OK)

    # -- orders and reports -------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Begin no call and receive nothing from now on."""
        self.ending.stopping = True
        self.full_stop.set()
        self.hold.set()
        self.stop_receiving()

    def recycle(self, reason: str, *, starved: bool = False) -> None:
        """Have this worker replaced once its running calls have ended; see ``Lifetime.recycle``."""
        with self._recycling:
            first, self._replaced = not (self._replaced or self.no_more.is_set()), True
        if first:
            if reason != "max_tasks_per_worker":
                # Calls that run beside it have no hurry to end for a count of messages.
                self.ending.stopping = True
            self.say(Kind.RECYCLE, {"reason": reason, "starved": starved})
            self.stop_receiving()

    @property
    def paused(self) -> bool:
        """Whether the stage is paused, by the board: the order may not be heard while C code keeps the GIL."""
        return bool(self.board.stage(self.stage.index, PAUSED))

    def stop_receiving(self) -> None:
        self.no_more.set()
        self.connection.interrupt()
        self.demand.set()

    def say(self, kind: Kind, header: dict[str, object] | None = None, blob: bytes = b"") -> None:
        """Tell the supervisor; without a supervisor this worker ends."""
        try:
            self.channel.send(kind, header or {}, blob)
        except ParentGone:
            # The user's function may have closed the descriptor; then too nobody hears this worker.
            orphaned()

    def fault(self, error: BaseException) -> None:
        """Report, once, that the engine cannot go on: the broker refuses for good, or a thread of ours ended."""
        if not self.faulted.is_set():
            self.faulted.set()
            self._report(Kind.FAULT, error)

    def end_run(self, error: BaseException, message_id: str | None = None) -> None:
        """Report an exception of the user's code that ends the run, and drain."""
        self._report(Kind.FAILED, error, message_id)
        self.drain()

    def _report(self, kind: Kind, error: BaseException, message_id: str | None = None) -> None:
        report = pack_exception(error, stage=self.stage.name, pid=os.getpid(), message_id=message_id)
        self.say(kind, {}, report.to_bytes())

    def count(self, field: SlotField, amount: int) -> None:
        """Add to a counter of this slot that several of the worker's threads write."""
        with self._counting:
            self.board.add(self.slot, field, amount)

    def note_contact(self) -> None:
        """Note that the broker has answered this worker just now."""
        self.board.put(self.slot, LAST_CONTACT, time.monotonic_ns())

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Tell readers that this worker waits on purpose within the block: for its turn, or for the caller."""
        self.board.put(self.slot, RESTS, 1)
        try:
            yield
        finally:
            self.board.put(self.slot, RESTS, 0)

    def long_call_since(self, then: float, seconds: float) -> bool:
        """Tell whether a call longer than ``seconds`` runs, or has ended since ``then`` (monotonic s).

        It may have kept the GIL, so that a reply that came meanwhile was not read.
        """
        started = self.board.get(self.slot, CALL_STARTED) / 1e9
        return self.long_call_ended >= then or (started > 0 and time.monotonic() - started > seconds)

    def others(self) -> list[int]:
        """Return the other slots of this worker's stage that are to have a worker."""
        board, own = self.board, self.slot
        return [slot for slot in board.used(self.stage.index) if slot != own and board.get(slot, EXPECTED)]

    # -- leases -------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many more leases fit into the table."""
        return len(self._free)

    def open_lease(self, received: Received, leased_at: float, visibility: float) -> tuple[int, int, float]:
        """Write a lease before its message can run. Returns (lease, failed attempts before, deadline)."""
        failed = received.charges
        if received.receives != 1:
            failed = max(failed, self.board.charges(id_digest(received.handle.message_id), self.stage.index))
        lease = self._free.pop()
        now, until = lease_now(), leased_at + visibility
        self.leases.write(
            lease,
            self._queues.get(received.handle.queue, 0),
            received.handle,
            received.group,
            receives=received.receives,
            charges=failed,
            received_at=now,
            deadline=until,
            sent_at=received.sent_at,
        )
        return lease, failed, until

    def is_suspect(self, received: Received) -> bool:
        """Tell whether a message has to run alone: it was among several that ran when their worker died."""
        return received.receives != 1 and self.board.isolated(id_digest(received.handle.message_id))

    def close_lease(self, lease: int) -> None:
        """Free a lease: its message is deleted, released, or lost."""
        self.leases.set_state(lease, LeaseState.FREE)
        self._free.append(lease)

    def holds(self, delivery: Delivery) -> bool:
        """Tell whether the lease still holds, as far as this worker knows without a request."""
        now = lease_now()
        if now < delivery.until and not self.fifo:
            return True
        return now < self.leases.held_until(delivery.lease, delivery.until)

    def charge(self, delivery: Delivery) -> None:
        with self._charging:
            self.board.charge(self.slot, id_digest(delivery.received.handle.message_id), delivery.attempt)

    def forget_charges(self, delivery: Delivery) -> None:
        with self._charging:
            self.board.forget_charges(self.slot, id_digest(delivery.received.handle.message_id))
