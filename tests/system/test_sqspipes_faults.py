"""What sqspipes 0.3.3 got wrong, one test each that shows it right here."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import (
    SQS,
    AccessDenied,
    ConfigError,
    EmptyTaskOutput,
    OutputError,
    QueueMissing,
    SQLite,
    Task,
    TaskCallback,
    TaskClient,
)
from sqspipes_mp.brokers.base import Completion
from sqspipes_mp.caller.stats import opened
from sqspipes_mp.engine import plan_run
from sqspipes_mp.messages.envelope import decode
from sqspipes_mp.pipeline.outputs import Products
from standin import StandIn, standin
from standin.brokers import sqs_at
from tests.gates import Background, Gate, Log, bodies, drain, eventually, feed, present, values, waiting


def gen(*items):
    yield from items


def work(value, *args):
    return value


def last(value, log: Log):
    log.note(value)


def client_at(path: Path, *tasks: object, domain: str = "app", **settings: Any) -> TaskClient:
    client = TaskClient(domain, broker=SQLite(path), **settings)
    client.register_tasks(list(tasks))
    return client


@pytest.fixture
def sqs() -> Iterator[StandIn]:
    with standin() as server:
        yield server


def dies_at_first(value, log: Log):
    log.note(value)
    if value == 2 and log.lines().count(2) == 1:
        os._exit(1)
    return value


def test_it_deletes_before_running(db: Path, tmp_path: Path, log: Log) -> None:
    out = Log(str(tmp_path / "out"))
    client = client_at(db, gen, Task(dies_at_first, name="work", args=(log,)), Task(last, args=(out,)))
    client.submit((1, 2, 3))
    drain(client.engine, "work", "last")
    assert sorted(out.lines()) == [1, 2, 3]
    assert log.lines().count(2) == 2


def no_json(value):
    return object()


def test_a_failed_send_loses_the_result_of_what_cannot_become_json(db: Path) -> None:
    client = client_at(db, gen, Task(no_json, name="work"), Task(work, name="last"))
    client.submit((1,))
    with pytest.raises(OutputError, match="object"):
        client.run("work")
    assert waiting(client.engine, "work") == (1, 0, 0)


def test_a_failed_send_loses_the_result_when_sqs_refuses(sqs: StandIn, log: Log) -> None:
    client = TaskClient("app", broker=sqs_at(sqs.url))
    client.register_tasks([gen, work, Task(last, args=(log,))])
    sqs.plan("SendMessageBatch", "partial", entries=[0, 2])
    client.submit((1, 2, 3))
    for fault in ("error", "lost_reply"):
        sqs.plan("SendMessageBatch", fault)
    with Background(client.engine, only=["work", "last"]):
        log.wait_for(3)
        client.engine.stop()
    assert sorted(log.lines()) == [1, 2, 3]
    assert len(sqs.messages("app-work.fifo")) == 3
    assert sqs.ledger()["faults"] == {"partial": 1, "error": 1, "lost_reply": 1}


def meets(value, log: Log, gate: Gate):
    log.note(value)
    gate.wait()
    return value


def test_one_fifo_group_for_everything(db: Path, log: Log, gate: Gate) -> None:
    client = client_at(db, gen, Task(meets, name="work", workers=2, prefetch=0, args=(log, gate)), work_)
    client.submit((1, 2))
    with Background(client.engine, only="work"):
        # Neither ends before both run.
        assert sorted(log.wait_for(2)) == [1, 2]
        gate.open()
        eventually(lambda: waiting(client.engine, "work_") == (2, 0, 0))
        client.engine.stop()


def work_(value):
    return value


def test_random_deduplication_ids(db: Path, sqs: StandIn) -> None:
    for broker in (SQLite(db), sqs_at(sqs.url)):
        client = TaskClient("app", broker=broker)
        client.register_tasks([gen, work, work_])
        stage = client.engine.pipeline.stage("work")
        message = decode('{"meta": {"priority": 0}, "value": 1}', "sent-by-sqspipes")
        with opened(client.engine.broker) as connection:
            connection.ensure(client.engine.pipeline.queues, create=True)
            # What two deliveries of one message give: the first worker died between sending and deleting.
            for _ in range(2):
                products = Products(plan_run(client.engine), stage)
                output = present(products.make(message.value, message, message.parent, 0).output)
                connection.complete([Completion(None, (output,))])
            assert connection.depth(stage.outputs[0]).visible == 1


@pytest.mark.parametrize("action", ["purge", "delete"])
def test_delete_and_purge_by_prefix(db: Path, action: str) -> None:
    app = client_at(db, gen, work, domain="app")
    others = [client_at(db, gen, work, domain=domain) for domain in ("app2", "app-gen")]
    for client in (app, *others):
        client.submit((1,))
    getattr(app, action)()
    assert [client.engine.stats()["work"].visible for client in (app, *others)] == [0, 1, 1]
    assert len(app.queues) == (2 if action == "purge" else 0)


def by_value(value):
    return value


@pytest.mark.parametrize("iterate", [False, True])
def test_min_priority_ignored_without_iterate(db: Path, log: Log, iterate: bool) -> None:
    client = client_at(db, Task(gen, priorities=4), Task(last, args=(log,)))
    client.submit((0, 1, 2, 3), priority=by_value)
    if iterate:
        with client.run("last", iterate=True, min_priority=1, max_priority=2) as results:
            next(results), next(results)
    else:
        drain(client.engine, "last", min_priority=1, max_priority=2)
    assert sorted(log.lines()) == [1, 2]
    queues = client.engine.pipeline.stage("gen").outputs
    left = [len(bodies(client.engine, queue)) for queue in queues]
    assert left[0] == left[3] == 1


def wrapped(*items):
    for item in items:
        yield TaskCallback(item, print)


def test_a_priority_callable_sees_the_wrapper(db: Path) -> None:
    client = client_at(db, Task(wrapped, name="gen", priorities=3), work)
    client.engine.run("gen", args=(2, 1), priority=by_value)
    client.submit((2,), priority=by_value)
    queues = client.engine.pipeline.stage("gen").outputs
    assert [[json.loads(body)["value"] for body in bodies(client.engine, queue)] for queue in queues] == [
        [],
        [1],
        [2, 2],
    ]


def done_with(value, log: Log):
    return TaskCallback(value, log.note, ("done", value))


def drops_with(value, log: Log):
    return TaskCallback(EmptyTaskOutput, log.note, ("dropped", value))


def test_the_callback_never_runs_on_the_last_task(db: Path, log: Log) -> None:
    client = client_at(db, gen, Task(drops_with, name="work", args=(log,)), Task(done_with, name="last", args=(log,)))
    client.submit((1,))
    feed(client.engine, "last", [2], group="g")
    drain(client.engine, "work", "last")
    assert sorted(log.lines()) == [("done", 2), ("dropped", 1)]
    assert waiting(client.engine, "last") == (0, 0, 0)


def test_a_receive_error_looks_like_an_empty_queue_for_ever(sqs: StandIn, log: Log) -> None:
    client = TaskClient("app", broker=sqs_at(sqs.url), fifo=False)
    client.register_tasks([gen, Task(last, args=(log,))])
    client.submit((1,))
    with pytest.raises(QueueMissing, match="app-gen"), Background(client.engine, only="last"):
        log.wait_for(1)
        client.delete()
    sqs.keys(key="another")
    with pytest.raises(AccessDenied):
        client.run("last")


def test_a_stage_with_fewer_priority_levels_than_its_input_drops_messages(db: Path, log: Log) -> None:
    client = client_at(
        db, Task(gen, priorities=16), Task(work, priorities=2), Task(work_, priorities=1), Task(last, args=(log,))
    )
    client.submit(tuple(range(16)), priority=by_value)
    drain(client.engine, "work")
    queues = client.engine.pipeline.stage("work").outputs
    assert [len(bodies(client.engine, queue)) for queue in queues] == [1, 15]
    drain(client.engine, "work_", "last")
    assert sorted(log.lines()) == list(range(16))


def test_hard_coded_regions() -> None:
    for region in ("eu-central-1", "ap-southeast-2", "us-west-2"):
        client = TaskClient("app", "key", "secret", region, fifo=True)
        client.register_tasks([gen, work])
        assert isinstance(client.engine.broker, SQS)
        assert client.engine.broker.region == region


def test_submit_returns_before_its_output_is_sent_and_hides_what_went_wrong(db: Path) -> None:
    client = client_at(db, gen, work)
    client.submit((1,))
    assert values(client.engine, "work") == [1]
    with pytest.raises(OutputError):
        client.submit((object(),))


def test_a_band_without_a_level_turns_a_stage_into_a_source(db: Path) -> None:
    client = client_at(db, Task(gen, priorities=2), work)
    with pytest.raises(ConfigError, match="the highest priority task 'work' receives"):
        client.run("work", min_priority=2)
