"""A queue service that sends no ApproximateReceiveCount: what is not known is looked up."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sqspipes_mp import SQS, Engine, Task
from sqspipes_mp.brokers import sqs_connection
from tests.gates import Log
from tests.standin import StandIn
from tests.brokers import sqs_at


def source() -> Iterator[object]:
    yield "poison"


def poison(value: object, log: Log) -> object:
    log.note(value)
    raise ValueError(value)


@pytest.mark.parametrize("lean", [True, False])
def test_a_poison_message_ends_after_its_attempts(
    server: StandIn, log: Log, lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.reset()
    monkeypatch.setattr(sqs_connection, "SYSTEM_ATTRIBUTES", ["SentTimestamp", "MessageGroupId"])
    task = Task(poison, name="work", args=(log,), max_attempts=3)
    broker = sqs_at(server.url, lean=lean)
    engine = Engine([source, task], domain="uncounted", broker=broker, on_error=lambda *_: "retry", start_method="fork")
    monkeypatch.setattr("sqspipes_mp.attempts.backoff", lambda attempt, jitter: 0.0)
    engine.run(until="drained")
    assert log.lines() == ["poison"] * 3
    [letter] = engine.dead_letters()
    assert letter.failure.attempts == 3
