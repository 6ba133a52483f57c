"""Messages that sqspipes sent: all of them in one FIFO group, so one worker at a time has work. That is said once."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import Task
from tests.gates import Background, Log, drain, engine_at, feed


def source() -> Iterator[int]:
    yield from ()


def sink(value: int) -> None:
    pass


def one_group(value: int) -> str:
    return "-"


class Notes(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.note(record.getMessage())


def warned(log: Log) -> None:
    logging.getLogger("sqspipes_mp").addHandler(Notes(log))


@pytest.mark.parametrize(
    ("group", "options", "times"),
    [("-", {}, 1), ("-", {"group": one_group}, 0), ("other", {}, 0)],
    ids=["sqspipes's", "asked for", "another"],
)
def test_one_group_for_everything_is_told_once(
    db: Path, log: Log, group: str, options: dict[str, Any], times: int
) -> None:
    task = Task(sink, name="work", workers=2, max_tasks_per_worker=10, **options)
    engine = engine_at(db, [source, task], fifo=True, setup=partial(warned, log))
    feed(engine, "work", range(40), group=group)
    # Several workers, one after the other, have got of it.
    assert drain(engine, "work")["work"].done == 40
    assert len(log.lines()) == times
    for line in log.lines():
        assert line.startswith("work: what comes from t-source.fifo is all in one FIFO group, '-'")
        assert "group=lambda value: '-'" in line


def dies_once(value: int, log: Log) -> None:
    log.note(value)
    if len(log.lines()) == 1:
        os._exit(3)


def test_a_death_does_not_hold_up_the_one_group_for_longer_than_a_second(
    db: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Anywhere else it would be hidden for so long.
    monkeypatch.setattr("random.uniform", lambda least, most: 3000.0)
    task = Task(dies_once, name="work", args=(log,), group=one_group)
    engine = engine_at(db, [source, task], fifo=True, start_method="fork")
    feed(engine, "work", [0, 1], group="-")
    with Background(engine, only="work"):
        assert log.wait_for(3) == [0, 0, 1]
        engine.stop()
