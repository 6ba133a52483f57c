"""Looking at a pipeline's queues and clearing them, from any process that has the engine's definition (caller)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from sqspipes_mp.brokers.base import Broker, Connection, Depth
from sqspipes_mp.caller.progress.rates import eta
from sqspipes_mp.errors import QueueMissing
from sqspipes_mp.ipc.summary import StageSummary
from sqspipes_mp.pipeline.stages import Pipeline, Stage

#: Seconds that counting what is left in a file may take.
_PATIENCE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """One queue's counts; None where it does not exist (yet). Approximate on SQS."""

    name: str
    depth: Depth | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStats:
    """A stage's input queues (highest priority first; none for a source) and its dead-letter queue.

    ``run``: what the stage does in the run that this very engine object has going, or did in its last one; None where
    it has run none of it. Runs elsewhere are not seen.
    """

    name: str
    inputs: tuple[QueueStats, ...]
    dead_letters: QueueStats | None
    run: StageSummary | None = None

    @property
    def workers(self) -> int:
        """Worker processes here."""
        return 0 if self.run is None else self.run.workers

    @property
    def done(self) -> int:
        """Messages (a source: calls) completed here."""
        return 0 if self.run is None else self.run.done

    @property
    def failed(self) -> int:
        """Calls that failed here."""
        return 0 if self.run is None else self.run.failed

    @property
    def retried(self) -> int:
        """Messages made visible again here after a failure."""
        return 0 if self.run is None else self.run.retried

    @property
    def busy(self) -> float:
        """Share of its workers' time spent in the function, 0 to 1."""
        return 0.0 if self.run is None else self.run.busy

    @property
    def p50(self) -> float | None:
        """Seconds within which half of its calls ended; None before the first."""
        return None if self.run is None else self.run.p50

    @property
    def p95(self) -> float | None:
        """Seconds within which 95 % of its calls ended; None before the first."""
        return None if self.run is None else self.run.p95

    @property
    def running(self) -> int:
        """Calls running here just now."""
        return 0 if self.run is None else self.run.running

    @property
    def per_second(self) -> float:
        """Messages done here per second: in the last 10 s or so, of a run that has ended in all of it."""
        return 0.0 if self.run is None else self.run.per_second

    @property
    def eta(self) -> float | None:
        """Seconds until what waits is through at that pace; None: never, or nobody can tell (a source)."""
        return eta(self.visible + self.delayed if self.inputs else None, self.per_second)

    @property
    def visible(self) -> int:
        """Messages waiting."""
        return sum(queue.depth.visible for queue in self.inputs if queue.depth is not None)

    @property
    def in_flight(self) -> int:
        """Messages received and not yet deleted or given back."""
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
    """Open a connection for the block only, so that nothing is open when ``run()`` forks."""
    broker.check()
    with closing(broker.open()) as connection:
        yield connection


def read_stats(
    pipeline: Pipeline, broker: Broker, running: Sequence[StageSummary] = (), *, implied: bool = False
) -> PipelineStats:
    """Count every queue of the pipeline; ``running``: what a run of it does.

    ``implied``: the first task is a source that only ``map`` feeds, so its queues are told of only where they exist.
    """
    runs = {stage.name: stage for stage in running}
    with opened(broker) as connection:
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
    return StageStats(name=stage.name, inputs=inputs, dead_letters=dead, run=run)


def existing(connection: Connection, names: Iterable[str]) -> list[str]:
    """Return those of the queues that exist."""
    return [name for name in names if _queue_stats(connection, name).depth is not None]


def total(broker: Broker, names: Iterable[str]) -> int:
    """Return how many messages are in the queues of a file, if it was made."""
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
