"""What a run did, for its caller (any process)."""

from __future__ import annotations

from dataclasses import dataclass

from sqspipes_mp.plan import RunPlan
from sqspipes_mp.runtimes import duration, percentile
from sqspipes_mp.scoreboard import (
    BUSY_NS,
    DEAD,
    DONE,
    DROPPED,
    FAILED,
    KEEPER_CHARGED,
    KEEPER_DEAD,
    RETRIED,
    Scoreboard,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSummary:
    """One stage's part: messages ``done`` (a source's calls), calls ``failed``, messages ``retried`` and ``dead``,
    outputs ``dropped``; ``busy``: the share of its workers' time (with ``threads``: each thread's) spent in the
    function, 0 to 1; ``p50`` and ``p95``: seconds within which half and 95 % of its calls ended, to within an eighth,
    None before the first.
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


def stage_summaries(plan: RunPlan, board: Scoreboard, seconds: float) -> tuple[StageSummary, ...]:
    """Read each stage's counters; ``seconds``: the time its workers have had."""
    found = []
    for index in plan.selected:
        slots = [slot for slot, seat in enumerate(plan.seats) if seat.stage == index]
        threads = plan.pipeline.stages[index].task.threads

        times = board.run_times(slots)

        def total(field: int, slots: list[int] = slots) -> int:
            return sum(board.get(slot, field) for slot in slots)

        found.append(
            StageSummary(
                name=plan.pipeline.stages[index].name,
                workers=len(slots),
                done=total(DONE),
                failed=total(FAILED) + board.stage(index, KEEPER_CHARGED) + board.stage(index, KEEPER_DEAD),
                retried=total(RETRIED) + board.stage(index, KEEPER_CHARGED),
                dead=total(DEAD) + board.stage(index, KEEPER_DEAD),
                dropped=total(DROPPED),
                busy=min(1.0, total(BUSY_NS) / 1e9 / (seconds * len(slots) * threads)) if seconds > 0 else 0.0,
                p50=percentile(times, 0.5),
                p95=percentile(times, 0.95),
            )
        )
    return tuple(found)
