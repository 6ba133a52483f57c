"""What errors, logs and the process list say of a call: the message's key and value, the worker's title."""

import logging
from pathlib import Path

import pytest

from sqspipes_mp import Task
from tests.gates import engine_at


def fails(value):
    raise ValueError(Path("/proc/self/comm").read_text().strip())


def test_an_error_names_the_key_the_value_and_the_worker_s_title(db: Path) -> None:
    engine = engine_at(db, [Task(fails, input=True)])
    engine.put({"text": "x" * 500}, key="user-17")
    with pytest.raises(ValueError, match="fails/0") as caught:
        engine.run()
    [note] = [note for note in caught.value.__notes__ if "in stage" in note]
    assert "(key 'user-17', value {'text': 'xxx" in note
    assert len(note) < 300


def test_a_dead_letter_s_line_of_the_log_names_the_value_alone_where_there_is_no_key(
    db: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.basicConfig(level=logging.INFO, force=True)
    engine = engine_at(db, [Task(fails, input=True)], on_error="reject")
    engine.put(17)
    engine.run(until="drained")
    assert "(value 17) is dead-lettered after attempt 1: ValueError: fails/0" in capfd.readouterr().err


def test_a_run_that_is_to_drain_a_new_file_says_that_it_is_new(db: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_at(db, [Task(fails, input=True)])
    for _ in range(2):
        engine.run(until="drained", idle=0.0)
    told = [record for record in caplog.records if "a new file, so nothing waits in it" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]
