"""The keeper's life as the supervisor sees it: booting, ready, leaving, lost, started again. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from sqspipes_mp.supervisor.child import Child

#: Keepers lost in a row, none of them ready, after which the engine stops.
FAILURES = 5


class Loss(Enum):
    """The meaning of a keeper's death."""

    #: The keeper left as asked.
    NONE = auto()
    #: The engine's first keeper has died before it was ready: the run cannot begin.
    AT_BOOT = auto()
    #: More than ``FAILURES`` keepers in a row were lost.
    TOO_MANY = auto()
    #: Another keeper has to take over.
    REPLACED = auto()


@dataclass(slots=True)
class KeeperSlot:
    """The keeper's place. Other modules read its fields and call its transitions; none assigns a field."""

    #: The living keeper; None between two of them.
    child: Child | None = None
    #: Whether the engine has had a keeper that was ready, so that its queues are checked.
    booted: bool = False
    #: Whether the living keeper has said READY.
    ready: bool = False
    #: When the living keeper said BYE, monotonic seconds.
    leaving_since: float | None = None
    #: When the next keeper starts, monotonic seconds; None: no start is planned.
    restart_at: float | None = None
    #: When the living keeper was started, or killed for standing still, monotonic seconds.
    patient_since: float = 0.0
    _lost: int = 0

    def plan_start(self, when: float) -> None:
        """Plan the next keeper's start at ``when``, monotonic seconds."""
        self.restart_at = when

    def cancel_start(self) -> None:
        """Plan no start."""
        self.restart_at = None

    def start_due(self, now: float) -> bool:
        """Tell whether the planned start is due at ``now`` (monotonic seconds)."""
        return self.child is None and self.restart_at is not None and self.restart_at <= now

    def started(self, child: Child, now: float) -> None:
        """Take in a keeper that was started at ``now`` (monotonic seconds)."""
        assert self.child is None
        self.child, self.patient_since = child, now
        self.ready, self.leaving_since, self.restart_at = False, None, None

    def got_ready(self) -> bool:
        """Note that the keeper is ready; True: it is the engine's first."""
        first = not self.booted
        self.ready = self.booted = True
        self._lost = 0
        return first

    def leaves(self, now: float) -> None:
        """Note at ``now`` (monotonic seconds) that the keeper is about to exit as asked."""
        self.leaving_since = now

    def killed(self, now: float) -> None:
        """Note the kill of a keeper that stood still: once is enough, its death is on the way."""
        self.patient_since = now

    def died(self) -> Loss:
        """Take out the keeper, which is reaped."""
        self.child = None
        if self.leaving_since is not None:
            return Loss.NONE
        if not self.booted:
            return Loss.AT_BOOT
        self._lost += 1
        return Loss.TOO_MANY if self._lost > FAILURES else Loss.REPLACED
