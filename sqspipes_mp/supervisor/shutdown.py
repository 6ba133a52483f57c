"""The steps of a shutdown, in order. Pure: facts come in, steps go out.

::

    draining ──all stopped receiving, or 2 s──▶ releasing ──all workers gone, or grace over──▶ closing ──▶ over
       drain to every worker                       release to every worker       kill workers, keeper quits
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto

#: Seconds that a poll in flight has to return before held messages are released.
POLL_GRACE = 2.0
#: Seconds after which another signal means "at once": one Ctrl-C or one ``timeout`` may send two, to the process and to
#: its group.
SECOND_AFTER = 0.5
#: Seconds that the keeper has to release the messages that are left, and those that it has after a second signal.
KEEPER_GRACE, KEEPER_GRACE_NOW = 10.0, 1.0


class Step(Enum):
    """A step that the supervisor takes."""

    #: Tell every worker to release the messages that it holds.
    RELEASE = auto()
    #: Kill every worker: the grace is over.
    KILL_WORKERS = auto()
    #: Tell the keeper to judge the leases that are left, and to leave.
    QUIT_KEEPER = auto()
    #: Kill the keeper, which does not leave.
    KILL_KEEPER = auto()
    #: End the run: no child is left.
    OVER = auto()


@dataclass(slots=True)
class Shutdown:
    """One shutdown."""

    #: When it began, monotonic seconds.
    began: float
    #: Seconds that running calls have.
    grace: float
    #: When a second signal came, monotonic seconds.
    now_at: float | None = None
    _done: set[Step] = field(default_factory=set)
    _closing_at: float | None = None

    def hasten(self, now: float) -> None:
        """Take a second signal at ``now`` (monotonic seconds): workers are killed at once."""
        if self.now_at is None:
            self.now_at = now

    def steps(self, now: float, *, workers: int, receiving: int, keeper: bool) -> list[Step]:
        """Return the steps that are due, each of them once.

        Args:
            now: monotonic seconds.
            workers: worker processes alive.
            receiving: of these, how many may still receive.
            keeper: whether the keeper is alive.
        """
        steps: list[Step] = []
        if workers and (not receiving or now >= self.began + POLL_GRACE):
            self._once(Step.RELEASE, steps)
        if workers and now >= self._kill_at:
            self._once(Step.KILL_WORKERS, steps)
        if not workers:
            if self._closing_at is None:
                self._closing_at = now
            if keeper:
                self._once(Step.QUIT_KEEPER, steps)
                if now >= self._closing_at + self._keeper_grace:
                    # At every turn: the keeper may have been replaced in between.
                    self._done.add(Step.KILL_KEEPER)
                    steps.append(Step.KILL_KEEPER)
            else:
                self._once(Step.OVER, steps)
        return steps

    def deadline(self) -> float:
        """Return when the next step may be due, monotonic seconds; infinite where only a death brings the next one."""
        if self._closing_at is not None:
            return math.inf if Step.KILL_KEEPER in self._done else self._closing_at + self._keeper_grace
        kill_at = math.inf if Step.KILL_WORKERS in self._done else self._kill_at
        return kill_at if Step.RELEASE in self._done else min(self.began + POLL_GRACE, kill_at)

    @property
    def _kill_at(self) -> float:
        return self.began + self.grace if self.now_at is None else self.now_at

    @property
    def _keeper_grace(self) -> float:
        return KEEPER_GRACE if self.now_at is None else KEEPER_GRACE_NOW

    def _once(self, step: Step, steps: list[Step]) -> None:
        if step not in self._done:
            self._done.add(step)
            steps.append(step)
