"""What the threads of one worker share: its orders, its events, its leases (worker)."""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass

from sqspipes_mp.brokers.base import Connection, Received
from sqspipes_mp.host.clock import lease_now
from sqspipes_mp.ipc.birth import Assignment, orphaned
from sqspipes_mp.ipc.channel import EXIT_OK, Channel, Kind, ParentGone
from sqspipes_mp.ipc.leases import LEASES, LeaseState, id_digest
from sqspipes_mp.ipc.report.report import pack_exception
from sqspipes_mp.ipc.scoreboard import SlotField
from sqspipes_mp.messages.envelope import Message


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message on its way through this worker. ``failed``: attempts charged before this delivery.

    ``alone``: it ran beside others when their worker died; nothing else may run beside it.
    """

    received: Received
    message: Message
    lease: int
    failed: int
    until: float
    alone: bool = False

    @property
    def attempt(self) -> int:
        return self.failed + 1


class WorkerContext:
    """The worker's shared state.

    ``full_stop``: begin nothing new (drain). ``no_more``: receive nothing new (drain, or before a planned restart).
    ``release``: every worker of this engine has stopped receiving, so what is held may go back.
    """

    def __init__(self, orders: Assignment, connection: Connection, channel: Channel) -> None:
        self.orders = orders
        self.stage = orders.stage
        self.settings = orders.plan.settings
        self.connection = connection
        self.channel = channel
        self.board = orders.board
        self.slot = orders.slot
        self.region = orders.board.region(orders.region)
        self.fifo = orders.plan.pipeline.fifo
        self.full_stop = threading.Event()
        self.no_more = threading.Event()
        #: Wakes the intake: there may be room for more, or nothing more is wanted.
        self.demand = threading.Event()
        self.release = threading.Event()
        self.faulted = threading.Event()
        #: Seconds from one message's begin until the next can (a batch's, where there are batches), a moving average;
        #: None before the first.
        self.mean: float | None = None
        #: Whether the newest receive brought a full batch: more is likely to come at once.
        self.backlog = False
        #: Messages this worker may still begin; None: any number.
        self.left: int | None = None
        self._queues = {name: place for place, name in enumerate(orders.plan.queue_names)}
        self._free = deque(range(LEASES))
        self._charging = threading.Lock()
        self._counting = threading.Lock()
        task = self.stage.task
        #: What is done with a failure: the task's own policy, or the engine's.
        self.on_error = self.settings.on_error if task.on_error is None else task.on_error
        self.threads = task.threads
        self._pid = os.getpid()
        #: Whether several messages may run at once here, so that one may have to run alone.
        self.shared = self.threads > 1 or task.batch is not None

    def check_process(self) -> None:
        """End a process that the user's code has forked and that came back from it: it is not this worker."""
        if os.getpid() != self._pid:
            os._exit(EXIT_OK)

    # -- orders -------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Begin nothing new and receive nothing new."""
        self.full_stop.set()
        self.stop_receiving()

    def stop_receiving(self) -> None:
        self.no_more.set()
        self.connection.interrupt()
        self.demand.set()

    def say(self, kind: Kind, header: dict[str, object] | None = None, blob: bytes = b"") -> None:
        """Tell the supervisor; if it is gone, so is this worker."""
        try:
            self.channel.send(kind, header or {}, blob)
        except ParentGone:
            # The descriptor may also have been closed by the user's function: either way nobody hears this worker.
            orphaned()

    def fault(self, error: BaseException) -> None:
        """Report that the engine cannot go on (the broker refuses for good), once."""
        if self.faulted.is_set():
            return
        self.faulted.set()
        self._report(Kind.FAULT, error)

    def end_run(self, error: BaseException, message_id: str | None = None) -> None:
        """Report an exception of the user's that ends the run, and drain."""
        self._report(Kind.FAILED, error, message_id)
        self.drain()

    def _report(self, kind: Kind, error: BaseException, message_id: str | None = None) -> None:
        report = pack_exception(error, stage=self.stage.name, pid=os.getpid(), message_id=message_id)
        self.say(kind, {}, report.to_bytes())

    def count(self, field: SlotField, amount: int) -> None:
        """Add to a counter of this slot that several of the worker's threads write."""
        with self._counting:
            self.board.add(self.slot, field, amount)

    # -- leases -------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many more leases fit on the scoreboard."""
        return len(self._free)

    def open_lease(self, received: Received, leased_at: float, visibility: float) -> tuple[int, int, float]:
        """Write a lease before its message can run. Returns (lease, attempts charged before, deadline)."""
        failed = received.charges
        if received.receives != 1:
            failed = max(failed, self.board.charges(id_digest(received.handle.message_id)))
        lease = self._free.popleft()
        now, until = lease_now(), leased_at + visibility
        self.region.write(
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
        """Tell whether a message has to run alone."""
        if not self.shared or received.receives == 1:
            return False
        return self.board.isolated(id_digest(received.handle.message_id))

    def close_lease(self, lease: int) -> None:
        """Free a lease: its message is deleted, given back, or somebody else's."""
        self.region.set_state(lease, LeaseState.FREE)
        self._free.append(lease)

    def holds(self, delivery: Delivery) -> bool:
        """Tell whether the message is still ours, as far as can be known without asking the broker."""
        now = lease_now()
        if now < delivery.until and not self.fifo:
            return True
        return not self.region.lost(delivery.lease) and now < self.region.deadline(delivery.lease)

    def forget_charges(self, delivery: Delivery) -> None:
        if delivery.failed:
            with self._charging:
                self.board.forget_charges(self.slot, id_digest(delivery.received.handle.message_id))

    def charge(self, delivery: Delivery) -> None:
        with self._charging:
            self.board.charge(self.slot, id_digest(delivery.received.handle.message_id), delivery.attempt)
