"""The runs an engine has going in this process: how each is started, and how all of them are stopped (caller)."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.caller.progress.progress import Progress, choose
from sqspipes_mp.caller.progress.rates import Pace
from sqspipes_mp.caller.results import Results
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.ipc.outcome import Outcome
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.summary import StageSummary, readings, stage_summaries
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.supervisor.requests import Wakeup
from sqspipes_mp.supervisor.run import choose_context, new_board, supervise


class Runs:
    """Starts runs and remembers how to stop them; knows what the latest one is doing, or did."""

    def __init__(self) -> None:
        self._stoppers: list[Callable[[], None]] = []
        #: Weak: losing the caller's last reference is what closes an iteration.
        self._iterations: list[weakref.ref[Results[Any]]] = []
        self._watch: _Watch | None = None
        self._last: tuple[StageSummary, ...] = ()

    def check_beside(self, plan: RunPlan) -> None:
        """Raise ``ConfigError`` where an iterator that is still open runs one of the plan's stages.

        It takes their messages, and goes on only while it is read: the new run would wait for them for ever.
        """
        self._iterations = [weak for weak in self._iterations if _stages_of(weak)]
        for weak in self._iterations:
            shared = set(plan.selected) & _stages_of(weak)
            if shared:
                raise ConfigError(
                    "run, map",
                    plan.pipeline.stages[min(shared)].name,
                    "tasks that no open iterator of this engine runs",
                    "Close that iterator first: leave its with block, call its close(), or read it to its end",
                )

    def run(self, plan: RunPlan, broker: Broker, progress: bool | None = None) -> Outcome:
        """Supervise here until the run ends; ``progress``: as of ``Engine.run``."""
        from sqspipes_mp.caller.mains import MAINS  # noqa: PLC0415  (only a run needs what runs in children)

        context = choose_context(plan, broker)
        wakeup = Wakeup()
        self._stoppers.append(wakeup.stop)
        board = new_board(plan)
        plan, shown = _shown(plan, board, progress)
        watch = self._begin(plan, board)
        try:
            return supervise(plan, broker, board, MAINS, context, wakeup, progress=shown)
        finally:
            shown.close()
            self._end(watch)
            self._stoppers.remove(wakeup.stop)
            wakeup.close()

    def iterate(
        self,
        plan: RunPlan,
        broker: Broker,
        owner: object,
        make: Callable[..., Results[Any]] = Results,
        *,
        progress: bool | None = None,
        total: int | None = None,
    ) -> Results[Any]:
        """Supervise in a process of its own; ``owner`` lives as long as the iteration does, which ``make`` makes.

        ``total``: values that the first stage will get, where that is known.
        """
        from sqspipes_mp.caller.mains import MAINS  # noqa: PLC0415  (only a run needs what runs in children)

        stoppers = self._stoppers
        context = choose_context(plan, broker)
        board = new_board(plan)
        plan, shown = _shown(plan, board, progress, total)
        watch = self._begin(plan, board)

        def ended() -> None:
            shown.close()
            stoppers[:] = [stop for stop in stoppers if stop is not stopper]
            self._end(watch)

        try:
            iteration = make(plan, broker, board, MAINS, context, ended, owner, shown)
        except BaseException:
            shown.close()
            self._end(watch)
            raise
        weak = weakref.ref(iteration)

        def stopper() -> None:
            # Not a strong reference: losing the caller's last one is what closes an iteration.
            alive = weak()
            if alive is not None:
                alive.stop()

        stoppers.append(stopper)
        self._iterations.append(weak)
        return iteration

    def stop(self) -> None:
        """Drain all of them."""
        for stopper in list(self._stoppers):
            stopper()

    def stages(self) -> tuple[StageSummary, ...]:
        """Return what the latest run has done so far; empty before the first."""
        if self._watch is None:
            return self._last
        watch, now = self._watch, time.monotonic()
        try:
            rows = watch.pace.observe(now, readings(watch.plan, watch.board))
            return stage_summaries(watch.plan, watch.board, now - watch.began, rows)
        except ValueError:
            if self._watch is watch:
                raise
            # It ended in another thread meanwhile, and its board is closed.
            return self._last

    def _begin(self, plan: RunPlan, board: Scoreboard) -> _Watch:
        now = time.monotonic()
        self._watch = _Watch(plan, board, now, Pace(now))
        return self._watch

    def _end(self, watch: _Watch) -> None:
        """Keep the last figures of a run, and close its board: the error it ended with may hold that for long."""
        try:
            if self._watch is watch:
                self._last = stage_summaries(watch.plan, watch.board, time.monotonic() - watch.began)
                self._watch = None
        finally:
            watch.board.close()


@dataclass(frozen=True, slots=True, eq=False)
class _Watch:
    """A run that goes on: what it does, since when, and how fast."""

    plan: RunPlan
    board: Scoreboard
    began: float
    pace: Pace


def _stages_of(weak: weakref.ref[Results[Any]]) -> set[int]:
    """Return what an iteration runs; nothing where it is over. No frame of an error's traceback may keep it alive."""
    iteration = weak()
    return set(iteration.stages) if iteration is not None and iteration.open else set()


def _shown(plan: RunPlan, board: Scoreboard, wanted: bool | None, total: int | None = None) -> tuple[RunPlan, Progress]:
    """Return how the run's progress is shown, and the plan that has counted what it needs."""
    drawing = choose(wanted)
    plan = replace(plan, count_every=drawing.count_every)
    return plan, Progress(drawing, partial(readings, plan, board), total)
