"""Messages that come later: ``put(delay=)``, and ``Retry(delay, charge=False)``, which uses up no attempt."""

import json
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, ConfigError, Engine, QueuesNotEmpty, Retry, SQLite, Task, TaskLike, current_message
from sqspipes_mp.worker.send.failures import RENEWED_AT
from standin import StandIn, standin
from standin.brokers import sqs_at
from tests.gates import Background, Log, bodies, dead, drain, engine_at, eventually, feed, present, values, waiting


def source() -> Iterator[int]:
    yield from ()


def sink(value: object) -> object:
    return value


def noted(value: Any, log: Log) -> Any:
    log.note(value)
    return value


def fed(broker: Any, log: Log, **settings: Any) -> Engine:
    tasks: list[TaskLike] = [Task(noted, name="work", input=True, args=(log,)), sink]
    # Forked workers have the clock that a test has set.
    return Engine(tasks, domain="t", broker=broker, start_method="fork", **settings)


# --- put(delay=) ---


def test_a_delay_is_written_down_and_sqlite_takes_any(db: Path, log: Log) -> None:
    engine = fed(SQLite(db), log)
    engine.put("soon", delay=0.05)
    engine.put("in a year", delay=366 * 86_400)
    metas = [json.loads(body)["meta"] for body in bodies(engine, "t--input")]
    assert metas[0]["not_before"] - time.time() < 1
    assert metas[1]["not_before"] - time.time() == pytest.approx(366 * 86_400, abs=100)
    engine.put("now")
    assert "not_before" not in json.loads(bodies(engine, "t--input")[-1])["meta"]
    assert engine.stats()["work"].delayed >= 1
    with Background(engine, only="work"):
        log.wait_for(2)
        engine.stop()
    assert waiting(engine, "work")[2] == 1
    assert all("not_before" not in json.loads(body)["meta"] for body in bodies(engine, "t-work"))


def test_what_sqs_cannot_delay_is_refused(sqs: SQS, log: Log) -> None:
    with pytest.raises(ConfigError, match=r"43,200 s on these queues.*scheduler service"):
        fed(sqs, log).put(1, delay=43_201)
    assert SQS("us-east-1", retention=100_000).longest_delay == 13_600
    assert SQS("us-east-1", retention=60).longest_delay == 900
    with pytest.raises(ConfigError, match="FIFO"):
        fed(sqs, log, fifo=True).put(1, delay=901)


def test_a_message_that_sqs_shows_too_early_is_put_off_and_is_not_in_flight(
    log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sqspipes_mp.caller.feed._told", [])
    # More of them than may be in flight.
    with standin(in_flight=20) as server:
        broker = sqs_at(server.url)
        broker._settle = 0.5
        engine = fed(broker, log)
        assert engine.put_many(range(60), delay=1000) == 60
        assert sum("would run it at once" in record.getMessage() for record in caplog.records) == 1

        def counts() -> tuple[int, int, int]:
            queue = server.ledger(messages=False)["queues"]["t--input"]
            return queue["visible"], queue["in_flight"], queue["delayed"]

        server.advance(901)
        with Background(engine, only="work"):
            eventually(lambda: counts() == (0, 0, 60), "all are put off")
            engine.stop()
        assert log.lines() == []
        server.advance(901)
        now = time.time
        monkeypatch.setattr("time.time", lambda: now() + 1000)
        engine.run(only="work", until="drained", idle=0.0)
        assert sorted(log.lines()) == list(range(60))


def test_a_due_time_is_the_wall_clocks(db: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fed(SQLite(db), log)
    now = time.time
    # As if the clock were set back after the put.
    monkeypatch.setattr("time.time", lambda: now() + 500)
    engine.put("early", delay=0.01)
    monkeypatch.setattr("time.time", now)
    eventually(lambda: waiting(engine, "work") == (1, 0, 0))
    with Background(engine, only="work"):
        eventually(lambda: waiting(engine, "work") == (0, 1, 0), "it was received")
        engine.stop()
    # Not run, and hidden until it is due.
    assert (waiting(engine, "work"), log.lines()) == ((0, 1, 0), [])


def test_a_drained_run_waits_for_what_is_delayed_and_a_map_refuses_to_begin(db: Path, log: Log) -> None:
    engine = fed(SQLite(db), log)
    engine.put("soon", delay=1)
    with pytest.raises(QueuesNotEmpty, match="1 message"):
        engine.map([2])
    assert drain(engine, "work")["work"].done == 1
    assert log.lines() == ["soon"]


# --- Retry(charge=False) ---


def limited(value: int, log: Log, times: int) -> int:
    message = current_message()
    log.note(message.id, message.attempt, message.continuation)
    if len(log.lines()) <= times:
        try:
            raise ConnectionError("too many requests")
        except ConnectionError as error:
            raise Retry(0, charge=False) from error
    return value


def test_an_uncharged_retry_uses_up_no_attempt_and_no_number_of_deliveries(db: Path, log: Log) -> None:
    times = 2 * RENEWED_AT + 5
    engine = engine_at(db, [source, Task(limited, name="work", args=(log, times), max_attempts=1, prefetch=0), sink])
    feed(engine, "work", [7])
    summary = drain(engine, "work")
    assert values(engine, "sink") == [7]
    assert len(log.lines()) == times + 1
    assert {line[1:] for line in log.lines()} == {(1, 0)}
    assert len({line[0] for line in log.lines()}) == 1
    assert (summary["work"].done, summary["work"].retried) == (1, times)


def test_map_follows_a_message_that_is_sent_anew(db: Path, log: Log) -> None:
    task = Task(limited, name="work", input=True, args=(log, RENEWED_AT + 2), max_attempts=1)
    assert list(engine_at(db, [task]).map([7])) == [7]
    assert len(log.lines()) == RENEWED_AT + 3


def later_once(value: int, log: Log) -> int:
    log.note(value)
    if len(log.lines()) == 1:
        raise Retry(600, charge=False)
    return value


@pytest.mark.parametrize("fifo", [True, False])
def test_the_delay_of_a_message_that_is_sent_anew_goes_with_it(
    sqs: SQS, server: StandIn, log: Log, fifo: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqspipes_mp.worker.send.failures.RENEWED_AT", 1)
    task = Task(later_once, name="work", args=(log,), input=True)
    engine = Engine([task, sink], domain="t", broker=sqs, fifo=fifo, start_method="fork")
    engine.put(7)
    queue = f"t--input{'.fifo' if fifo else ''}"

    def left() -> tuple[int, int, list[str]]:
        told = server.ledger(queue)["queues"][queue]
        return told["visible"], told["deleted"], [each["body"] for each in told["messages"] if not each["deleted"]]

    with Background(engine, only="work") as run:
        # In a FIFO queue no single message can be delayed: it comes at once, and is hidden.
        eventually(lambda: left()[:2] == (0, 1) and (not fifo or server.messages(queue)[-1]["received"]), "sent anew")
        [body] = left()[2]
        assert json.loads(body)["meta"]["not_before"] - time.time() == pytest.approx(600, abs=100)
        engine.stop()
    assert log.lines() == [7]
    assert (present(run.summary)["work"].retried, present(run.summary)["work"].failed) == (1, 1)


def always(value: int) -> None:
    raise Retry(0, charge=False)


def test_where_no_message_can_be_sent_anew_it_is_charged_in_the_end(db: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    task = Task(always, name="work", group=str, max_attempts=2, prefetch=0)
    engine = engine_at(db, [source, task, sink], fifo=True, setup=partial(log_to, told))
    feed(engine, "work", [1], group="1")
    drain(engine, "work")
    [(_, failure)] = dead(engine, "work")
    assert failure.attempts == 2
    assert f"has come {RENEWED_AT} times, and Retry(charge=False) is charged from now on: its FIFO group" in (
        told.read_text()
    )


def log_to(path: Path) -> None:
    logging.basicConfig(filename=path, force=True)


def shows_why(value: int) -> None:
    raise Retry(0) from ConnectionError("too many requests")


def test_a_retry_shows_the_error_it_was_raised_from(db: Path) -> None:
    engine = engine_at(db, [source, Task(shows_why, name="work", max_attempts=1), sink])
    feed(engine, "work", [1])
    drain(engine, "work")
    [(_, failure)] = dead(engine, "work")
    assert failure.text == "retry in 0 s, from ConnectionError: too many requests"


def test_retry_refuses_what_is_no_flag() -> None:
    with pytest.raises(ConfigError, match="charge"):
        Retry(charge=1)  # type: ignore[arg-type]
