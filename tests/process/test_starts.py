"""The system lets a process not start (its limits are reached): tried again, while the others go on."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import Engine, Task
from sqspipes_mp.errors import StartRefused
from sqspipes_mp.supervisor import restart
from tests.gates import Log, charges, drain, engine_at, feed, values, waiting

REAL = os.fork


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Have the kernel refuse some forks, by their number (root, which tests may run as, has no limit of processes)."""

    def refusing(refused: Callable[[int], bool]) -> list[int]:
        tried: list[int] = []

        def fork() -> int:
            tried.append(len(tried))
            if refused(tried[-1]):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return REAL()

        monkeypatch.setattr(os, "fork", fork)
        return tried

    return refusing


def source():
    yield from ()


def work(value, log: Log):
    log.note(os.getpid())
    if value == "die":
        os._exit(1)


def engine_of(db: Path, log: Log, **settings: Any) -> Engine:
    return engine_at(db, [source, Task(work, workers=2, args=(log,), max_attempts=1)], start_method="fork", **settings)


def test_a_fork_that_fails_is_tried_again_while_the_other_worker_works(db: Path, log: Log, forks) -> None:
    engine = engine_of(db, log)
    feed(engine, "work", ["die", *range(20)])
    # The keeper's first; then one worker's first, and what replaces a dead one.
    tried = forks(lambda number: number in {0, 2, 4})
    summary = drain(engine, "work")
    assert summary["work"].done == 20
    assert len(tried) >= 4
    assert waiting(engine, "work") == (0, 0, 0)


def test_where_no_worker_can_be_started_the_engine_ends_with_the_cure(
    db: Path, log: Log, forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "START_PATIENCE", 0.4)
    engine = engine_of(db, log)
    feed(engine, "work", [1, 2, 3])
    tried = forks(lambda number: number > 0)
    with pytest.raises(StartRefused, match=r"work\[\d\] could not be started .*Resource temporarily.*ulimit -u"):
        drain(engine, "work")
    assert len(tried) >= 3
    assert values(engine, "work") == [1, 2, 3]
    assert waiting(engine, "work") == (3, 0, 0)
    assert charges(engine) == [0, 0, 0]


def test_where_no_keeper_can_be_started_the_engine_ends_too(
    db: Path, log: Log, forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "START_PATIENCE", 0.4)
    engine = engine_of(db, log)
    feed(engine, "work", [1])
    forks(lambda number: True)
    with pytest.raises(StartRefused, match="the keeper could not be started"):
        drain(engine, "work")
