"""SQS lets a message be in flight for 12 hours at most, here some seconds; SQLite for ever."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sqspipes_mp import SQS, ConfigError, Engine, SQLite, Task
from sqspipes_mp.engine import override
from tests.gates import Log, drain, feed
from tests.process.test_attempts import deliver_and_release


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what failed come again at once, in what is forked as well."""
    monkeypatch.setattr("sqspipes_mp.caller.dead_letters._POLL", 0.0)
    monkeypatch.setattr("random.uniform", lambda least, most: 0.0)


@pytest.fixture
def short(sqs: SQS) -> SQS:
    """The stand-in, where a message can be in flight for 4 seconds: its call is killed after 3.6."""
    sqs.longest_hold = 4.0
    return sqs


def source() -> Iterator[None]:
    yield from ()


def work(value: Any, log: Log) -> None:
    if value == "endless":
        log.note(value)
        threading.Event().wait()


def engine(broker: Any, log: Log, **settings: Any) -> Engine:
    task = Task(work, args=(log,), max_attempts=2, **settings)
    return Engine(
        [source, task], domain="t", broker=broker, on_error="retry", start_method="fork", visibility_timeout=2.0
    )


@pytest.fixture
def log(tmp_path: Any) -> Log:
    return Log(str(tmp_path / "log"))


def test_a_call_beyond_it_is_killed_and_charged(short: SQS, log: Log, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = engine(short, log)
    feed(pipeline, "work", ["endless"])
    feed(pipeline, "work", ["innocent"])
    with caplog.at_level(logging.WARNING, "sqspipes_mp.supervisor"):
        summary = drain(pipeline, "work")["work"]
    [letter] = pipeline.dead_letters()
    assert (letter.failure.error, letter.failure.attempts, letter.failure.signal) == ("TaskTimeout", 2, "SIGKILL")
    assert "12 hours" in letter.failure.text
    assert "threading.py" in letter.failure.stack
    assert (summary.done, summary.dead) == (1, 1)
    # Once for each attempt: its message was nobody else's meanwhile.
    assert log.lines() == ["endless"] * 2
    told = [record.getMessage() for record in caplog.records if "the longest that SQS lets one" in record.getMessage()]
    assert len(told) == 2
    assert "Make its calls shorter" in told[0]
    assert "SQLite" in told[0]


def test_as_many_deliveries_as_attempts_are_enough_for_that(short: SQS, log: Log) -> None:
    pipeline = engine(short, log)
    feed(pipeline, "work", ["endless"])
    deliver_and_release(pipeline, 1)
    assert drain(pipeline, "work")["work"].dead == 1
    [letter] = pipeline.dead_letters()
    assert (letter.failure.error, letter.failure.attempts) == ("TaskTimeout", 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_shorter_timeout_is_what_it_is(short: SQS, log: Log, threads: int) -> None:
    pipeline = engine(short, log, timeout=0.3, threads=threads)
    feed(pipeline, "work", ["endless"])
    drain(pipeline, "work")
    [letter] = pipeline.dead_letters()
    assert (letter.failure.error, letter.failure.attempts) == ("TaskTimeout", 2)
    assert "outlived the task's timeout" in letter.failure.text


def test_in_threads_only_the_late_one_is_charged(short: SQS, log: Log) -> None:
    pipeline = engine(short, log, threads=2)
    feed(pipeline, "work", ["endless", "innocent"])
    summary = drain(pipeline, "work")["work"]
    assert (summary.done, summary.dead) == (1, 1)
    assert log.lines() == ["endless"] * 2


def same(value: Any) -> Any:
    return value


def long(broker: Any, timeout: float = 43_201.0, **settings: Any) -> Engine:
    return Engine([Task(same, name="work", timeout=timeout, input=True)], domain="t", broker=broker, **settings)


def test_a_longer_timeout_is_refused_on_sqs(sqs: SQS, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"Task\('work'\)\.timeout.*43200 s \(12 h\) on SQS.*43201.*SQLite"):
        long(sqs)
    with pytest.raises(ConfigError, match="12 h"):
        long("sqs://us-east-1")
    with pytest.raises(ConfigError, match="12 h"):
        override(long("sqlite://"), broker=sqs)
    # Where only the environment says which broker it is, before any process starts.
    monkeypatch.setenv("SQSPIPES_BROKER", "sqs://us-east-1")
    with pytest.raises(ConfigError, match="12 h"):
        long(None).run()
    with pytest.raises(ConfigError, match="12 h"):
        long(None).map([1])
    long(sqs, timeout=43_200.0)


def test_sqlite_has_no_such_limit(tmp_path: Any) -> None:
    assert SQLite(tmp_path / "q.db").longest_hold is None
    long(SQLite(tmp_path / "q.db"))
    # A source's call has no message.
    Engine([Task(source, timeout=43_201.0)], domain="t", broker="sqs://us-east-1")
