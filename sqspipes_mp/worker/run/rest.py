"""A source's rest while too many messages wait in the queues it sends to, ``Task(max_waiting=)`` (worker).

The keeper counts. A count that has become old proves nothing, so no source rests by one: it would stand still because
nobody counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from sqspipes_mp.ipc.statistics import BACKLOG, BACKLOG_AT, COUNT_EVERY, RESTING
from sqspipes_mp.worker.context import WorkerContext

log = logging.getLogger("sqspipes_mp.worker")

#: Intervals between two counts after which a count is old.
_OLD = 3
#: Seconds between two looks at the count while a source rests.
_LOOK = 0.25
#: Seconds between two warnings that nobody counts.
_WARN_EVERY = 60.0


class Rest:
    """The rests of one worker of a source with ``max_waiting``."""

    def __init__(self, context: WorkerContext, most: int) -> None:
        self._context = context
        self._most = most
        # A worker that died at rest has left it.
        context.board.set_stage(context.stage.index, RESTING, 0)
        self._told = False
        self._warned_at = float("-inf")

    def over(self, idle: Callable[[], None]) -> bool:
        """Rest while more than ``max_waiting`` messages wait. False: the run ends first.

        ``idle`` is called before a rest, in which no message would come to fill a batch.
        """
        context, stage = self._context, self._context.stage
        began: float | None = None
        while (waiting := self._too_many(began)) is not None and not context.no_more.is_set():
            if began is None:
                began = time.monotonic()
                idle()
                log.log(
                    logging.DEBUG if self._told else logging.INFO,
                    "%s: rests, since %d messages wait in the queues it sends to (max_waiting=%d)",
                    stage.name, waiting, self._most,
                )  # fmt: skip
                self._told = True
            # Each time: another worker of the source may have begun or ended a rest.
            context.board.set_stage(stage.index, RESTING, 1)
            with context.resting():
                context.no_more.wait(_LOOK)
        if began is not None:
            context.board.set_stage(stage.index, RESTING, 0)
            log.debug("%s: goes on after %.1f s", stage.name, time.monotonic() - began)
        return not context.no_more.is_set()

    def _too_many(self, began: float | None) -> int | None:
        """Return how many messages wait, where these are too many; None: they are not, or nobody knows.

        ``began``: when this rest began, monotonic seconds; the keeper counts more often from then on.
        """
        board, stage = self._context.board, self._context.stage.index
        waiting = board.stage(stage, BACKLOG) - 1
        if waiting <= self._most:
            return None
        now, counted = time.monotonic(), board.stage(stage, BACKLOG_AT) / 1e9
        age = now - (counted if began is None else max(counted, began))
        if age <= _OLD * (board.stage(stage, COUNT_EVERY) / 1e9 if began is None else 1.0):
            return waiting
        if now - self._warned_at >= _WARN_EVERY:
            self._warned_at = now
            log.warning(
                "%s: goes on though %d messages waited at the last count (max_waiting=%d): that was %.0f s ago, and "
                "the keeper has not counted since",
                self._context.stage.name, waiting, self._most, now - counted,
            )  # fmt: skip
        return None
