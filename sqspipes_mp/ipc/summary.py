"""The summary of a run: its stages' counters, for the caller (any process)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from sqspipes_mp.ipc.histogram import duration, percentile
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import (
    BUSY_NS,
    CALL_STARTED,
    CANCELLED,
    DEAD,
    DONE,
    FAILED,
    KEEPER_CANCELLED,
    KEEPER_CHARGED,
    KEEPER_DEAD,
    KEEPER_DONE,
    OUTPUTS_DROPPED,
    RESTING,
    RETRIED,
    RUNNING,
    WAITING,
    WANTED,
    SlotField,
)
from sqspipes_mp.pipeline.plan import RunPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One stage's counters at one moment."""

    #: The stage's.
    name: str
    workers: int
    #: Calls that may run at once.
    room: int
    #: Messages in the input queues that nobody has received; None: not counted.
    waiting: int | None = None
    #: Calls running now.
    running: int = 0
    #: Messages done so far; a source's calls.
    done: int = 0
    #: Calls that failed so far.
    failed: int = 0
    #: Messages dead-lettered so far.
    dead: int = 0
    #: Seconds in the function so far, of all workers together.
    busy: float = 0.0
    #: Whether the stage is a source that rests (``max_waiting``).
    resting: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A reading with the rates since an earlier one."""

    reading: Reading
    #: Messages done per second.
    per_second: float
    #: Share of the workers' time spent in the function, 0 to 1.
    busy: float
    #: Seconds until all waiting messages are done at this pace; None: not known.
    eta: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSummary:
    """One stage's part of a run."""

    #: The stage's.
    name: str
    workers: int
    #: Messages done; a source's calls.
    done: int
    #: Calls that failed.
    failed: int
    #: Messages made visible again after a failure.
    retried: int
    #: Messages dead-lettered.
    dead: int
    #: Outputs dropped (None, EmptyTaskOutput), and messages for which ``decode`` gave None.
    dropped: int
    #: Share of the workers' time (with ``threads``: of each thread's) spent in the function, 0 to 1.
    busy: float
    #: Seconds within which half of the calls ended, rounded up by a quarter at most; None before the first.
    p50: float | None = None
    #: Seconds within which 95 % of the calls ended, rounded up by a quarter at most; None before the first.
    p95: float | None = None
    #: Calls running now.
    running: int = 0
    #: Messages done per second: lately, and in the whole run once it has ended.
    per_second: float = 0.0

    def __str__(self) -> str:
        counts = [f"{self.done:,} done"]
        counts += [
            f"{number:,} {name}"
            for name, number in (("failed", self.failed), ("retried", self.retried), ("dead", self.dead))
            if number
        ]
        if self.p50 is not None:
            counts += [f"busy {self.busy:.0%}", f"p50 {duration(self.p50)}", f"p95 {duration(self.p95)}"]
        return f"{self.name} {', '.join(counts)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run's reason to end, duration and stages."""

    #: "drained", "ended", "stopped", "closed", "failed", or the name of the signal.
    reason: str
    #: The run's duration.
    seconds: float
    #: In the pipeline's order.
    stages: tuple[StageSummary, ...]

    def __getitem__(self, name: str) -> StageSummary:
        """Return one stage's part by its name. Raises ``KeyError``."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    if not TYPE_CHECKING:
        # Type checkers refuse the loop by themselves, as long as there is no such method.

        def __iter__(self) -> NoReturn:
            """Refuse: the loop was meant for the outputs."""
            raise TypeError(
                "a Summary is not iterable: run() returns it at the end of the run. For the outputs of the last task "
                "write run(iterate=True), for one stage's figures summary[name] or summary.stages"
            )

    def __str__(self) -> str:
        return f"{self.reason} after {self.seconds:.1f} s: {'; '.join(map(str, self.stages))}"

    @property
    def dead(self) -> int:
        """Messages dead-lettered, of all stages together."""
        return sum(stage.dead for stage in self.stages)


def summarize(plan: RunPlan, board: Scoreboard, reason: str, seconds: float) -> Summary:
    """Read the summary of a run off the scoreboard; ``seconds``: the run's duration."""
    return Summary(reason=reason, seconds=seconds, stages=stage_summaries(plan, board, seconds))


def stage_summaries(
    plan: RunPlan, board: Scoreboard, seconds: float, rows: Sequence[Row] = ()
) -> tuple[StageSummary, ...]:
    """Read each stage's summary off the scoreboard.

    Args:
        plan: the run's.
        board: the run's.
        seconds: since the run's begin.
        rows: the latest rates of each stage, while the run goes on.
    """
    found = []
    for order, index in enumerate(plan.selected):
        slots = board.used(index)
        read = rows[order].reading if rows else _reading(plan, board, index)
        times = board.run_times(slots)
        found.append(
            StageSummary(
                name=read.name,
                workers=read.workers,
                done=read.done,
                failed=read.failed,
                retried=_total(board, slots, RETRIED) + board.stage(index, KEEPER_CHARGED),
                dead=read.dead,
                dropped=_total(board, slots, OUTPUTS_DROPPED),
                busy=min(1.0, read.busy / (seconds * read.room)) if seconds > 0 else 0.0,
                p50=percentile(times, 0.5),
                p95=percentile(times, 0.95),
                running=read.running if rows else 0,
                per_second=rows[order].per_second if rows else read.done / seconds if seconds > 0 else 0.0,
            )
        )
    return tuple(found)


def readings(plan: RunPlan, board: Scoreboard) -> tuple[Reading, ...]:
    """Read the counters of each stage that is run here."""
    return tuple(_reading(plan, board, index) for index in plan.selected)


def _reading(plan: RunPlan, board: Scoreboard, index: int) -> Reading:
    slots, workers = board.used(index), board.stage(index, WANTED)
    waiting = board.stage(index, WAITING)
    return Reading(
        name=plan.pipeline.stages[index].name,
        workers=workers,
        room=workers * plan.pipeline.stages[index].task.threads,
        waiting=waiting - 1 if waiting else None,
        running=sum(max(1, board.get(slot, RUNNING)) for slot in slots if board.get(slot, CALL_STARTED)),
        done=_total(board, slots, DONE) + board.stage(index, KEEPER_DONE),
        failed=_total(board, slots, FAILED) + board.stage(index, KEEPER_CHARGED) + board.stage(index, KEEPER_DEAD),
        dead=sum(_total(board, slots, field) for field in (DEAD, CANCELLED))
        + sum(board.stage(index, field) for field in (KEEPER_DEAD, KEEPER_CANCELLED)),
        busy=_total(board, slots, BUSY_NS) / 1e9,
        resting=bool(board.stage(index, RESTING)),
    )


def _total(board: Scoreboard, slots: Sequence[int], field: SlotField) -> int:
    return sum(board.get(slot, field) for slot in slots)
