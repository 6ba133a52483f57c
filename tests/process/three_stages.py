"""The pipeline of which the tests of threads and batches look at the middle."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqspipes_mp import Engine, Task
from tests.gates import engine_at, feed


def source() -> Iterator[int]:
    yield from ()


def sink(value: object) -> object:
    return value


def stages(db: Path, work: Task, count: int, **settings: Any) -> Engine:
    """Make the engine, with values 0 to ``count`` - 1 waiting for ``work``."""
    engine = engine_at(db, [source, work, sink], **settings)
    feed(engine, "work", range(count))
    return engine
