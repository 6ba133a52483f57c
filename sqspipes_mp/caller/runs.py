"""The runs of an engine in this process: started, stopped, and their figures read (caller)."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.caller.order_line import OrderLine
from sqspipes_mp.caller.progress.progress import Progress, choose
from sqspipes_mp.caller.progress.rates import Pace
from sqspipes_mp.caller.results import SLACK, Results, Start
from sqspipes_mp.errors import ConfigError, OrderRefused
from sqspipes_mp.ipc.log_line import LogReader
from sqspipes_mp.ipc.outcome import Outcome
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.summary import StageSummary, readings, stage_summaries
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.supervisor.run import choose_context, new_board, release, supervise
from sqspipes_mp.supervisor.stop_requests import Wakeup


class Runs:
    """Starts an engine's runs, stops them, and reads the figures of the latest one."""

    def __init__(self) -> None:
        self._stoppers: list[Callable[[], None]] = []
        #: Weak: losing the caller's last reference is what closes an iteration.
        self._iterations: list[weakref.ref[Results[Any]]] = []
        self._watch: _Watch | None = None
        self._last: tuple[StageSummary, ...] = ()
        #: The lines to the runs under way.
        self._lines: list[OrderLine] = []

    def check_beside(self, plan: RunPlan) -> None:
        """Raise ``ConfigError`` where an open iterator runs one of the plan's stages.

        The iterator takes the stage's messages and goes on only while it is read: the new run would wait for ever.
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
        """Supervise in this process until the run ends; ``progress``: as of ``Engine.run``."""
        from sqspipes_mp.caller.mains import MAINS  # noqa: PLC0415  (only a run needs the children's code)

        context = choose_context(plan, broker)
        plan, logs = _with_logs(plan, context)
        wakeup = Wakeup()
        self._stoppers.append(wakeup.stop)
        board = new_board(plan)
        plan, shown = _shown(plan, board, progress)
        watch = self._begin(plan, board)
        line = OrderLine(plan.selected, here=True)
        self._lines.append(line)
        try:
            with _drained_at_exit(wakeup, plan.settings.grace):
                outcome = supervise(
                    plan, broker, board, MAINS, context, wakeup, progress=shown, orders=line.theirs
                )  # fmt: skip
        finally:
            self._hang_up(line)
            line.theirs.close()
            shown.close()
            release(context)
            logs.close()
            self._end(watch)
            self._stoppers.remove(wakeup.stop)
            wakeup.close()
        wakeup.hand_on(outcome.signal)
        return outcome

    def iterate(
        self,
        plan: RunPlan,
        broker: Broker,
        owner: object,
        make: Callable[[Start], Results[Any]] = Results,
        *,
        progress: bool | None = None,
        total: int | None = None,
    ) -> Results[Any]:
        """Start a run whose supervisor is a process of its own; return the iterator over its results.

        Args:
            plan: with a sink.
            broker: the queues' service.
            owner: lives as long as the iterator.
            make: builds the iterator.
            progress: as of ``Engine.run``.
            total: values that the first stage will get; None: unknown.
        """
        from sqspipes_mp.caller.mains import MAINS  # noqa: PLC0415  (only a run needs the children's code)

        stoppers = self._stoppers
        context = choose_context(plan, broker)
        plan, logs = _with_logs(plan, context)
        board = new_board(plan)
        plan, shown = _shown(plan, board, progress, total)
        watch = self._begin(plan, board)
        line = OrderLine(plan.selected, here=False)
        self._lines.append(line)

        def ended() -> None:
            self._hang_up(line)
            shown.close()
            release(context)
            logs.close()
            stoppers[:] = [stop for stop in stoppers if stop is not stopper]
            self._end(watch)

        try:
            iteration = make(
                Start(
                    plan=plan, broker=broker, board=board, mains=MAINS, context=context,
                    ended=ended, owner=owner, progress=shown, orders=line.theirs,
                )
            )  # fmt: skip
        except BaseException:
            self._hang_up(line)
            shown.close()
            release(context)
            logs.close()
            self._end(watch)
            raise
        finally:
            # The supervisor has it.
            line.theirs.close()
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
        """Drain every run."""
        for stopper in list(self._stoppers):
            stopper()

    def order(self, order: Mapping[str, object], stage: int | None = None) -> None:
        """Give an order to the runs under way that have ``stage``; None: to the first that takes it.

        Raises ``OrderRefused``.
        """
        lines = [line for line in self._lines if stage is None or stage in line.stages]
        if not lines:
            raise OrderRefused(
                "this process has no run of this engine under way" if stage is None else
                "this process has no run of this engine under way that has this task"
            )  # fmt: skip
        for line in lines:
            try:
                line.ask(order)
            except OrderRefused:
                if stage is not None or line is lines[-1]:
                    raise
            else:
                if stage is None:
                    return

    def _hang_up(self, line: OrderLine) -> None:
        line.close()
        self._lines.remove(line)

    def stages(self) -> tuple[StageSummary, ...]:
        """Return the latest run's figures by stage; empty before the first run."""
        if self._watch is None:
            return self._last
        watch, now = self._watch, time.monotonic()
        try:
            rows = watch.pace.observe(now, readings(watch.plan, watch.board))
            return stage_summaries(watch.plan, watch.board, now - watch.began, rows)
        except ValueError:
            if self._watch is watch:
                raise
            # The run has ended in another thread meanwhile, and its board is closed.
            return self._last

    def _begin(self, plan: RunPlan, board: Scoreboard) -> _Watch:
        now = time.monotonic()
        self._watch = _Watch(plan, board, now, Pace(now))
        return self._watch

    def _end(self, watch: _Watch) -> None:
        """Keep the last figures of a run and close its board, which the run's exception may refer to for long."""
        try:
            if self._watch is watch:
                self._last = stage_summaries(watch.plan, watch.board, time.monotonic() - watch.began)
                self._watch = None
        finally:
            watch.board.close()


@contextlib.contextmanager
def _drained_at_exit(wakeup: Wakeup, grace: float) -> Iterator[None]:
    """Drain a run that a daemon thread makes when its program ends, which waits for no such thread.

    multiprocessing's own exit handler would wait for workers that nobody supervises any more.
    """
    if not threading.current_thread().daemon:
        yield
        return
    over, owner = threading.Event(), os.getpid()

    def drain() -> None:
        if os.getpid() == owner:
            wakeup.stop()
            over.wait(grace + SLACK)

    atexit.register(drain)
    try:
        yield
    finally:
        over.set()
        # At the exit itself: the handlers run already, and this one is waiting.
        atexit.unregister(drain)


@dataclass(frozen=True, slots=True, eq=False)
class _Watch:
    """A run under way."""

    plan: RunPlan
    board: Scoreboard
    #: Monotonic seconds.
    began: float
    pace: Pace


def _with_logs(plan: RunPlan, context: Any) -> tuple[RunPlan, LogReader | contextlib.ExitStack[None]]:
    """Return the plan with a line to this program's log where the children are fresh processes, and the line's end."""
    if context.get_start_method() == "fork":
        return plan, contextlib.ExitStack()
    reader = LogReader()
    return replace(plan, logs=reader.line), reader


def _stages_of(weak: weakref.ref[Results[Any]]) -> set[int]:
    """Return the stages of an open iteration; none where it is over."""
    # A function of its own: a frame of an error's traceback would keep the iteration alive.
    iteration = weak()
    return set(iteration.stages) if iteration is not None and iteration.open else set()


def _shown(plan: RunPlan, board: Scoreboard, wanted: bool | None, total: int | None = None) -> tuple[RunPlan, Progress]:
    """Return the run's progress display, and the plan with the counts that the display needs."""
    drawing = choose(wanted)
    plan = replace(plan, count_every=drawing.count_every)
    return plan, Progress(drawing, partial(readings, plan, board), total)
