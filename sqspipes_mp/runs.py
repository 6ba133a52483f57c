"""The runs an engine has going in this process: how each is started, and how all of them are stopped (caller)."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.iteration import Iteration
from sqspipes_mp.plan import RunPlan
from sqspipes_mp.scoreboard import Scoreboard
from sqspipes_mp.summary import StageSummary, stage_summaries
from sqspipes_mp.supervisor.outcome import Outcome
from sqspipes_mp.supervisor.run import choose_context, new_board, supervise
from sqspipes_mp.supervisor.signals import Wakeup


class Runs:
    """Starts runs and remembers how to stop them; knows what the latest one is doing, or did."""

    def __init__(self) -> None:
        self._stoppers: list[Callable[[], None]] = []
        self._watch: tuple[RunPlan, Scoreboard, float] | None = None
        self._last: tuple[StageSummary, ...] = ()

    def run(self, plan: RunPlan, broker: Broker) -> Outcome:
        """Supervise here until the run ends."""
        from sqspipes_mp.children import MAINS  # noqa: PLC0415  (only a run needs what runs in children)

        context = choose_context(plan, broker)
        wakeup = Wakeup()
        self._stoppers.append(wakeup.stop)
        board = new_board(plan)
        watch = self._begin(plan, board)
        try:
            return supervise(plan, broker, board, MAINS, context, wakeup)
        finally:
            self._end(watch)
            self._stoppers.remove(wakeup.stop)
            wakeup.close()

    def iterate(
        self, plan: RunPlan, broker: Broker, owner: object, make: Callable[..., Iteration] = Iteration
    ) -> Iteration:
        """Supervise in a process of its own; ``owner`` lives as long as the iteration does, which ``make`` makes."""
        from sqspipes_mp.children import MAINS  # noqa: PLC0415  (only a run needs what runs in children)

        stoppers = self._stoppers
        context = choose_context(plan, broker)
        board = new_board(plan)
        watch = self._begin(plan, board)

        def ended() -> None:
            stoppers[:] = [stop for stop in stoppers if stop is not stopper]
            self._end(watch)

        try:
            iteration = make(plan, broker, board, MAINS, context, ended, owner)
        except BaseException:
            self._end(watch)
            raise
        finally:
            # The supervisor has its own descriptor; looking needs only the mapping.
            board.close()
        weak = weakref.ref(iteration)

        def stopper() -> None:
            # Not a strong reference: losing the caller's last one is what closes an iteration.
            alive = weak()
            if alive is not None:
                alive.stop()

        stoppers.append(stopper)
        return iteration

    def stop(self) -> None:
        """Drain all of them."""
        for stopper in list(self._stoppers):
            stopper()

    def stages(self) -> tuple[StageSummary, ...]:
        """Return what the latest run has done so far; empty before the first."""
        if self._watch is None:
            return self._last
        plan, board, began = self._watch
        return stage_summaries(plan, board, time.monotonic() - began)

    def _begin(self, plan: RunPlan, board: Scoreboard) -> tuple[RunPlan, Scoreboard, float]:
        self._watch = (plan, board, time.monotonic())
        return self._watch

    def _end(self, watch: tuple[RunPlan, Scoreboard, float]) -> None:
        if self._watch is watch:
            self._last = self.stages()
            self._watch = None
