"""When everything is done: sources ended and every queue empty for long enough (keeper)."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqspipes_mp.brokers.base import Connection
from sqspipes_mp.ipc.scoreboard import FINISHED, Scoreboard
from sqspipes_mp.pipeline.plan import RunPlan

log = logging.getLogger("sqspipes_mp.keeper")

#: Seconds between two looks.
LOOK_EVERY = 0.1
_SLOW_LOOK = 5.0


class DrainWatch:
    """Looks at the counts and tells when the pipeline has drained.

    A message only ever moves downstream, so looking upstream first sees each one at least once, whatever moves
    meanwhile (what a worker holds is in flight in its queue, and counted there). Where counts are approximate they
    must stay zero for the broker's ``settle`` seconds.
    """

    def __init__(self, plan: RunPlan, board: Scoreboard, connection: Connection, beat: Callable[[], None]) -> None:
        self._plan = plan
        self._beat = beat
        self._board = board
        self._connection = connection
        source = plan.source
        self._sources = [slot for slot, seat in enumerate(plan.seats) if source and seat.stage == source.index]
        # Nobody tells when a source elsewhere has ended: then the queues must also have been empty for ``idle``.
        self._quiet_for = max(connection.settle, 0.0 if self._sources else plan.idle)
        self._empty_since: float | None = None
        self._told = False

    def drained(self, now: float) -> bool:
        """Look once; ``now`` in monotonic seconds."""
        if not self._empty():
            self._empty_since = None
            return False
        if self._empty_since is None:
            self._empty_since = now
            if self._quiet_for and not self._told:
                self._told = True
                log.info("every queue is empty; the run ends when they stay so for %g s", self._quiet_for)
        return now - self._empty_since >= self._quiet_for

    def pause(self) -> float:
        """Return the seconds until the next look."""
        return LOOK_EVERY if self._connection.settle == 0 else min(_SLOW_LOOK, max(LOOK_EVERY, self._quiet_for / 12))

    def _empty(self) -> bool:
        board = self._board
        if not all(board.get(slot, FINISHED) for slot in self._sources):
            return False
        for queue in self._plan.watched:
            self._beat()
            if not self._connection.depth(queue).empty:
                return False
        return True
