"""A few of the promises on SQS's wire (moto); the others are about processes and do not depend on the broker."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sqspipes_mp import SQS, Engine, Reject, Retry, Task, TaskLike
from sqspipes_mp.brokers.base import Completion, Output, QueueSpec
from tests.gates import Background, Gate, Log, ended, eventually, program, waiting

pytestmark = pytest.mark.slow


def numbers():
    yield from range(12)


def work(value, log: Log, act: str):
    log.note(value)
    first = log.lines().count(value) == 1
    if value == 5:
        if act == "raise" and first:
            raise ValueError("five")
        if act == "retry" and first:
            raise Retry(0)
        if act == "reject":
            raise Reject("five")
        if act == "die" and first:
            os._exit(1)
    return value


def sink(value, log: Log):
    log.note(value)


@pytest.fixture
def engine(moto: SQS, log: Log, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    out = Log(str(tmp_path / "out"))
    domain = f"sqs-{request.param}"
    tasks: list[TaskLike] = [numbers, Task(work, args=(log, request.param)), Task(sink, args=(out,))]
    # A lease that may run out on a busy machine doubles a message: short only where its end is waited for.
    visibility = {"die": 2, "raise": 6}.get(request.param, 30)
    engine = Engine(tasks, domain=domain, broker=moto, visibility_timeout=visibility)
    yield engine
    engine.delete()


def done(tmp_path: Path) -> list[int]:
    return sorted(Log(str(tmp_path / "out")).lines())


@pytest.mark.parametrize("engine", ["raise"], indirect=True)
def test_an_exception_comes_out_and_its_message_is_visible_again(engine: Engine, tmp_path: Path, log: Log) -> None:
    with pytest.raises(ValueError, match="five"):
        engine.run()
    eventually(lambda: [stage.in_flight for stage in engine.stats().stages] == [0, 0, 0])
    stats = engine.stats()
    assert stats["work"].visible >= 1
    engine.run(only=["work", "sink"], until="drained", idle=0.0)
    assert set(done(tmp_path)) == set(log.lines())
    assert log.lines().count(5) == 2


@pytest.mark.parametrize("engine", ["retry"], indirect=True)
def test_a_retried_message_is_done_in_the_end(engine: Engine, tmp_path: Path) -> None:
    summary = engine.run(until="drained")
    assert done(tmp_path) == list(range(12))
    assert (summary["work"].retried, summary.dead) == (1, 0)


@pytest.mark.parametrize("engine", ["reject"], indirect=True)
def test_a_rejected_message_is_in_the_dead_letter_queue(engine: Engine, tmp_path: Path) -> None:
    engine.run(until="drained")
    assert done(tmp_path) == [number for number in range(12) if number != 5]
    assert engine.stats()["work"].dead == 1


@pytest.mark.parametrize("engine", ["die"], indirect=True)
def test_a_killed_workers_messages_are_done_in_the_end(engine: Engine, tmp_path: Path) -> None:
    summary = engine.run(until="drained")
    # A standard queue: what was sent but not yet deleted at the death may come twice.
    assert set(done(tmp_path)) == set(range(12))
    assert summary["work"].failed == 1
    assert summary.dead == 0


PROGRAM = """
import sys
from sqspipes_mp import Engine, SQS, Task
from tests.gates import Log
from tests.system.test_sqs import numbers, sink
url, log = sys.argv[1:]
broker = SQS("us-east-1", endpoint_url=url, access_key="testing", secret_key="testing")
engine = Engine([numbers, Task(sink, args=(Log(log),))], domain="sqs-stop", broker=broker)
print(engine.run().reason)
"""


def test_sigterm_ends_a_long_poll_at_once_and_leaves_nothing_in_flight(
    tmp_path: Path, moto: SQS, moto_url: str, log: Log
) -> None:
    with program(tmp_path, PROGRAM, moto_url, log.path) as process:
        log.wait_for(12)
        process.terminate()
        code, output, errors = ended(process)
    assert (code, output) == (0, "SIGTERM\n"), errors
    engine = Engine([numbers, Task(sink, args=(log,))], domain="sqs-stop", broker=moto)
    assert waiting(engine, "sink") == (0, 0, 0)
    engine.delete()


def test_a_message_running_longer_than_its_lease_comes_once(moto: SQS, log: Log, gate: Gate) -> None:
    tasks: list[TaskLike] = [one, Task(held, workers=2, args=(log, gate))]
    engine = Engine(tasks, domain="sqs-lease", broker=moto, visibility_timeout=4, start_method="fork")
    with Background(engine, until="drained"):
        log.wait_for(1)
        # The broker keeps the time: a message sent beside it, with a delay longer than two leases, has come.
        wait_for_the_broker(moto)
        gate.open()
    assert log.lines() == [1]
    engine.delete()


def one():
    yield 1


def held(value, log: Log, gate: Gate):
    log.note(value)
    gate.wait()


def wait_for_the_broker(moto: SQS) -> None:
    with contextlib.closing(moto.open()) as connection:
        connection.ensure([QueueSpec(name="sqs-clock", fifo=False, visibility=30)], create=True)
        connection.complete([Completion(None, (Output("sqs-clock", "tick", "tick", delay=9),))])
        eventually(lambda: connection.receive(["sqs-clock"], 1, 20, 30))
        connection.delete(["sqs-clock"])


LEFT_AT_SQS = """
import logging, sys
from sqspipes_mp import Engine, Task
from standin.brokers import sqs_at
from tests.system.test_sqs import numbers
def end(value):
    pass
logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
engine = Engine([numbers, Task(end)], domain="left-at-sqs", broker=sqs_at(sys.argv[1]))
engine.run(only="numbers")
engine.run(until="drained")
print("counted")
print(engine.run(only=["end"], until="drained", idle=0)["end"].done)
engine.delete()
"""


def test_a_source_that_begins_among_what_is_left_names_the_run_that_finishes_it(tmp_path: Path, moto_url: str) -> None:
    with program(tmp_path, LEFT_AT_SQS, moto_url) as process:
        code, out, errors = ended(process)
    assert (code, out) == (0, "counted\n0\n")
    (told,) = (line for line in errors.splitlines() if line.startswith("WARNING left-at-sqs: messages of an earlier"))
    assert "(12)" in told
    assert """run(only=['end'], until="drained", idle=1)""" in told
