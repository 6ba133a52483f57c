"""``Task(input=NAME)``: a queue of others is received from, and otherwise left alone."""

import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, ConfigError, Engine, QueueMissing, SQLite, Task, current_message
from sqspipes_mp.brokers.base import Broker, Completion, Output, QueueSpec
from tests.gates import Background, Gate, Log, eventually

UPLOADS = "uploads-of-others"
TEST_EVENT = json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "b"})


def event(*keys: str) -> str:
    return json.dumps({"Records": [{"s3": {"bucket": {"name": "b"}, "object": {"key": key}}} for key in keys]})


def keys_of(body: str) -> list[str] | None:
    event = json.loads(body)
    if event.get("Event") == "s3:TestEvent":
        return None
    return [record["s3"]["object"]["key"] for record in event["Records"]]


def each(keys, log: Log):
    log.note("ran", keys)
    if keys == ["deadly"]:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from keys


def noted(value, log: Log):
    log.note("key", value, current_message().priority)


@pytest.fixture(params=["sqlite", pytest.param("sqs", marks=pytest.mark.slow)])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Broker:
    if request.param == "sqlite":
        return SQLite(tmp_path / "queues.db")
    return request.getfixturevalue("moto")


@pytest.fixture
def others(broker: Broker) -> Iterator[Broker]:
    """The broker with the queue of others in it, as they made it."""
    broker.check()
    with closing(broker.open()) as connection:
        connection.ensure([QueueSpec(name=UPLOADS, fifo=False, visibility=30)], create=True)
        yield broker
        connection.delete([UPLOADS])


def send(broker: Broker, bodies: Sequence[str]) -> None:
    with closing(broker.open()) as connection:
        connection.complete([Completion(None, tuple(Output(UPLOADS, body, os.urandom(8).hex()) for body in bodies))])


def engine(broker: Broker, log: Log, **task: Any) -> Engine:
    options = {"input": UPLOADS, "decode": keys_of, "args": (log,), "on_error": "reject", **task}
    tasks = [Task(each, **options), Task(noted, args=(log,))]
    return Engine(tasks, domain="mine", broker=broker, visibility_timeout=4)


def settled(broker: Broker) -> dict[str, object]:
    # moto's counts are exact, so SQS's minute need not be waited for.
    if isinstance(broker, SQS):
        broker._settle = 0.5
    return {"until": "drained", "idle": 0.0}


def test_events_are_decoded_the_test_event_is_dropped_and_bad_bodies_are_kept(others: Broker, log: Log) -> None:
    pipeline = engine(others, log, max_attempts=1)
    bad = ["no JSON at all", '{"Records": [{}]}']
    send(others, [TEST_EVENT, event("a", "b"), *bad, event("c")])
    summary = pipeline.run(**settled(others))
    # Alone, since what its worker had done and not sent yet would be done again.
    send(others, [event("deadly")])
    pipeline.run(**settled(others))
    lines = log.lines()
    assert sorted(line[1] for line in lines if line[0] == "key") == ["a", "b", "c"]
    assert sorted(line[1] for line in lines if line[0] == "ran") == [["a", "b"], ["c"], ["deadly"]]
    assert summary["noted"].done == 3
    letters = {letter.body: letter for letter in pipeline.dead_letters()}
    assert set(letters) == {*bad, event("deadly")}
    assert (letters[bad[0]].failure.error, letters[bad[1]].failure.error) == ("JSONDecodeError", "KeyError")
    assert "keys_of" in letters[bad[1]].failure.traceback
    assert letters[event("deadly")].failure.signal == "SIGKILL"
    assert {letter.failure.source for letter in letters.values()} == {UPLOADS}
    assert {letter.queue for letter in letters.values()} == {UPLOADS}
    pipeline.delete()


def out_of_memory_at_poison(body: str, log: Log) -> str:
    log.note("decoded", body, os.getpid())
    if body == "poison":
        raise MemoryError
    return body


def held_at_first(value: str, log: Log, gate: Gate) -> None:
    log.note("begun", value, os.getpid())
    if value == "first":
        gate.wait()


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
def test_what_there_is_no_memory_to_decode_comes_again_in_other_workers_up_to_a_limit(
    others: Broker, log: Log, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sqspipes_mp.supervisor")
    monkeypatch.setattr("random.uniform", lambda least, most: 0.01)
    # Nothing else gets done meanwhile: each worker waits longer for its turn.
    monkeypatch.setattr("sqspipes_mp.supervisor.restart.LONGEST_BACKOFF", 0.01)
    work = Task(
        held_at_first, input=UPLOADS, decode=partial(out_of_memory_at_poison, log=log), args=(log, gate),
        prefetch=5, max_attempts=1, on_error="reject",
    )  # fmt: skip
    pipeline = Engine([work], domain="mine", broker=others, visibility_timeout=30, start_method="fork")
    send(others, ["first"])
    with Background(pipeline, **settled(others)) as run:
        eventually(lambda: [line for line in log.lines() if line[0] == "begun"])
        # All received at once: one goes before the poison, one behind it.
        send(others, ["before", "poison", "behind"])
        eventually(lambda: "is being replaced: MemoryError" in caplog.text)
        gate.open()
    begun = {value: pid for kind, value, pid in log.lines() if kind == "begun"}
    assert len(begun) == len([line for line in log.lines() if line[0] == "begun"]) == 3
    tries = [pid for kind, value, pid in log.lines() if value == "poison"]
    # What its worker ran is finished there, and nothing else.
    assert begun["first"] == tries[0]
    assert begun["first"] not in {begun["before"], begun["behind"]}
    # Ten deliveries for one allowed attempt, as for messages that are always given back.
    assert len(tries) == len(set(tries)) == 10
    [letter] = pipeline.dead_letters()
    assert (letter.body, letter.failure.error) == ("poison", "MemoryError")
    assert "decode" in letter.failure.text
    assert "out_of_memory_at_poison" in letter.failure.traceback
    assert run.summary["held_at_first"].done == 3
    pipeline.delete()


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
def test_without_decode_json_is_the_value_and_an_envelope_is_read(others: Broker, log: Log) -> None:
    pipeline = engine(others, log, decode=None)
    send(others, ['["x"]', json.dumps({"meta": {"priority": 0}, "value": ["y"]}), "not JSON"])
    pipeline.run(**settled(others))
    assert sorted(line[1] for line in log.lines() if line[0] == "key") == ["x", "y"]
    assert [letter.body for letter in pipeline.dead_letters()] == ["not JSON"]
    pipeline.delete()


def test_purge_and_delete_leave_it_alone(others: Broker, log: Log) -> None:
    pipeline = engine(others, log)
    if isinstance(others, SQS):
        others._purge_window = 0.0
    pipeline.run(**settled(others))
    send(others, [event("a")])
    pipeline.purge()
    pipeline.delete()
    with closing(others.open()) as connection:
        depth = connection.depth(UPLOADS)
        # A poll of the run that was cut off may still have taken it.
        assert depth.visible + depth.in_flight == 1
    with pytest.raises(ConfigError, match="queue of others"):
        pipeline.put(["z"])
    with pytest.raises(ConfigError, match="map"):
        pipeline.map([["z"]])


def test_it_is_never_created(broker: Broker, log: Log) -> None:
    pipeline = engine(broker, log)
    with pytest.raises(QueueMissing, match=UPLOADS):
        pipeline.run()
    pipeline.delete()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["url", "arn"])
def test_a_url_or_an_arn_names_it_too(moto: SQS, log: Log, form: str, request: pytest.FixtureRequest) -> None:
    others: Broker = moto
    others.check()
    with closing(others.open()) as connection:
        connection.ensure([QueueSpec(name=UPLOADS, fifo=False, visibility=30)], create=True)
        url = connection._queues.url(UPLOADS)
        name = url if form == "url" else connection._queues._arn(UPLOADS)
        send(others, [event("a"), "bad"])
        pipeline = engine(others, log, input=name)
        pipeline.run(**settled(others))
        assert [line[1] for line in log.lines() if line[0] == "key"] == ["a"]
        assert [letter.queue for letter in pipeline.dead_letters()] == [name]
        pipeline.delete()
        connection.delete([UPLOADS])


def test_a_fifo_queue_needs_a_fifo_engine(log: Log) -> None:
    with pytest.raises(ConfigError, match="fifo=True"):
        Engine([Task(each, input="others.fifo", args=(log,))], domain="mine")
