"""Tenants: ``Task(tenant=)`` and ``put(tenant=)``, on SQLite and on SQS's standard queues."""

import threading
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, ConfigError, Continue, Engine, Reject, Retry, SQLite, Task, TaskLike, current_message
from sqspipes_mp.caller.dead_letters import redrive
from tests.gates import Background, Log, drain, eventually, query


def owner_of(value: Any) -> Any:
    return value["owner"] if isinstance(value, dict) else None


def passes(value: Any, log: Log) -> Any:
    log.note("first", current_message().group)
    return value


def works(value: Any, log: Log) -> Any:
    """Fail at the first attempt, go on at the second, and dead-letter what is poison."""
    message = current_message()
    log.note("second", message.group, message.attempt, message.continuation)
    if value["owner"] == "poison" and message.continuation:
        raise Reject
    if message.continuation:
        return None
    if message.attempt == 1:
        raise ConnectionError
    return Continue({**value, "step": 1})


def pipeline(broker: SQLite | SQS, log: Log) -> Engine:
    tasks: list[TaskLike] = [
        Task(passes, args=(log,), input=True),
        Task(works, args=(log,), tenant=owner_of, on_error=lambda error, attempt: "retry"),
    ]
    return Engine(tasks, domain="t", broker=broker, on_error="retry")


@pytest.fixture
def broker(request: pytest.FixtureRequest, db: Path) -> SQLite | SQS:
    if request.param == "sqlite":
        return SQLite(db)
    sqs: SQS = request.getfixturevalue("sqs")
    sqs._settle = 0.5
    return sqs


@pytest.mark.parametrize("broker", ["sqlite", "sqs"], indirect=True)
def test_a_tenant_survives_retry_continue_dead_letter_and_redrive(
    broker: SQLite | SQS, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqspipes_mp.caller.dead_letters._POLL", 0.0)
    monkeypatch.setattr("random.uniform", lambda least, most: 0.0)
    engine = pipeline(broker, log)
    engine.put({"owner": "poison"}, tenant="put's")
    engine.run(until="drained", idle=0.0)
    expected = [("second", "poison", 1, 0), ("second", "poison", 2, 0), ("second", "poison", 1, 1)]
    assert log.lines() == [("first", "put's"), *expected]
    [letter] = engine.dead_letters()
    assert len(redrive(engine.pipeline, engine.broker, [letter.id]).letters) == 1
    engine.run(until="drained", idle=0.0)
    assert log.lines()[4:] == [("second", "poison", 1, 1)]


def test_threads_run_messages_of_one_tenant_at_once(db: Path, log: Log) -> None:
    meeting = threading.Barrier(2, timeout=60)

    def meets(value: int) -> None:
        meeting.wait()

    task = Task(meets, name="meets", threads=2, input=True, tenant=lambda value: "one")
    engine = Engine([task], domain="t", broker=SQLite(db), start_method="fork")
    engine.put_many([1, 2])
    assert drain(engine, "meets")["meets"].done == 2


def later(value: int) -> None:
    raise Retry(600)


def test_a_tenant_that_is_called_as_the_one_group_of_fifo_queues_is_no_group(db: Path) -> None:
    engine = Engine([Task(later, input=True)], domain="t", broker=SQLite(db))
    engine.put(1, tenant="-")
    with Background(engine):
        # In that group no message waits for longer than a second.
        eventually(lambda: query(db, "SELECT visible_at - sent_at > 500000 FROM messages WHERE charges > 0") == [1])
        engine.stop()


@pytest.mark.parametrize(
    ("task", "settings", "named"),
    [
        ({"input": True}, {"fifo": True}, "FIFO"),
        ({}, {}, "source"),
        ({"input": "others"}, {}, "senders"),
    ],
)
def test_where_there_are_no_tenants_they_are_refused(task: Any, settings: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Engine([Task(owner_of, tenant=owner_of, **task)], domain="t", broker=SQLite("x.db"), **settings)


def test_put_refuses_a_tenant_that_is_none(db: Path) -> None:
    with pytest.raises(ConfigError, match=r"put\(tenant\)"):
        Engine([Task(owner_of, input=True)], domain="t", broker=SQLite(db)).put(1, tenant="")
    with pytest.raises(ConfigError, match="FIFO"):
        Engine([Task(owner_of, input=True)], domain="t", broker=SQLite(db), fifo=True).put(1, tenant="a")
