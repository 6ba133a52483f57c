"""Late is late: a call that comes back after its timeout never counts as done, and takes nothing else along."""

import ctypes
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sqspipes_mp import SQS, Engine, Task
from sqspipes_mp.brokers.base import Completion, Output
from sqspipes_mp.supervisor import slot
from standin import standin
from standin.brokers import sqs_at
from tests.gates import (
    Background,
    Gate,
    Log,
    children,
    dead,
    drain,
    ended,
    engine_at,
    eventually,
    feed,
    kill,
    program,
    values,
)

LATE = "the call outlived the task's timeout"


def source() -> Iterator[object]:
    yield from ()


def sink(value: object) -> object:
    return value


def interrupted(value: object, log: Log, gate: Gate) -> object:
    """Block in C, holding the GIL, until the signal that asks for the stack interrupts it; then return."""
    log.note(value, os.getpid())
    if value == "late":
        ctypes.PyDLL(None).usleep(30_000_000)
    return value


def test_a_call_that_the_stack_signal_woke_is_charged_and_never_sent_on(db: Path, log: Log, gate: Gate) -> None:
    task = Task(interrupted, name="work", args=(log, gate), timeout=0.5, max_attempts=2)
    engine = engine_at(db, [source, task, sink], on_error="retry")
    feed(engine, "work", ["late", "next"])
    summary = drain(engine, "work")
    assert values(engine, "sink") == ["next"]
    [(body, failure)] = dead(engine, "work")
    assert '"late"' in body
    assert (failure.error, failure.attempts, LATE in failure.text) == ("TaskTimeout", 2, True)
    assert "in interrupted" in failure.stack
    assert (summary["work"].done, summary["work"].failed, summary["work"].dead) == (1, 2, 1)


@pytest.mark.parametrize("on_error", ["raise", "reject", "retry"])
def test_a_late_call_is_charged_in_every_mode_also_when_it_raised(db: Path, log: Log, on_error: str) -> None:
    engine = engine_at(
        db, [source, Task(over, name="work", args=(log, 0.3), timeout=0.2, max_attempts=2), sink], on_error=on_error
    )
    feed(engine, "work", ["returns", "raises"])
    drain(engine, "work")
    assert values(engine, "sink") == []
    letters = dead(engine, "work")
    assert [(failure.error, failure.attempts) for _, failure in letters] == [("TaskTimeout", 2)] * 2


def over(value: object, log: Log, seconds: float) -> object:
    """Take so long by the clock that times the call."""
    log.note(value, os.getpid())
    spin(time.monotonic_ns() + int(seconds * 1e9))
    if value == "raises":
        raise ValueError(value)
    return value


def spin(until: int) -> None:
    while time.monotonic_ns() < until:
        pass


def test_a_call_that_returns_1_ms_after_its_deadline_is_late(db: Path) -> None:
    engine = engine_at(db, [source, Task(around, name="work", timeout=0.5, max_attempts=1), sink], on_error="retry")
    # The first is so far within it that a busy machine does not make it late.
    feed(engine, "work", [-0.4, 0.001])
    drain(engine, "work")
    assert values(engine, "sink") == [-0.4]
    [(body, failure)] = dead(engine, "work")
    assert json.loads(body)["value"] == 0.001
    assert failure.error == "TaskTimeout"


def around(value: float) -> float:
    spin(time.monotonic_ns() + int((0.5 + value) * 1e9))
    return value


def test_the_worker_that_is_to_be_killed_late_keeps_the_message_it_has_begun_meanwhile(
    db: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As long as the late one has for its last words: the next one is in the middle of its call when the kill is due.
    monkeypatch.setattr(slot, "LAST_WORDS", 0.4)
    task = Task(slow_after, name="work", args=(log,), timeout=2.0, max_attempts=1, prefetch=5)
    engine = engine_at(db, [source, task, sink], on_error="retry", start_method="fork")
    feed(engine, "work", ["late", "next"])
    drain(engine, "work")
    assert values(engine, "sink") == ["next"]
    # It ran once, in the worker that lived on.
    assert [value for value, _ in log.lines()] == ["late", "next"]
    assert len({pid for _, pid in log.lines()}) == 1
    assert [failure.error for _, failure in dead(engine, "work")] == ["TaskTimeout"]


def slow_after(value: object, log: Log) -> object:
    log.note(value, os.getpid())
    if value == "late":
        ctypes.PyDLL(None).usleep(30_000_000)
    else:
        spin(time.monotonic_ns() + 800_000_000)
    return value


def test_a_late_thread_leaves_its_companions_alone(
    tmp_path: Path, new_gate: Callable[[], Gate], caplog: pytest.LogCaptureFixture
) -> None:
    for turn in range(5):
        caplog.clear()
        ran = _let_one_thread_be_late(tmp_path / f"{turn}.db", Log(str(tmp_path / f"{turn}.log")), new_gate())
        # On a busy machine the call is late by so much that its worker is killed, and its companions run once more.
        if "killed: its call" not in caplog.text:
            assert ran == ["1", "2", "late", "late"]
            return
    pytest.fail("the machine was too busy each time")


def _let_one_thread_be_late(db: Path, log: Log, gate: Gate) -> list[str]:
    task = Task(waits_or_is_late, name="work", args=(log, gate), threads=3, timeout=3.0, max_attempts=1)
    engine = engine_at(db, [source, task, sink], on_error="retry")
    feed(engine, "work", ["late"])
    with Background(engine, only="work", until="drained", idle=0.0):
        # Half of its time has gone by, so the others are not late when it is.
        log.wait_for(2)
        feed(engine, "work", [1, 2])
        log.wait_for(4)
        eventually(lambda: dead(engine, "work"))
        gate.open()
    assert sorted(values(engine, "sink")) == [1, 2]
    assert [failure.error for _, failure in dead(engine, "work")] == ["TaskTimeout"]
    return sorted(map(str, log.lines()))


def waits_or_is_late(value: object, log: Log, gate: Gate) -> object:
    log.note(value)
    if value == "late":
        # Lets go of the GIL, and comes back by itself a little late.
        ctypes.CDLL(None).usleep(1_500_000)
        log.note(value)
        ctypes.CDLL(None).usleep(1_520_000)
    else:
        gate.wait()
    return value


def test_a_late_batch_gives_nothing_and_its_members_run_one_by_one(db: Path, log: Log) -> None:
    task = Task(late_in_company, name="work", args=(log,), batch=3, batch_wait=0.9, timeout=0.4, max_attempts=1)
    engine = engine_at(db, [source, task, sink], on_error="retry")
    feed(engine, "work", [1, 2, 3])
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == [10, 20, 30]
    assert max(log.lines(), key=len) == [1, 2, 3]
    assert dead(engine, "work") == []


def late_in_company(batch: list[int], log: Log) -> list[int]:
    log.note(batch)
    if len(batch) > 1:
        spin(time.monotonic_ns() + 420_000_000)
        return [0 for _ in batch]
    return [value * 10 for value in batch]


def test_a_late_generator_is_charged_at_whichever_value_it_is(db: Path, log: Log) -> None:
    task = Task(streams_late, name="work", args=(log,), timeout=0.4, max_attempts=2)
    engine = engine_at(db, [source, task, sink], on_error="retry")
    feed(engine, "work", ["a yield", "the end", "in time"])
    drain(engine, "work")
    assert values(engine, "sink") == ["in time", "in time"]
    assert sorted((json.loads(body)["value"], failure.attempts) for body, failure in dead(engine, "work")) == [
        ("a yield", 2),
        ("the end", 2),
    ]


def streams_late(value: str, log: Log) -> Iterator[str]:
    log.note(value)
    yield value
    if value == "a yield":
        spin(time.monotonic_ns() + 450_000_000)
    yield value
    if value == "the end":
        spin(time.monotonic_ns() + 450_000_000)


def test_a_late_sources_value_is_dropped_and_the_next_call_goes_on(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(sometimes_late, name="src", args=(log,), timeout=0.4, interval=0.05), sink])
    with Background(engine, only="src"):
        log.wait_for(4)
        eventually(lambda: len(values(engine, "sink")) >= 2)
        engine.stop()
    assert 0 not in values(engine, "sink")


def sometimes_late(log: Log) -> int:
    number = len(log.lines())
    log.note(number)
    if number == 0:
        spin(time.monotonic_ns() + 450_000_000)
    return number


def test_a_late_generator_sources_successor_goes_on_where_it_was(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(late_once, name="src", args=(log,), timeout=0.5), sink])
    engine.run(only="src")
    assert values(engine, "sink") == [0, 1, 2, 3]


def late_once(log: Log) -> Iterator[int]:
    first = not log.lines()
    log.note("begins")
    for number in range(4):
        if number == 2 and first:
            spin(time.monotonic_ns() + 550_000_000)
        yield number


# --- SQS, some way off, with a backlog ---


@pytest.fixture(scope="module")
def far() -> Iterator[SQS]:
    """An SQS that is 60 ms away."""
    SQS().warm()
    with standin(latency_ms=60) as server:
        yield sqs_at(server.url)


def test_on_a_distant_sqs_a_late_call_is_charged_and_what_was_done_beside_it_is_not_run_again(
    far: SQS, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    task = Task(late_sleep, name="work", args=(log,), timeout=1.0, max_attempts=2)
    engine = Engine([source, task, sink], domain="late", broker=far, on_error="retry", start_method="fork")
    put(engine, [*range(12), "late", *range(12, 40)])
    engine.run(only=["work", "sink"], until="drained", idle=0.0)
    ran = log.lines()
    # Its two attempts, everything else once.
    assert sorted(ran, key=str) == sorted([*range(40), "late", "late"], key=str)
    [letter] = engine.dead_letters()
    assert (letter.value, letter.failure.error, letter.failure.attempts) == ("late", "TaskTimeout", 2)
    assert "was lost" not in caplog.text


def late_sleep(value: object, log: Log) -> object:
    log.note(value)
    if value == "late":
        time.sleep(1.02)
    return value


def put(engine: Engine, found: list[object]) -> None:
    queue = engine.pipeline.stage("work").inputs[-1]
    with closing(engine.broker.open()) as connection:
        connection.ensure(engine.pipeline.queues, create=True)
        for start in range(0, len(found), 10):
            bodies = [json.dumps({"meta": {"priority": 0}, "value": value}) for value in found[start : start + 10]]
            connection.complete([Completion(None, (Output(queue, body, os.urandom(8).hex()),)) for body in bodies])


# --- the time for which everything was stopped (Ctrl-Z) is nobody's ---

STOPPED = """
import sys
from tests.process.test_late import *
db, log, gate = sys.argv[1:]
if __name__ == "__main__":
    task = Task(waits, name="work", args=(Log(log), Gate(gate)), timeout=2.0, max_attempts=1)
    print(drain(engine_at(db, [source, task, sink], on_error="retry"), "work")["work"].failed)
"""


def waits(value: object, log: Log, gate: Gate) -> object:
    log.note(value)
    gate.wait()
    return value


@pytest.mark.parametrize("opened", ["while stopped", "afterwards"])
def test_the_time_of_a_stop_counts_towards_no_timeout(
    tmp_path: Path, db: Path, log: Log, gate: Gate, opened: str
) -> None:
    engine = engine_at(db, [source, Task(waits, name="work"), sink])
    feed(engine, "work", [1])
    with program(tmp_path, STOPPED, db, log.path, gate.path) as process:
        log.wait_for(1)
        pids = [process.pid, *(child.pid for child in children(process.pid))]
        for pid in pids:
            kill(pid, signal.SIGSTOP)
        if opened == "while stopped":
            gate.open()
        # Nothing can be waited for: what is tested is that time goes by.
        threading.Event().wait(2.6)
        for pid in reversed(pids):
            kill(pid, signal.SIGCONT)
        # The time it has left is its own.
        threading.Event().wait(0.3)
        gate.open()
        assert ended(process)[:2] == (0, "0\n")
    assert values(engine, "sink") == [1]
