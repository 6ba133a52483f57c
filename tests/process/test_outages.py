"""What the queues themselves do to a run: deleted, denied, expired, full. Each ends or waits with a clear word."""

import contextlib
import logging
import resource
import socket
import threading
import time
from pathlib import Path

import pytest

from sqspipes_mp import SQS, AccessDenied, BrokerError, Engine, QueueMissing, Task, TaskLike
from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.brokers.sqs import faults as sqs_errors
from sqspipes_mp.pipeline.plan import RunPlan
from standin import StandIn
from standin.brokers import sqs_at
from tests.gates import Background, Gate, Log, children, drain, engine_at, feed, values, waiting


def source():
    yield from ()


def gated(value, log: Log, gate: Gate):
    log.note(value)
    gate.wait()
    return value


def sink(value):
    pass


def gated_engine(broker: Broker, log: Log, gate: Gate) -> Engine:
    tasks: list[TaskLike] = [source, Task(gated, name="work", args=(log, gate)), sink]
    return Engine(tasks, domain="t", broker=broker, start_method="fork", shutdown_grace=5)


def closed_port() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_an_endpoint_where_nobody_answers_is_one_error_soon_and_no_worker_starts(log: Log) -> None:
    url = closed_port()
    work = Task(sink, name="work", workers=8, init=lambda: log.note("a worker"))
    engine = Engine(
        [source, work], domain="t", broker=sqs_at(url), setup=lambda: log.note("a child"), start_method="fork"
    )
    began = time.monotonic()
    with pytest.raises(BrokerError, match=f"{url}.*Nothing usable answers there") as caught:
        engine.run(only="work")
    assert time.monotonic() - began < 30
    assert caught.value.__cause__ is None
    # The keeper asked for all of them.
    assert log.lines() == ["a child"]
    assert children() == []


@pytest.mark.parametrize("kind", ["sqs", "sqlite"])
def test_an_output_queue_deleted_while_running_is_one_error_and_the_input_is_back(
    request: pytest.FixtureRequest, db: Path, log: Log, gate: Gate, kind: str
) -> None:
    broker = request.getfixturevalue("sqs") if kind == "sqs" else engine_at(db, [source]).broker
    engine = gated_engine(broker, log, gate)
    feed(engine, "work", range(5))
    with pytest.raises(QueueMissing, match=r"'t-work' does not exist.*[Cc]reate"), Background(engine, only="work"):
        log.wait_for(1)
        with contextlib.closing(broker.open()) as connection:
            connection.delete(["t-work"])
        gate.open()
    if kind == "sqs":
        # A long poll that was cut may have taken some once more, for 15 s at most.
        request.getfixturevalue("server").advance(16)
    with contextlib.closing(broker.open()) as connection:
        depth = connection.depth("t-source")
    assert (depth.visible, depth.in_flight) == (5, 0)


@pytest.mark.parametrize("kind", ["sqs", "sqlite"])
def test_an_input_queue_deleted_while_running_is_one_error(
    request: pytest.FixtureRequest, db: Path, log: Log, gate: Gate, kind: str
) -> None:
    broker = request.getfixturevalue("sqs") if kind == "sqs" else engine_at(db, [source]).broker
    engine = gated_engine(broker, log, gate)
    feed(engine, "work", [0])
    with pytest.raises(QueueMissing, match="'t-source' does not exist"), Background(engine, only="work"):
        log.wait_for(1)
        with contextlib.closing(broker.open()) as connection:
            connection.delete(["t-source"])
        gate.open()


def test_a_right_taken_away_while_running_is_one_error_and_the_input_is_back(
    sqs: SQS, server: StandIn, log: Log, gate: Gate
) -> None:
    engine = gated_engine(sqs, log, gate)
    feed(engine, "work", range(5))
    with (
        pytest.raises(AccessDenied, match=r"'t-work'.*AccessDenied.*Allow sqs:SendMessage"),
        Background(engine, only="work"),
    ):
        log.wait_for(1)
        server.plan("SendMessageBatch", "denied", times=3)
        gate.open()
    server.advance(16)
    assert waiting(engine, "work") == (5, 0, 0)


def test_credentials_that_expire_while_running_are_one_error_and_nothing_is_lost(
    sqs: SQS, server: StandIn, log: Log, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqs_errors, "REFUSED_PATIENCE", 0.5)
    engine = gated_engine(sqs, log, gate)
    feed(engine, "work", range(5))
    with pytest.raises(AccessDenied, match=r"ExpiredToken.*not expired"), Background(engine, only="work"):
        log.wait_for(1)
        server.keys(expire=["testing"])
        gate.open()
    server.keys(renew=["testing"])
    # Nobody could give anything back; the leases end by themselves.
    server.advance(61)
    drain(engine, "work")
    depth = engine.stats()["sink"]
    assert (depth.visible, waiting(engine, "work")) == (5, (0, 0, 0))


@pytest.mark.slow
def test_a_network_that_stands_still_for_longer_than_a_keeper_may_costs_no_lease(
    sqs: SQS, server: StandIn, log: Log, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second worker would take the message, were its lease to end.
    tasks: list[TaskLike] = [source, Task(gated, name="work", args=(log, gate), workers=2), sink]
    monkeypatch.setattr(RunPlan, "keeper_patience", 0.5)
    engine = Engine(tasks, domain="t", broker=sqs, start_method="fork", visibility_timeout=8)
    clock = threading.Event()
    feed(engine, "work", [0])
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        log.wait_for(1)
        begun = time.monotonic()
        # Its lease is due at 4 s; a keeper that has not moved for 1 s is replaced.
        clock.wait(3.8)
        server.pause()
        clock.wait(1.4)
        assert server.ledger(messages=False)["held"] > 0
        server.resume()
        # Past the end of the lease that was due.
        clock.wait(begun + 8.3 - time.monotonic())
        gate.open()
    assert log.lines() == [0]
    assert run.summary["work"].done == 1
    [message] = server.messages("t-source")
    assert message["received"] == 1


# --- a full disk ---


class Heard(logging.Handler):
    """Notes what a worker says about its file."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if "the disk" in record.getMessage():
            self._log.note("disk")


class NoRoom:
    """A ``setup`` that lets no file grow beyond a size: writing fails, as on a full disk."""

    def __init__(self, log: Log, size: int) -> None:
        self._log = log
        self._size = size

    def __call__(self) -> None:
        logging.getLogger("sqspipes_mp.brokers.sqlite").addHandler(Heard(self._log))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, resource.RLIM_INFINITY))


def large(value):
    return str(value) * 50_000


def test_a_disk_without_room_is_waited_for_and_nothing_is_lost(db: Path, log: Log) -> None:
    engine = engine_at(db, [source, Task(large, name="work"), sink], setup=NoRoom(log, 200_000), start_method="fork")
    feed(engine, "work", range(8))
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        log.wait_for(1)
        for child in children():
            # There is room again.
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert run.summary["work"].done == 8
    assert sorted(value[0] for value in values(engine, "sink")) == [str(n) for n in range(8)]
    assert waiting(engine, "work") == (0, 0, 0)
