"""Counts of a pipeline's queues, from any process that has the engine's definition (caller)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from sqspipes_mp.brokers.base import Broker, Connection, Depth
from sqspipes_mp.caller.progress.rates import eta
from sqspipes_mp.errors import QueueMissing
from sqspipes_mp.ipc.summary import StageSummary
from sqspipes_mp.pipeline.stages import Pipeline, Stage

#: Seconds that counting the messages left in a file may take.
_PATIENCE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """One queue's counts; None where it does not exist (yet). Approximate on SQS."""

    name: str
    depth: Depth | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStats:
    """A stage's queues, and its part in the latest run of this very engine object. Runs elsewhere are not seen."""

    name: str
    #: Input queues, highest priority first; none for a source.
    inputs: tuple[QueueStats, ...]
    #: Dead-letter queue; None for a source.
    dead_letters: QueueStats | None
    #: The stage's part in the run under way, or in the last one; None where it has had none.
    run: StageSummary | None = None
    #: Worker processes of that run.
    workers: int = 0
    #: Messages (a source: calls) that it completed.
    done: int = 0
    #: Calls that failed in it.
    failed: int = 0
    #: Messages that it made visible again after a failure.
    retried: int = 0
    #: Share of its workers' time spent in the function, 0 to 1.
    busy: float = 0.0
    #: Seconds within which half of its calls ended; None before the first.
    p50: float | None = None
    #: Seconds within which 95 % of its calls ended; None before the first.
    p95: float | None = None
    #: Calls running just now.
    running: int = 0
    #: Messages done per second: in about the last 10 s, of a run that has ended in all of it.
    per_second: float = 0.0

    @property
    def eta(self) -> float | None:
        """Seconds until the waiting messages are done at that pace; None: never, or unknown (a source)."""
        return eta(self.visible + self.delayed if self.inputs else None, self.per_second)

    @property
    def visible(self) -> int:
        """Messages waiting."""
        return sum(queue.depth.visible for queue in self.inputs if queue.depth is not None)

    @property
    def in_flight(self) -> int:
        """Messages received and not yet deleted or released."""
        return sum(queue.depth.in_flight for queue in self.inputs if queue.depth is not None)

    @property
    def delayed(self) -> int:
        """Messages not visible yet."""
        return sum(queue.depth.delayed for queue in self.inputs if queue.depth is not None)

    @property
    def dead(self) -> int:
        """Messages in the dead-letter queue."""
        depth = self.dead_letters.depth if self.dead_letters is not None else None
        return 0 if depth is None else depth.visible + depth.in_flight + depth.delayed


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStats:
    """Counts of every queue of a pipeline, by stage."""

    domain: str
    broker: str
    stages: tuple[StageStats, ...]

    def __getitem__(self, name: str) -> StageStats:
        """Return one stage's counts by its name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)


@contextmanager
def opened(broker: Broker) -> Iterator[Connection]:
    """Open a connection for the block only, so that nothing is open when ``run()`` forks; it is attended."""
    broker.check()
    with closing(broker.open(attended=True)) as connection:
        yield connection


def read_stats(
    pipeline: Pipeline,
    broker: Broker,
    connection: Connection,
    running: Sequence[StageSummary] = (),
    *,
    implied: bool = False,
) -> PipelineStats:
    """Count every queue of the pipeline.

    Args:
        pipeline: with every queue it can have.
        broker: where they are.
        connection: to it.
        running: the stages' parts in this engine's latest run.
        implied: the first task is a source; its queues, which only ``map`` makes, are left out where they are missing.
    """
    runs = {stage.name: stage for stage in running}
    return PipelineStats(
        domain=pipeline.domain,
        broker=broker.describe(),
        stages=tuple(
            _stage_stats(connection, stage, runs.get(stage.name), implied=implied and stage.is_first)
            for stage in pipeline.stages
        ),
    )


def _stage_stats(connection: Connection, stage: Stage, run: StageSummary | None, *, implied: bool) -> StageStats:
    inputs = tuple(_queue_stats(connection, name) for name in stage.inputs)
    dead = None if stage.dead is None else _queue_stats(connection, stage.dead)
    if implied:
        inputs = tuple(queue for queue in inputs if queue.depth is not None)
        dead = None if dead is None or dead.depth is None else dead
    if run is None:
        return StageStats(name=stage.name, inputs=inputs, dead_letters=dead)
    return StageStats(
        name=stage.name, inputs=inputs, dead_letters=dead, run=run,
        workers=run.workers, done=run.done, failed=run.failed, retried=run.retried, busy=run.busy,
        p50=run.p50, p95=run.p95, running=run.running, per_second=run.per_second,
    )  # fmt: skip


def existing(connection: Connection, names: Iterable[str]) -> list[str]:
    """Return the queues that exist, of ``names``."""
    return [name for name in names if _queue_stats(connection, name).depth is not None]


def total(broker: Broker, names: Iterable[str]) -> int:
    """Return the number of messages in queues of a file; 0 before it was made."""
    if not broker.exists():
        return 0
    with closing(broker.open(patience=_PATIENCE)) as connection:
        depths = [
            queue.depth for queue in (_queue_stats(connection, name) for name in names) if queue.depth is not None
        ]
    return sum(depth.visible + depth.in_flight + depth.delayed for depth in depths)


def _queue_stats(connection: Connection, name: str) -> QueueStats:
    try:
        return QueueStats(name=name, depth=connection.depth(name))
    except QueueMissing:
        return QueueStats(name=name, depth=None)
