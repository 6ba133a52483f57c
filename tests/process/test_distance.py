"""Requests under way: many while there is a backlog far away, one where there is nothing to do; and none of it lost."""

import contextlib
import json
import os
import signal
import threading
from functools import partial
from typing import Any

import pytest

from sqspipes_mp import SQS, Engine, Task
from sqspipes_mp.brokers.base import Completion
from standin.brokers import sqs_at
from standin.client import StandIn
from tests.gates import Background, Log, eventually, feed

RECEIVE, SEND, DELETE = "ReceiveMessage", "SendMessageBatch", "DeleteMessageBatch"


@pytest.fixture
def sqs(server: StandIn) -> SQS:
    server.reset()
    return sqs_at(server.url)


def source():
    yield from ()


def sink(value):
    return value


def short(value):
    return value


def recorded(value, log: Log):
    log.note(value)
    return value


def noted(value, log: Log):
    log.note(os.getpid())
    return value


def stage(broker: SQS, method: Any = short, *, fifo: bool = False, **settings: Any) -> Engine:
    return Engine([source, Task(method, name="work", **settings), sink], domain="t", broker=broker, fifo=fifo)


def most(server: StandIn) -> dict[str, int]:
    """Return how many requests of each kind were under way at once."""
    return {name: each["most"] for name, each in server.ledger(messages=False)["requests"].items()}


def is_under_way(server: StandIn, operation: str) -> bool:
    """Tell whether several requests of a kind are under way."""
    found = server.ledger(messages=False)["requests"].get(operation, {"under_way": 0})
    return int(found["under_way"]) >= 2


def made(server: StandIn) -> dict[str, int]:
    return {name: each["requests"] for name, each in server.ledger(messages=False)["requests"].items()}


def taken(engine: Engine, stage: str) -> list[Any]:
    """Take all values that wait for a stage, in the order in which they come."""
    found: list[Any] = []
    with contextlib.closing(engine.broker.open()) as connection:
        while batch := connection.receive(engine.pipeline.stage(stage).inputs, 10, 0, 60.0):
            found += [json.loads(each.body)["value"] for each in batch]
            connection.complete([Completion(each.handle) for each in batch])
    return found


def _left(server: StandIn, engine: Engine) -> list[str]:
    queue = server.ledger(messages=False)["queues"][engine.pipeline.stage("work").inputs[0]]
    return [name for name in ("visible", "in_flight", "delayed") if queue[name]]


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_a_backlog_far_away_has_many_requests_under_way_and_full_batches(server: StandIn, sqs: SQS, fifo: bool) -> None:
    engine = stage(sqs, fifo=fifo)
    for value in range(0, 2000, 100):
        feed(engine, "work", range(value, value + 100))
    server.faults(latency_ms=100)
    before = made(server)
    with Background(engine, only="work"):
        eventually(lambda: not _left(server, engine))
        engine.stop()
    server.faults(latency_ms=0)
    found, after = most(server), made(server)
    assert sorted(taken(engine, "sink")) == list(range(2000))
    assert min(found[RECEIVE], found[SEND], found[DELETE]) > 3, found
    requests = sum(after[name] - before.get(name, 0) for name in (RECEIVE, SEND, DELETE))
    assert requests < 0.4 * 2000


def test_where_nothing_waits_there_is_one_long_poll(server: StandIn, sqs: SQS) -> None:
    engine = stage(sqs, workers=1)
    with Background(engine, only="work"):
        eventually(lambda: server.ledger(messages=False)["waiting"] == 1)
        feed(engine, "work", range(30))
        sent = engine.pipeline.stage("sink").inputs[0]
        eventually(lambda: server.ledger(messages=False)["queues"][sent]["visible"] == 30)
        eventually(lambda: server.ledger(messages=False)["waiting"] == 1)
        engine.stop()
    eventually(lambda: server.ledger(messages=False)["requests"][RECEIVE]["under_way"] == 0)


def test_what_waits_at_a_higher_level_far_away_runs_first(server: StandIn, sqs: SQS, log: Log) -> None:
    work = Task(recorded, name="work", args=(log,), input=True, priorities=2)
    engine = Engine([work, sink], domain="t", broker=sqs)
    engine.put_many(range(200))
    engine.put_many(range(1000, 1200), priority=1)
    server.faults(latency_ms=50)
    with Background(engine, only="work"):
        eventually(lambda: len(log.lines()) >= 400)
        engine.stop()
    server.faults(latency_ms=0)
    order = log.lines()
    assert sorted(order) == [*range(200), *range(1000, 1200)]
    last_high = max(place for place, value in enumerate(order) if value >= 1000)
    # Receives that were under way when the higher level ran out may have brought the last of it late.
    assert last_high < 200 + 60


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_a_worker_killed_with_several_requests_under_way_loses_nothing(
    server: StandIn, sqs: SQS, log: Log, fifo: bool
) -> None:
    work = Task(noted, name="work", args=(log,), max_attempts=50)
    # Messages that receives under way brought are hidden for as long as the visibility timeout, 15 s at most.
    engine = Engine([source, work, sink], domain="t", broker=sqs, fifo=fifo, visibility_timeout=5)
    for value in range(0, 1500, 100):
        feed(engine, "work", range(value, value + 100))
    server.faults(latency_ms=100)
    with Background(engine, only="work"):
        for operation in (RECEIVE, SEND, DELETE):
            eventually(partial(is_under_way, server, operation))
            os.kill(log.lines()[-1], signal.SIGKILL)
            begun = len(log.lines())
            # The successor is at work.
            log.wait_for(begun + 1)
        server.faults(latency_ms=0)
        eventually(lambda: not _left(server, engine))
        engine.stop()
    assert len(set(log.lines())) == 4
    found = taken(engine, "sink")
    assert sorted(set(found)) == list(range(1500))
    if fifo:
        assert len(found) == 1500


def by_fifth(value):
    return str(value % 5)


def test_groups_keep_their_order_with_many_requests_under_way_that_fail(server: StandIn, sqs: SQS) -> None:
    work = Task(short, name="work", workers=2, group=by_fifth)
    engine = Engine([source, work, Task(sink, group=by_fifth)], domain="t", broker=sqs, fifo=True)
    for group in range(5):
        feed(engine, "work", range(group, 200, 5), group=str(group))
    server.faults(latency_ms=20, error=0.1, partial=0.1, lost_reply=0.03)
    with Background(engine, only="work"):
        eventually(lambda: not _left(server, engine))
        engine.stop()
    server.faults(latency_ms=0, error=0, partial=0, lost_reply=0)
    found = taken(engine, "sink")
    assert sorted(found) == list(range(200))
    for group in range(5):
        assert [value for value in found if value % 5 == group] == list(range(group, 200, 5))


def test_ctrl_c_while_values_are_fed_leaves_no_thread_and_sends_nothing_more(server: StandIn, sqs: SQS) -> None:
    engine = Engine([Task(short, name="work", input=True)], domain="t", broker=sqs)
    engine.put(-1)
    before = threading.active_count()

    def interrupt() -> None:
        eventually(lambda: server.ledger(messages=False)["requests"].get(SEND, {"under_way": 0})["under_way"] > 3)
        os.kill(os.getpid(), signal.SIGINT)

    server.faults(latency_ms=1000)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt) as caught:
        engine.put_many(range(1000))
    eventually(lambda: threading.active_count() == before)
    assert "of the next 240 some may have been, nothing after them was" in " ".join(caught.value.__notes__)
    server.faults(latency_ms=0)
    assert set(taken(engine, "work")) <= set(range(-1, 240))


def test_threads_that_cannot_be_started_cost_speed_only(
    server: StandIn, sqs: SQS, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith(("outbox-", "intake-")) and thread.name != "outbox-0":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    work = Task(short, name="work", max_attempts=2)
    engine = Engine([source, work, sink], domain="t", broker=sqs, start_method="fork")
    feed(engine, "work", range(100))
    server.faults(latency_ms=50)
    with Background(engine, only="work") as run:
        eventually(lambda: not _left(server, engine))
        engine.stop()
    server.faults(latency_ms=0)
    assert sorted(taken(engine, "sink")) == list(range(100))
    assert (run.summary["work"].done, run.summary["work"].failed) == (100, 0)
    assert most(server)[SEND] == 1
