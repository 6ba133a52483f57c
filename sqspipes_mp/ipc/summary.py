"""What a run did, for its caller (any process)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqspipes_mp.ipc.histogram import duration, percentile
from sqspipes_mp.ipc.scoreboard import (
    BUSY_NS,
    CALL_STARTED,
    DEAD,
    DONE,
    DROPPED,
    FAILED,
    KEEPER_CHARGED,
    KEEPER_DEAD,
    RETRIED,
    RUNNING,
    WAITING,
    Scoreboard,
)
from sqspipes_mp.pipeline.plan import RunPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one stage's counters say at one moment.

    ``room``: calls that may run at once; ``waiting``: messages in its input queues that nobody has received, None where
    that was not counted; ``running``: calls; ``busy``: seconds spent in the function by all its workers so far.
    """

    name: str
    workers: int
    room: int
    waiting: int | None = None
    running: int = 0
    done: int = 0
    failed: int = 0
    dead: int = 0
    busy: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A reading with what it takes two to know: ``per_second`` (messages done), ``busy`` (share of the workers' time,
    0 to 1), ``eta`` (seconds until what is left is through at this pace; None: nobody can tell).
    """

    reading: Reading
    per_second: float
    busy: float
    eta: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSummary:
    """One stage's part: messages ``done`` (a source's calls), calls ``failed``, messages ``retried`` and ``dead``,
    outputs ``dropped`` (and messages for which ``decode`` gave None); ``busy``: the share of its workers' time (with
    ``threads``: each thread's) spent in the function, 0 to 1; ``p50`` and ``p95``: seconds within which half and 95 %
    of its calls ended, rounded up by at most a quarter, None before the first; ``running``: calls just now;
    ``per_second``: messages done per second lately, once the run has ended in all of it.
    """

    name: str
    workers: int
    done: int
    failed: int
    retried: int
    dead: int
    dropped: int
    busy: float
    p50: float | None = None
    p95: float | None = None
    running: int = 0
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
    """``reason``: "drained", "ended", "stopped", "closed" or the name of the signal; ``seconds``: how long it ran."""

    reason: str
    seconds: float
    stages: tuple[StageSummary, ...]

    def __getitem__(self, name: str) -> StageSummary:
        """Return one stage's part by its name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def __str__(self) -> str:
        return f"{self.reason} after {self.seconds:.1f} s: {'; '.join(map(str, self.stages))}"

    @property
    def dead(self) -> int:
        """Messages dead-lettered in all stages."""
        return sum(stage.dead for stage in self.stages)


def summarize(plan: RunPlan, board: Scoreboard, reason: str, seconds: float) -> Summary:
    """Read the scoreboard."""
    return Summary(reason=reason, seconds=seconds, stages=stage_summaries(plan, board, seconds))


def stage_summaries(
    plan: RunPlan, board: Scoreboard, seconds: float, rows: Sequence[Row] = ()
) -> tuple[StageSummary, ...]:
    """Read each stage's counters; ``seconds``: the time its workers have had; ``rows``: its pace while it runs."""
    found = []
    for place, index in enumerate(plan.selected):
        slots = _slots(plan, index)
        read = rows[place].reading if rows else _reading(plan, board, index)
        times = board.run_times(slots)
        found.append(
            StageSummary(
                name=read.name,
                workers=read.workers,
                done=read.done,
                failed=read.failed,
                retried=_total(board, slots, RETRIED) + board.stage(index, KEEPER_CHARGED),
                dead=read.dead,
                dropped=_total(board, slots, DROPPED),
                busy=min(1.0, read.busy / (seconds * read.room)) if seconds > 0 else 0.0,
                p50=percentile(times, 0.5),
                p95=percentile(times, 0.95),
                running=read.running if rows else 0,
                per_second=rows[place].per_second if rows else read.done / seconds if seconds > 0 else 0.0,
            )
        )
    return tuple(found)


def readings(plan: RunPlan, board: Scoreboard) -> tuple[Reading, ...]:
    """Read the counters that progress is made of, of each stage run here."""
    return tuple(_reading(plan, board, index) for index in plan.selected)


def _reading(plan: RunPlan, board: Scoreboard, index: int) -> Reading:
    slots = _slots(plan, index)
    waiting = board.stage(index, WAITING)
    return Reading(
        name=plan.pipeline.stages[index].name,
        workers=len(slots),
        room=len(slots) * plan.pipeline.stages[index].task.threads,
        waiting=waiting - 1 if waiting else None,
        running=sum(max(1, board.get(slot, RUNNING)) for slot in slots if board.get(slot, CALL_STARTED)),
        done=_total(board, slots, DONE),
        failed=_total(board, slots, FAILED) + board.stage(index, KEEPER_CHARGED) + board.stage(index, KEEPER_DEAD),
        dead=_total(board, slots, DEAD) + board.stage(index, KEEPER_DEAD),
        busy=_total(board, slots, BUSY_NS) / 1e9,
    )


def _slots(plan: RunPlan, stage: int) -> list[int]:
    return [slot for slot, seat in enumerate(plan.seats) if seat.stage == stage]


def _total(board: Scoreboard, slots: Sequence[int], field: int) -> int:
    return sum(board.get(slot, field) for slot in slots)
