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

from sqspipes_mp import SQS, ConfigError, Engine, QueueMissing, Reject, SQLite, Task, current_message, envelope
from sqspipes_mp.brokers.base import Broker, Completion, Output, QueueSpec
from sqspipes_mp.caller.dead_letters import discard, redrive
from sqspipes_mp.messages.limits import MAX_BYTES
from standin import StandIn
from standin.brokers import sqs_at
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


def settled(broker: Broker) -> dict[str, Any]:
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


ALIKE = json.dumps({"meta": {"id": "sensor-17", "hop": "0a" * 32, "priority": 1}, "value": ["y"]})


def seen(value: Any, log: Log) -> Any:
    message = current_message()
    log.note(value, message.id, message.hop, message.priority, dict(message.meta))
    return value


def seeing(broker: Broker, log: Log, **task: Any) -> Engine:
    return Engine([Task(seen, input=UPLOADS, args=(log,), **task)], domain="mine", broker=broker)


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
def test_without_decode_json_is_the_value_whatever_it_looks_like(others: Broker, log: Log) -> None:
    pipeline = seeing(others, log, on_error="reject")
    send(others, ['["x"]', ALIKE, "null", "not JSON"])
    assert pipeline.run(**settled(others))["seen"].done == 3
    found = sorted(log.lines(), key=lambda line: str(line[0]))
    assert [line[0] for line in found] == [None, ["x"], json.loads(ALIKE)]
    ids = {line[1] for line in found}
    assert len(ids) == 3
    assert "sensor-17" not in ids
    assert all(line[1:] == (line[1], line[1], 0, {}) for line in found)
    [letter] = pipeline.dead_letters()
    assert (letter.body, letter.value) == ("not JSON", "not JSON")
    pipeline.delete()


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
def test_envelopes_are_honoured_with_decode_envelope(others: Broker, log: Log) -> None:
    pipeline = seeing(others, log, decode=envelope, on_error="reject")
    send(others, [ALIKE, '{"value": null}', "[1]"])
    assert pipeline.run(**settled(others))["seen"].done == 2
    lines = log.lines()
    assert (["y"], "sensor-17", "0a" * 32, 1, json.loads(ALIKE)["meta"]) in lines
    assert [line[0] for line in lines if line[1] != "sensor-17"] == [None]
    [letter] = pipeline.dead_letters()
    assert (letter.body, letter.failure.error) == ("[1]", "DecodeError")
    pipeline.delete()


def refuse(value: Any) -> None:
    raise Reject("no good")


def made_by_others(sqs: SQS) -> SQS:
    """Return the stand-in with the queue of others in it."""
    with closing(sqs.open()) as connection:
        connection.ensure([QueueSpec(name=UPLOADS, fifo=False, visibility=30)], create=True)
    return sqs


def test_five_messages_that_look_alike_stay_five_to_their_dead_letters(sqs: SQS, log: Log) -> None:
    broker = made_by_others(sqs)
    tasks = [Task(seen, input=UPLOADS, args=(log,)), Task(refuse)]
    pipeline = Engine(tasks, domain="mine", broker=broker, fifo=True)
    bodies = [{"meta": {"id": "sensor-17"}, "value": n} for n in range(5)]
    send(broker, list(map(json.dumps, bodies)))
    summary = pipeline.run(**settled(broker))
    assert (summary["seen"].done, summary["refuse"].dead) == (5, 5)
    assert sorted(line[0]["value"] for line in log.lines()) == [0, 1, 2, 3, 4]
    assert len({line[2] for line in log.lines()}) == 5
    letters = pipeline.dead_letters()
    assert sorted(letter.value["value"] for letter in letters) == [0, 1, 2, 3, 4]
    assert len({letter.id for letter in letters}) == 5


def test_discarding_one_dead_letter_of_others_leaves_the_rest(sqs: SQS) -> None:
    broker = made_by_others(sqs)
    pipeline = Engine([Task(refuse, input=UPLOADS)], domain="mine", broker=broker)
    bodies = [{"meta": {"id": "sensor-17", "hop": "0a" * 32}, "value": n} for n in range(3)]
    send(broker, list(map(json.dumps, bodies)))
    assert pipeline.run(**settled(broker)).dead == 3
    letters = pipeline.dead_letters()
    # What the task was given, not what looks like it inside.
    assert sorted((letter.value for letter in letters), key=str) == bodies
    moved = discard(pipeline.pipeline, broker, [letters[0].id])
    assert [letter.value for letter in moved.letters] == [letters[0].value]
    assert sorted(str(letter.value) for letter in pipeline.dead_letters()) == sorted(
        str(letter.value) for letter in letters[1:]
    )


def tens(body: str) -> int:
    return int(body) * 10


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
def test_a_dead_letter_s_value_went_through_decode(others: Broker) -> None:
    pipeline = Engine([Task(refuse, input=UPLOADS, decode=tens, on_error="reject")], domain="mine", broker=others)
    send(others, ["4", "four"])
    pipeline.run(**settled(others))
    letters = {letter.body: letter.value for letter in pipeline.dead_letters()}
    # Of what decode cannot read there is the body.
    assert letters == {"4": 40, "four": "four"}


def forgot_its_return(body: str) -> None:
    json.loads(body)


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
def test_what_decode_makes_none_of_is_dropped_and_told_once(others: Broker, log: Log) -> None:
    task = Task(seen, input=UPLOADS, decode=forgot_its_return, args=(log,), workers=2)
    pipeline = Engine([task], domain="mine", broker=others, setup=partial(noted_warnings, log))
    send(others, [str(n) for n in range(50)])
    stage = pipeline.run(**settled(others))["seen"]
    assert (stage.done, stage.dropped, stage.dead) == (0, 50, 0)
    [warning] = log.lines()
    assert "seen: decode gave None for message" in warning
    assert "dropped" in warning


# --- attributes of the sender ---

TOLD = {
    "colour": {"DataType": "String.name", "StringValue": "bläu"},
    "count": {"DataType": "Number", "StringValue": "17.50"},
    "raw": {"DataType": "Binary.png", "BinaryValue": bytes(range(256))},
}
VALUES = {"colour": "bläu", "count": "17.50", "raw": bytes(range(256))}


def post(broker: SQS, body: str, told: Any, queue: str = UPLOADS) -> None:
    with closing(broker.open()) as connection:
        url = connection._queues.url(queue)
        connection._calls.clients.hot.send_message(QueueUrl=url, MessageBody=body, MessageAttributes=told)


def stored(broker: SQS, queue: str) -> list[tuple[str, Any]]:
    """Return the bodies and attributes that a queue shows to boto3."""
    with closing(broker.open()) as connection:
        url = connection._queues.url(queue)
        reply = connection._calls.clients.hot.receive_message(
            QueueUrl=url, MaxNumberOfMessages=10, MessageAttributeNames=["All"], VisibilityTimeout=0
        )
    return [(each["Body"], each.get("MessageAttributes")) for each in reply.get("Messages", [])]


def plain(attributes: Any) -> dict[str, Any]:
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in attributes.items()}


def with_attributes(body: str, attributes: Any) -> dict[str, Any]:
    return {"body": body, **plain(attributes)}


def fails_first(value: Any, log: Log) -> None:
    log.note(value, plain(current_message().attributes))
    if len(log.lines()) == 1:
        raise Reject("not yet")


def killed_first(value: Any, log: Log) -> None:
    log.note(value, plain(current_message().attributes))
    if len(log.lines()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "boto3"])
@pytest.mark.parametrize("method", [fails_first, killed_first])
def test_attributes_are_readable_and_travel_with_a_dead_letter_and_back(
    sqs: SQS, server: StandIn, log: Log, lean: bool, method: Any
) -> None:
    made_by_others(sqs)
    broker = sqs_at(server.url, lean=lean)
    task = Task(method, name="work", input=UPLOADS, decode=with_attributes, args=(log,), max_attempts=1)
    pipeline = Engine([task], domain="mine", broker=broker, on_error="reject")
    post(broker, "hello", TOLD)
    assert pipeline.run(**settled(broker)).dead == 1
    [letter] = pipeline.dead_letters()
    assert (letter.attributes, letter.value) == (VALUES, {"body": "hello", **plain(VALUES)})
    assert letter.failure.error == ("Reject" if method is fails_first else "WorkerLost")
    [(body, told)] = stored(broker, "mine-work--dead")
    del told["sqspipes_mp.failure"]
    assert (body, told) == ("hello", TOLD)
    redrive(pipeline.pipeline, broker, None)
    assert stored(broker, UPLOADS) == [("hello", TOLD)]
    assert pipeline.run(**settled(broker))["work"].done == 1
    assert log.lines() == [({"body": "hello", **plain(VALUES)}, plain(VALUES))] * 2


def test_what_sqs_itself_moved_keeps_its_attributes_in_a_redrive(sqs: SQS, log: Log) -> None:
    broker = made_by_others(sqs)
    tasks = [Task(seen, input=True, args=(log,)), Task(refuse)]
    pipeline = Engine(tasks, domain="mine", broker=broker)
    with closing(broker.open()) as connection:
        connection.ensure(pipeline.pipeline.queues, create=True)
    post(broker, '{"value": 1}', TOLD, "mine-refuse--dead")
    [letter] = pipeline.dead_letters()
    assert letter.attributes == VALUES
    redrive(pipeline.pipeline, broker, None)
    assert stored(broker, "mine-seen") == [('{"value": 1}', TOLD)]


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "boto3"])
@pytest.mark.parametrize("killed", [False, True], ids=["refused", "killed"])
def test_ten_attributes_of_a_full_message_travel_and_the_reason_is_logged(
    sqs: SQS, server: StandIn, log: Log, lean: bool, killed: bool
) -> None:
    made_by_others(sqs)
    broker = sqs_at(server.url, lean=lean)
    told = {f"number-{n}": {"DataType": "Binary", "BinaryValue": b"\xff" * 1000} for n in range(10)}
    size = sum(len(name) + len("Binary") + 1000 for name in told)
    body = "x" * (MAX_BYTES - size)
    task = Task(suicide if killed else refuse, name="work", input=UPLOADS, decode=str, max_attempts=1)
    pipeline = Engine([task], domain="mine", broker=broker, on_error="reject", setup=partial(noted_warnings, log))
    post(broker, body, told)
    assert pipeline.run(**settled(broker)).dead == 1
    assert stored(broker, "mine-work--dead") == [(body, told)]
    [letter] = pipeline.dead_letters()
    assert (letter.failure.error, len(letter.attributes)) == ("unknown", 10)
    [line] = [line for line in log.lines() if "is dead-lettered" in line]
    assert ("SIGKILL" if killed else "no good") in line
    assert "told here only" in line
    redrive(pipeline.pipeline, broker, None)
    assert stored(broker, UPLOADS) == [(body, told)]


def suicide(value: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_nine_attributes_of_a_full_message_travel_without_the_reason_too(sqs: SQS) -> None:
    broker = made_by_others(sqs)
    told = {f"number-{n}": {"DataType": "String", "StringValue": "v"} for n in range(9)}
    body = "x" * (MAX_BYTES - sum(len(name) + len("String") + 1 for name in told))
    pipeline = Engine([Task(refuse, name="work", input=UPLOADS, decode=str)], domain="mine", broker=broker)
    post(broker, body, told)
    assert pipeline.run(**settled(broker)).dead == 1
    assert stored(broker, "mine-work--dead") == [(body, told)]


class Notes(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.note(record.getMessage())


def noted_warnings(log: Log) -> None:
    logging.getLogger("sqspipes_mp").addHandler(Notes(log))


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
def test_a_url_or_an_arn_names_it_too(moto: SQS, log: Log, form: str) -> None:
    others: Broker = moto
    others.check()
    with closing(others.open()) as connection:
        connection.ensure([QueueSpec(name=UPLOADS, fifo=False, visibility=30)], create=True)
        url = connection._queues.url(UPLOADS)  # type: ignore[attr-defined]
        name = url if form == "url" else connection._queues._arn(UPLOADS)  # type: ignore[attr-defined]
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
