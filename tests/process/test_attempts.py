"""Attempts on SQS, which counts deliveries only: whose count is lost is stopped by the deliveries in the end."""

import contextlib
import json
import os
import threading
from typing import Any

import pytest

from sqspipes_mp import SQS, Engine, Task
from sqspipes_mp.messages.envelope import Message, decode
from standin.brokers import sqs_at
from standin.client import standin
from tests.gates import drain, feed


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what failed come again at once, in what is forked as well."""
    monkeypatch.setattr("sqspipes_mp.caller.dead_letters._POLL", 0.0)
    monkeypatch.setattr("random.uniform", lambda least, most: 0.0)


def source():
    yield from ()


def sink(value):
    pass


def bad_luck(value):
    if value == "poison":
        raise ValueError("bad luck")
    return value


def death(value):
    if value == "poison":
        os._exit(3)
    return value


def hang(value):
    if value == "poison":
        threading.Event().wait()
    return value


def stage(broker: SQS, method: Any, **settings: Any) -> Engine:
    task = Task(method, name="work", max_attempts=2, **settings)
    return Engine([source, task, sink], domain="t", broker=broker, on_error="retry", start_method="fork")


def deliver_and_release(engine: Engine, times: int) -> None:
    """Have a message delivered by hand, as to a fleet of machines that each gave it back."""
    [queue] = engine.pipeline.stage("work").inputs
    with contextlib.closing(engine.broker.open()) as connection:
        for _ in range(times):
            [received] = connection.receive([queue], 1, 1.0, 30.0)
            connection.extend([received.handle], 0.0)


@pytest.mark.parametrize(("method", "error"), [(bad_luck, "ValueError"), (death, "WorkerLost")])
def test_ten_times_max_attempts_deliveries_are_the_cap_where_attempts_are_lost(
    sqs: SQS, method: Any, error: str
) -> None:
    engine = stage(sqs, method)
    feed(engine, "work", ["poison"])
    deliver_and_release(engine, 20)
    summary = drain(engine, "work")["work"]
    [letter] = engine.dead_letters()
    assert (letter.failure.error, letter.failure.attempts) == (error, 1)
    assert (summary.failed, summary.dead) == (1, 1)


@pytest.mark.parametrize(
    ("method", "limits", "error"),
    [(bad_luck, {}, "ValueError"), (death, {}, "WorkerLost"), (hang, {"timeout": 0.3}, "TaskTimeout")],
)
def test_a_run_counts_attempts_itself_and_dead_letters_at_the_last(
    sqs: SQS, method: Any, limits: dict[str, Any], error: str
) -> None:
    engine = stage(sqs, method, **limits)
    feed(engine, "work", ["poison"])
    feed(engine, "work", ["innocent"])
    summary = drain(engine, "work")["work"]
    [letter] = engine.dead_letters()
    assert json.loads(letter.body)["value"] == "poison"
    assert (letter.failure.error, letter.failure.attempts) == (error, 2)
    assert (summary.done, summary.failed, summary.dead) == (1, 2, 1)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(
    ("method", "limits", "error"),
    [(bad_luck, {}, "ValueError"), (death, {}, "WorkerLost"), (hang, {"timeout": 0.3}, "TaskTimeout")],
)
def test_attempts_are_counted_where_the_service_counts_no_deliveries(
    lean: bool, method: Any, limits: dict[str, Any], error: str
) -> None:
    with standin(uncounted=1) as server:
        engine = stage(sqs_at(server.url, lean=lean), method, **limits)
        feed(engine, "work", ["poison", "innocent"])
        summary = drain(engine, "work")["work"]
        [letter] = engine.dead_letters()
    assert json.loads(letter.body)["value"] == "poison"
    assert (letter.failure.error, letter.failure.attempts) == (error, 2)
    assert (summary.done, summary.failed, summary.dead) == (1, 2, 1)


def test_a_message_that_cannot_be_decoded_for_want_of_memory_ends_there_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def starve(body: str, ident: str) -> Message:
        if "poison" in body:
            raise MemoryError
        return decode(body, ident)

    monkeypatch.setattr("sqspipes_mp.worker.receive.intake.decode", starve)
    with standin(uncounted=1) as server:
        engine = stage(sqs_at(server.url), bad_luck)
        feed(engine, "work", ["poison"])
        summary = drain(engine, "work")["work"]
        [letter] = engine.dead_letters()
    assert (letter.failure.error, summary.done, summary.dead) == ("MemoryError", 0, 1)
    assert "delivery number 2" in letter.failure.text
