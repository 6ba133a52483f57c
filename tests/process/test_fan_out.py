"""A generator function as a later stage: many outputs of one input, accepted before the input is deleted."""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from sqspipes_mp import Engine, Task, TaskLike, current_message
from standin import standin
from standin.brokers import sqs_at
from tests.gates import Background, Gate, Log, bodies, engine_at, eventually, feed, kill, present, values, waiting

MANY = 20_000
#: Outputs that are sent at once on SQLite.
BATCH = 100


def source() -> Iterator[int]:
    yield from ()


def sink(value: object) -> object:
    return value


def memory() -> int:
    return psutil.Process().memory_info().rss


def many(count: int, log: Log, gate: Gate) -> Iterator[object]:
    before = 0
    for number in range(count):
        if number == 1000:
            before = memory()
        yield number
    log.note(os.getpid(), memory() - before)
    gate.wait()


def test_a_long_stream_is_sent_as_it_comes_and_its_input_deleted_last(db: Path, log: Log, gate: Gate) -> None:
    engine = engine_at(db, [source, Task(many, name="work", args=(log, gate)), sink])
    feed(engine, "work", [MANY])
    with Background(engine, only="work", until="drained", idle=0.0):
        [(_, grown)] = log.wait_for(1)
        # All but the last batch is there, and the input still is, too.
        assert waiting(engine, "sink")[0] > MANY - 1000
        assert waiting(engine, "work")[1] == 1
        gate.open()
    assert values(engine, "sink") == list(range(MANY))
    assert bodies(engine, *engine.pipeline.stage("work").inputs) == []
    # All outputs would take some twenty times as much.
    assert grown < 4_000_000


def halts_half_way(value: int, log: Log, gate: Gate) -> Iterator[int]:
    log.note(os.getpid())
    for number in range(500):
        if number == 250 and len(log.lines()) == 1:
            gate.wait()
        yield number


def test_killed_half_way_it_begins_again_and_nothing_comes_twice(db: Path, log: Log, gate: Gate) -> None:
    engine = engine_at(db, [source, Task(halts_half_way, name="work", args=(log, gate)), sink])
    feed(engine, "work", [0])
    with Background(engine, only="work", until="drained", idle=0.0):
        [pid] = log.wait_for(1)
        eventually(lambda: waiting(engine, "sink")[0] >= 200)
        kill(pid)
    assert len(log.lines()) == 2
    assert values(engine, "sink") == list(range(500))


def test_longer_than_its_visibility_timeout_it_stays_in_one_hand(db: Path, log: Log, gate: Gate) -> None:
    tasks: list[TaskLike] = [source, Task(halts_half_way, name="work", args=(log, gate), workers=2), sink]
    engine = engine_at(db, tasks, visibility_timeout=4)
    feed(engine, "work", [0])
    with Background(engine, only="work", until="drained", idle=0.0):
        log.wait_for(1)
        # That long: the other worker would have it by now.
        threading.Event().wait(5.0)
        assert waiting(engine, "work") == (0, 1, 0)
        gate.open()
    assert len(log.lines()) == 1
    assert values(engine, "sink") == list(range(500))


def in_two_parts(value: int, log: Log, gate: Gate, parts: tuple[int, int]) -> Iterator[int]:
    deadline = present(current_message().deadline)
    log.note(os.getpid())
    gate.wait()
    yield from range(parts[0])
    log.note(present(current_message().deadline) - deadline)
    # Long enough for whoever looks at timeouts to see that this call runs.
    threading.Event().wait(0.8)
    yield from range(*parts)


def test_a_timeout_does_not_count_what_sending_takes(db: Path, log: Log, gate: Gate) -> None:
    # What comes after the first part is asked for once that is sent.
    tasks: list[TaskLike] = [
        source,
        Task(in_two_parts, name="work", args=(log, gate, (BATCH, 2 * BATCH + 1)), timeout=2.5),
        sink,
    ]
    engine = engine_at(db, tasks)
    feed(engine, "work", [0])
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        log.wait_for(1)
        with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as other:
            # Nobody else can write until this ends.
            other.execute("BEGIN IMMEDIATE")
            gate.open()
            threading.Event().wait(3.5)
            other.execute("ROLLBACK")
    [_, longer] = log.lines()
    assert longer > 2.5
    assert values(engine, "sink") == list(range(2 * BATCH + 1))
    assert (run.summary["work"].done, run.summary["work"].retried) == (1, 0)
    assert run.summary["work"].p95 < 3.5


def one() -> Iterator[int]:
    yield 0


def told(value: int, log: Log) -> None:
    log.note(value)


def test_killed_half_way_on_a_fifo_queue_nothing_comes_twice_either(log: Log, gate: Gate, tmp_path: Path) -> None:
    out = Log(str(tmp_path / "out"))
    with standin() as server:
        tasks: list[TaskLike] = [one, Task(halts_half_way, name="work", args=(log, gate)), Task(told, args=(out,))]
        engine = Engine(tasks, domain="t", broker=sqs_at(server.url), fifo=True)
        with Background(engine, until="drained"):
            [pid] = log.wait_for(1)
            out.wait_for(200)
            kill(pid)
    assert len(log.lines()) == 2
    assert sorted(out.lines()) == list(range(500))
