"""The states of a slot and of its worker, from start to death. Pure: facts come in, decisions go out.

::

    in             comes                    then
    ─────────────  ───────────────────────  ───────────────────────────────────────────────────────────
    EMPTY          plan_start               WAITING
    WAITING        cancel_start             EMPTY
    either         started                  BOOTING
    BOOTING        got_ready                READY
    READY          call_is_late             LATE, until call_came_back
    READY          leaves                   LEAVING
    with a worker  kill                     KILLED; with a late call it stays LATE
    any            expect (no worker)       as before; no start is planned, and none after its worker's death
    with a worker  died                     EMPTY; FINISHED where the source has ended and its worker left
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from sqspipes_mp.ipc.leases import Cause, Lease, LeaseTable
from sqspipes_mp.ipc.report.report import Report
from sqspipes_mp.ipc.stack_dump import StackFile
from sqspipes_mp.pipeline.plan import Seat
from sqspipes_mp.pipeline.stages import Stage
from sqspipes_mp.supervisor.child import Child

#: Seconds between two looks at the stack of a worker that is to be killed; writing takes less than a millisecond.
#: Seconds that a worker has to write its stack to the end, since it may get no CPU.
LAST_WORDS, SILENCE = 0.05, 1.0


class State(Enum):
    """How far a slot has come."""

    #: No worker, and no start is planned.
    EMPTY = auto()
    #: No worker; the next one starts at ``restart_at``.
    WAITING = auto()
    #: The worker has not said READY.
    BOOTING = auto()
    #: The worker has said READY.
    READY = auto()
    #: The worker is killed at ``kill_at`` unless its late call comes back before.
    LATE = auto()
    #: The supervisor has killed the worker; its death is on the way.
    KILLED = auto()
    #: The worker has said BYE.
    LEAVING = auto()
    #: The slot's source has ended; no worker starts any more.
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker's process and its shared memory."""

    child: Child
    #: Where the worker writes its leases.
    region: LeaseTable
    #: Where the worker's stack is written before a kill, or on a fatal signal.
    stack: StackFile


@dataclass(frozen=True, slots=True)
class Call:
    """A call that its worker is killed for."""

    cause: Cause
    #: When the call began, monotonic nanoseconds; 0: only the lease identifies the call.
    started: int
    #: The lease of the call's message; None: the call has no message of its own (a batch, a source).
    lease: Lease | None

    @property
    def known(self) -> bool:
        """Whether the call has one message, which is to blame."""
        return self.lease is not None and not self.lease.company


@dataclass(slots=True)
class Slot:
    """A slot of one stage. Other modules read its fields and call its transitions; none assigns a field."""

    #: The slot's number on the scoreboard.
    index: int
    seat: Seat
    stage: Stage
    #: The stage's name with the slot's number in the stage, for people.
    name: str
    #: Whether the slot is to have a worker.
    expected: bool = True
    #: The living worker; None between two of them.
    worker: Worker | None = None
    #: When the next worker starts, monotonic seconds; None: no start is planned.
    restart_at: float | None = None
    #: Whether the slot's source has ended and its worker has left.
    finished: bool = False
    #: The report of the newest worker that failed before it was ready.
    boot_report: Report | None = None

    # Of the living worker, or of the last one until the next has started.
    #: When the worker was started, monotonic seconds.
    started_at: float = 0.0
    ready: bool = False
    #: Whether the worker receives no more.
    stopped: bool = False
    #: Whether the worker's source has ended.
    ended: bool = False
    #: Whether the worker asked for its replacement because it had no memory for the messages themselves.
    starved: bool = False
    #: The reason for which the worker leaves for a successor, one of ``statistics.RESTART_REASONS``; empty: it stays.
    leaves_for: str = ""
    #: Why the system refuses the worker a thread that it needs; None: it does not.
    refused: str | None = None
    #: When the worker said BYE, monotonic seconds.
    leaving_since: float | None = None
    #: The call that the worker is about to be killed for.
    late: Call | None = None
    #: When the worker with a late call is killed, monotonic seconds.
    kill_at: float | None = None
    #: When to look again for how long the worker's messages have been in flight, monotonic seconds.
    hold_look_at: float = 0.0
    _silent_until: float = 0.0
    _killed: Cause | None = None
    _killed_for_call: bool = False

    @property
    def state(self) -> State:
        """Return how far the slot has come; a kill counts before all that its worker said."""
        if self.worker is None:
            if self.finished:
                return State.FINISHED
            return State.EMPTY if self.restart_at is None else State.WAITING
        if self.late is not None:
            return State.LATE
        if self._killed is not None:
            return State.KILLED
        if self.leaving_since is not None:
            return State.LEAVING
        return State.READY if self.ready else State.BOOTING

    @property
    def cause(self) -> Cause | None:
        """Return the reason for which the supervisor kills the worker; None: it does not."""
        return self._killed if self.late is None else self.late.cause

    @property
    def knows_call(self) -> bool:
        """Whether the worker is killed for one call that is known."""
        return self._killed_for_call if self.late is None else self.late.known

    # -- orders -------------------------------------------------------------------------------------------------

    def expect(self, *, worker: bool) -> None:
        """Have a worker in the slot from now on, or none after the present one, for which no start is planned."""
        self.expected = worker
        if not worker:
            self.restart_at = None

    # -- between two workers ------------------------------------------------------------------------------------

    def plan_start(self, when: float) -> None:
        """Plan the next worker's start at ``when``, monotonic seconds."""
        self.restart_at = when

    def cancel_start(self) -> None:
        """Plan no start."""
        self.restart_at = None

    def start_due(self, now: float) -> bool:
        """Tell whether the planned start is due at ``now`` (monotonic seconds)."""
        return self.worker is None and self.restart_at is not None and self.restart_at <= now

    def started(self, worker: Worker, now: float) -> None:
        """Take in a worker that was started at ``now`` (monotonic seconds)."""
        assert self.worker is None
        assert not self.finished
        self.worker, self.started_at, self.restart_at = worker, now, None
        self.ready = self.stopped = self.ended = self.starved = False
        self.leaves_for = ""
        self.refused = None
        self.leaving_since = self.late = self.kill_at = self._killed = None
        self._killed_for_call = False
        self.hold_look_at = self._silent_until = 0.0

    # -- said by the worker -------------------------------------------------------------------------------------

    def got_ready(self) -> None:
        """Note that the worker has booted."""
        self.ready = True

    def boot_failed(self, report: Report) -> None:
        """Keep the report of a worker that failed before it was ready; its death follows."""
        self.boot_report = report

    def start_refused(self, why: str) -> None:
        """Note that the system lets the worker start no thread; its death follows."""
        self.refused = why

    def stopped_receiving(self) -> None:
        """Note that the worker receives no more."""
        self.stopped = True

    def source_ended(self) -> None:
        """Note that the worker's source has ended."""
        self.ended = True

    def wants_replacement(self, *, starved: bool, reason: str = "max_tasks") -> None:
        """Note that the worker is about to leave for a successor.

        ``starved``: it has no memory for its messages; ``reason``: one of ``statistics.RESTART_REASONS``.
        """
        self.starved = starved
        self.leaves_for = reason

    def leaves(self, now: float) -> None:
        """Note at ``now`` (monotonic seconds) that the worker has carried everything away and is about to exit."""
        self.leaving_since = now

    # -- kills --------------------------------------------------------------------------------------------------

    def call_is_late(self, call: Call, now: float) -> None:
        """Plan the kill of a worker that was asked for its stack at ``now`` (monotonic seconds)."""
        self.late, self.kill_at, self._silent_until = call, now + LAST_WORDS, now + SILENCE

    def call_came_back(self) -> None:
        """Cancel the kill: the late call has ended by itself."""
        self.late = self.kill_at = None

    def kill_due(self, now: float) -> bool:
        """Tell whether the planned kill is due at ``now`` (monotonic seconds)."""
        return self.kill_at is not None and now >= self.kill_at

    def put_off_kill(self, now: float) -> bool:
        """Wait longer for the whole stack of a worker; False: it has had ``SILENCE`` seconds."""
        if now >= self._silent_until:
            return False
        self.kill_at = now + LAST_WORDS
        return True

    def look_for_hold(self, when: float) -> None:
        """Plan the next look for messages that have been in flight for long, monotonic seconds."""
        self.hold_look_at = when

    def kill(self, cause: Cause, *, known: bool = False) -> None:
        """Note that the worker is being killed; the first cause counts, and a late call before any.

        ``known``: it is killed for one call, which is marked.
        """
        if self._killed is None:
            self._killed, self._killed_for_call = cause, known

    # -- its end ------------------------------------------------------------------------------------------------

    def died(self) -> Cause:
        """Take out the worker, which is reaped, and return the cause of its death; CLEAN: it left as asked."""
        assert self.worker is not None
        cause = self.cause
        if cause is None:
            cause = Cause.CRASH if self.leaving_since is None else Cause.CLEAN
        self.finished = cause is Cause.CLEAN and self.ended
        self.worker = self.restart_at = None
        return cause
