"""A queue refuses one output for what it is: that message fails, and nothing else does."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import boto3
import pytest

from sqspipes_mp import SQS, Engine, MessageTooLarge, Retry, Task
from standin import StandIn
from tests.gates import drain, feed


def source():
    yield from ()


def long(value):
    return "x" * 2000 if value == 3 else value


def stream(value):
    yield value
    yield from ["x" * 2000] * 12 if value == 3 else []


def sink(value):
    pass


def engine_with_a_small_queue(broker: SQS, server: StandIn, work: Callable[..., Any], **settings: Any) -> Engine:
    """Return an engine whose queue "t-work" takes 1 KiB."""
    fifo = bool(settings.get("fifo"))
    attributes = {"MaximumMessageSize": "1024", **({"FifoQueue": "true"} if fifo else {})}
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    with contextlib.closing(boto3.client("sqs", "us-east-1", endpoint_url=server.url, **keys)) as client:
        client.create_queue(QueueName="t-work.fifo" if fifo else "t-work", Attributes=attributes)
    group = (lambda value: "g") if fifo else None
    task = Task(work, name="work", max_attempts=2, group=group)
    return Engine([source, task, Task(sink, group=group)], domain="t", broker=broker, **settings)


@pytest.mark.parametrize(
    ("work", "on_error"), [(long, "retry"), (stream, "reject")], ids=["one output", "one of a stream"]
)
def test_an_output_larger_than_its_queue_takes_costs_its_message_only(
    sqs: SQS, server: StandIn, work: Callable[..., Any], on_error: str
) -> None:
    policy = "reject" if on_error == "reject" else at_once
    engine = engine_with_a_small_queue(sqs, server, work, on_error=policy)
    feed(engine, "work", range(6))
    summary = drain(engine, "work", "sink")
    (letter,) = engine.dead_letters()
    assert (letter.stage, letter.value, letter.failure.error) == ("work", 3, "MessageTooLarge")
    assert letter.failure.attempts == (1 if on_error == "reject" else 2)
    assert "MaximumMessageSize" in letter.failure.text
    assert "'t-work'" in letter.failure.text
    assert (summary["work"].done, summary["work"].failed) == (5, letter.failure.attempts)


def at_once(error, attempt):
    return Retry(0)


def test_it_ends_a_run_that_raises_and_its_message_is_back(sqs: SQS, server: StandIn) -> None:
    engine = engine_with_a_small_queue(sqs, server, long)
    feed(engine, "work", [3])
    with pytest.raises(MessageTooLarge, match="MaximumMessageSize"):
        drain(engine, "work")
    # A long poll that was cut may have taken it once more, for 15 s at most.
    server.advance(16)
    stats = engine.stats()["work"]
    assert (stats.visible, stats.in_flight) == (1, 0)


def test_what_follows_it_in_its_group_waits_for_it(sqs: SQS, server: StandIn) -> None:
    engine = engine_with_a_small_queue(sqs, server, long, fifo=True, on_error=at_once)
    feed(engine, "work", range(8), group="g")
    drain(engine, "work")
    sent = server.messages("t-work.fifo")
    with contextlib.closing(sqs.open()) as connection:
        arrived = connection.receive(["t-work.fifo"], 10, 0, 30)
    assert [json.loads(message.body)["value"] for message in arrived] == [0, 1, 2, 4, 5, 6, 7]
    assert [letter.value for letter in engine.dead_letters()] == [3]
    # What follows it was sent after its last attempt.
    assert server.messages("t-work--dead.fifo")[0]["sent_ms"] <= sent[3]["sent_ms"]


def parts(value):
    yield from ["x" * 2000] if value == 3 else [f"{value}.{part}" for part in range(12 if value == 4 else 1)]


def test_a_generator_that_runs_already_does_not_overtake_it(sqs: SQS, server: StandIn) -> None:
    engine = engine_with_a_small_queue(sqs, server, parts, fifo=True, on_error=at_once)
    feed(engine, "work", range(5), group="g")
    drain(engine, "work")
    assert [letter.value for letter in engine.dead_letters()] == [3]
    sent = server.messages("t-work.fifo")[3:]
    assert len(sent) == 12
    # Its parts are sent while it runs, past what waits to be carried: still after the last attempt of the other.
    assert server.messages("t-work--dead.fifo")[0]["sent_ms"] <= min(message["sent_ms"] for message in sent)
