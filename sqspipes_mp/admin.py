"""Looking at a pipeline's queues and clearing them, from any process that has the engine's definition (caller)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from sqspipes_mp.brokers.base import Broker, Connection, Depth
from sqspipes_mp.errors import QueueMissing
from sqspipes_mp.pipeline import Pipeline, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """One queue's counts; None where it does not exist (yet). Approximate on SQS."""

    name: str
    depth: Depth | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStats:
    """A stage's input queues (highest priority first; none for a source) and its dead-letter queue."""

    name: str
    inputs: tuple[QueueStats, ...]
    dead_letters: QueueStats | None

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


def read_stats(pipeline: Pipeline, broker: Broker) -> PipelineStats:
    """Count every queue of the pipeline."""
    with opened(broker) as connection:
        return PipelineStats(
            domain=pipeline.domain,
            broker=broker.describe(),
            stages=tuple(_stage_stats(connection, stage) for stage in pipeline.stages),
        )


def _stage_stats(connection: Connection, stage: Stage) -> StageStats:
    return StageStats(
        name=stage.name,
        inputs=tuple(_queue_stats(connection, name) for name in stage.inputs),
        dead_letters=None if stage.dead is None else _queue_stats(connection, stage.dead),
    )


def _queue_stats(connection: Connection, name: str) -> QueueStats:
    try:
        return QueueStats(name=name, depth=connection.depth(name))
    except QueueMissing:
        return QueueStats(name=name, depth=None)
