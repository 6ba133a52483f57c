"""``map(keep_results=True)``: every run hands out every value's results, whoever finished it, each once."""

import contextlib
import json
import logging
import os
import signal
import sqlite3
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import (
    SQS,
    ConfigError,
    EmptyTaskOutput,
    Engine,
    OutputError,
    Reject,
    RemoteError,
    ResultsNotKept,
    SQLite,
    Task,
    TaskLike,
    WorkerLost,
)
from sqspipes_mp.caller.dead_letters import discard, redrive
from sqspipes_mp.caller.feed import Feeder
from sqspipes_mp.messages.ids import token
from sqspipes_mp.pipeline.value_ends import KEEP
from tests.gates import Gate, Log, children, ended, eventually, kill, program, query

EARLIER = "were done by earlier runs"


def fan_out(value):
    """Drop some values; make one to three messages of the others."""
    if value % 5 != 1:
        for index in range(value % 3 + 1):
            yield value, index


def finish(pair):
    value, index = pair
    if value % 7 == 3 and index == 0:
        raise Reject("no")
    if value % 11 == 4:
        return EmptyTaskOutput
    return value, index, None


def results_of(value: int) -> list[Any]:
    pairs = [(value, index) for index in range(value % 3 + 1)] if value % 5 != 1 and value % 11 != 4 else []
    return [[value, index, None] for _, index in pairs if value % 7 != 3 or index]


def fails(value: int) -> bool:
    return value % 5 != 1 and value % 7 == 3


def noted(value, log: Log):
    log.note(value)
    return value


def pipeline(db: Path, *tasks: TaskLike, **settings: Any) -> Engine:
    chosen = tasks or (Task(fan_out, input=True, workers=2), Task(finish, workers=2))
    return Engine(list(chosen), domain="t", broker=SQLite(db), visibility_timeout=2, **settings)


def run(engine: Engine, values: Any, **options: Any) -> list[Any]:
    return list(engine.map(values, key=str, keep_results=True, return_exceptions=True, with_input=True, **options))


def check(found: list[Any], values: Any) -> None:
    given = Counter((value, str(result)) for value, result in found if not isinstance(result, Exception))
    assert given == Counter((value, str(result)) for value in values for result in results_of(value))
    assert sorted(value for value, error in found if isinstance(error, Exception)) == [v for v in values if fails(v)]


@pytest.mark.parametrize("fifo", [False, True])
def test_every_run_hands_out_every_result_once(db: Path, fifo: bool, caplog: pytest.LogCaptureFixture) -> None:
    engine = pipeline(db, fifo=fifo)
    check(run(engine, range(60)), range(60))
    assert EARLIER not in caplog.text
    # With new values among the old ones, and old ones that come twice.
    check(run(engine, [*range(0, 120, 2), *range(1, 120, 2), *range(50)]), range(120))
    assert " values were done by earlier runs since 20" in caplog.text
    assert "purge()" in caplog.text
    in_order = run(engine, [*range(120), *range(120)], ordered=True)
    check(in_order, range(120))
    assert [value for value, _ in in_order] == sorted(value for value, _ in in_order)


def test_a_run_that_finishes_the_map_keeps_its_results(db: Path) -> None:
    engine = pipeline(db, on_error="reject")
    results = engine.map(range(100), key=str, keep_results=True, return_exceptions=True)
    next(results)
    results.close()
    assert engine.run(until="drained", idle=0)["finish"].done > 0
    check(run(engine, range(100)), range(100))


def taking(value):
    return value, "text"


@pytest.mark.parametrize("ordered", [False, True])
def test_results_that_a_run_made_of_an_interrupted_map_are_the_resumed_ones(db: Path, ordered: bool) -> None:
    engine = Engine([Task(taking, input=True)], domain="t", broker=SQLite(db))
    results = engine.map(range(40), key=str)
    before = [next(results) for _ in range(5)]
    results.close()
    # Also that of the fifth one, which was handed out and not acknowledged.
    assert engine.run(until="drained", idle=0)["taking"].done > 0
    first = engine.map([*range(50), 3, 20], key=str, resume=True, ordered=ordered)
    before += [next(first) for _ in range(10)]
    first.close()
    rest = list(engine.map([*range(50), 3, 20], key=str, resume=True, ordered=ordered))
    found = [value for value, _ in [*before, *rest]]
    assert sorted(set(found)) == list(range(50))
    # The fifth, and the last one of the map that was closed: not acknowledged.
    assert len(found) == 50 + 2
    assert list(engine.map(range(50), key=str, resume=True)) == []
    assert query(db, "SELECT count(*) FROM ends") == [0]


def log_to(path: Path) -> None:
    logging.basicConfig(filename=path, force=True)


def test_a_result_of_a_run_that_is_no_json_is_told(db: Path, tmp_path: Path) -> None:
    told = tmp_path / "log"
    engine = pipeline(db, Task(no_json, input=True), setup=partial(log_to, told))
    results = engine.map([1, 2], key=str)
    next(results)
    results.close()
    engine.run(until="drained", idle=0)
    assert list(engine.map([1, 2], key=str, resume=True)) == []
    assert "a map that is resumed will not have the result of message" in told.read_text()


def test_nothing_is_run_again(db: Path, log: Log) -> None:
    engine = pipeline(db, Task(noted, args=(log,)))
    for _ in range(2):
        assert sorted(engine.map(range(30), key=str, keep_results=True)) == list(range(30))
    assert sorted(log.lines()) == list(range(30))


def many(value):
    yield from (f"{value}/{index}" for index in range(40))


def pairs(values):
    return [(value, None) for value in values]


def test_many_results_of_one_value_come_in_their_order(db: Path) -> None:
    engine = pipeline(db, many)
    expected = [f"{value}/{index}" for value in (1, 2) for index in range(40)]
    for _ in range(2):
        assert list(engine.map([1, 2], key=str, keep_results=True, ordered=True)) == expected


def test_results_of_a_batch_are_kept(db: Path) -> None:
    engine = pipeline(db, Task(pairs, input=True, batch=8, batch_wait=0.1))
    for _ in range(2):
        assert sorted(engine.map(range(20), key=str, keep_results=True)) == [[value, None] for value in range(20)]


def test_kept_results_are_read_in_pages_and_no_transaction_is_open_meanwhile(db: Path) -> None:
    engine = pipeline(db, noted_nothing)
    assert list(engine.map([0], key=str, keep_results=True)) == [0]
    count, long = 2_000, "x" * 5_000
    with contextlib.closing(sqlite3.connect(db)) as file, file:
        [queue] = file.execute("SELECT id FROM queues WHERE name = 't--input'").fetchone()
        tokens = [(queue, token(str(value))) for value in range(1, count)]
        file.executemany("INSERT INTO keys (queue, hop) VALUES (?, ?)", tokens)
        ends = ((*each, number, json.dumps(long)) for number, each in enumerate(tokens, start=10))
        file.executemany("INSERT INTO ends (queue, token, seq, kept, result) VALUES (?, ?, ?, 1, ?)", ends)
        file.execute("UPDATE meta SET next_seq = next_seq + ?", (count + 10,))
    found = 0
    tracemalloc.start()
    try:
        with engine.map(range(count), key=str, keep_results=True) as results:
            for _ in results:
                found += 1
                if found == count // 2:
                    # It waits for whoever reads, and a reader in the loop's body would stay.
                    eventually(lambda: not checkpointed(db), "no transaction is open")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == count
    # The results of the values that it has read ahead.
    assert peak < len(long) * count / 2


def checkpointed(db: Path) -> int:
    """Bring everything from the WAL into the file; not 0: somebody reads an older state."""
    with contextlib.closing(sqlite3.connect(db)) as file:
        busy: int = file.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        return busy


def no_json(value):
    return {value}


def test_a_result_that_is_no_json_fails_its_function(db: Path) -> None:
    with pytest.raises(OutputError, match=r"keep_results=True.*keeps it"):
        list(pipeline(db, no_json).map([1], key=str, keep_results=True))


def test_values_done_without_keeping_are_an_error(db: Path) -> None:
    engine = pipeline(db, noted_nothing)
    assert sorted(engine.map(range(4), key=str)) == list(range(4))
    assert list(engine.map([4], key=str, keep_results=True)) == [4]
    with pytest.raises(ResultsNotKept, match="4 values of 't' were done without") as caught:
        list(engine.map(range(5), key=str, keep_results=True))
    assert caught.value.count == 4
    # The others are there, and without keeping all is as it was.
    assert list(engine.map([4], key=str, keep_results=True)) == [4]
    assert list(engine.map(range(5), key=str, resume=True)) == []
    engine.purge()
    assert query(db, "SELECT count(*) FROM ends") == [0]
    assert sorted(engine.map(range(5), key=str, keep_results=True)) == list(range(5))


def noted_nothing(value):
    return value


def test_values_under_way_without_keeping_are_an_error(db: Path) -> None:
    engine = pipeline(db, Task(noted_nothing, input=True))
    engine.put_many(range(3), key=str)
    with pytest.raises(ResultsNotKept, match="3 values of 't' are under way without"):
        engine.map(range(5), key=str, keep_results=True)
    assert sorted(engine.map(range(3), key=str, resume=True)) == [0, 1, 2]


def dies(value):
    if value == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if value == 2:
        raise Reject("two")
    return value


def test_dead_letters_are_ends_too(db: Path) -> None:
    engine = pipeline(db, Task(dies, input=True, max_attempts=1))
    first = dict(run(engine, range(4)))
    assert {value: type(result) for value, result in first.items()} == {0: int, 1: WorkerLost, 2: Reject, 3: int}
    assert query(db, "SELECT count(*) FROM ends") == [4]
    again = dict(run(engine, range(4)))
    assert {value: type(result) for value, result in again.items()} == {0: int, 1: RemoteError, 2: RemoteError, 3: int}
    # Once redriven, a value is under way again.
    redrive(engine.pipeline, engine.broker, [letter.id for letter in engine.dead_letters() if letter.value == 2])
    assert {value: type(result) for value, result in run(engine, range(4))}[2] is Reject
    discard(engine.pipeline, engine.broker, None)
    assert sorted(run(engine, range(4))) == [(0, 0), (3, 3)]


def test_a_letter_that_the_queue_moved_itself_ends_with_its_discard(db: Path) -> None:
    engine = pipeline(db, Task(noted_nothing, input=True))
    feeding = engine.map([1], key=str, keep_results=True)
    assert next(feeding) == 1
    # Not acknowledged: its message comes again.
    feeding.close()
    with sqlite3.connect(db) as file:
        file.execute("UPDATE messages SET receives = 1000, visible_at = 0")
    file.close()
    engine.run(until="drained", idle=0)
    assert query(db, "SELECT count(*) FROM ends") == [0]
    [(value, error)] = run(engine, [1])
    assert (value, type(error)) == (1, RemoteError)
    discard(engine.pipeline, engine.broker, None)
    assert run(engine, [1]) == []


def gated(value, log: Log, gate: Gate):
    log.note(os.getpid())
    gate.wait()
    yield value, 1
    yield value, 2


def on_gate(db: Path | str, log: Log, gate: Gate) -> Engine:
    task = Task(gated, input=True, args=(log, gate), prefetch=0)
    return Engine([task], domain="t", broker=SQLite(db), on_error="retry", visibility_timeout=2)


PROGRAM = """
import sys
from tests.process.test_kept_results import *
on_gate(sys.argv[1], Log(sys.argv[2]), Gate(sys.argv[3])).run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "keeper", "supervisor"])
def test_killed_before_its_results_are_recorded_a_value_has_them_once(
    tmp_path: Path, db: Path, log: Log, gate: Gate, victim: str
) -> None:
    engine = on_gate(db, log, gate)
    feeder = Feeder(engine.pipeline, engine._parts.settings, key=str)
    feeder.mark = KEEP
    with contextlib.closing(engine.broker.open()) as connection:
        feeder.send(connection, [feeder.item(value) for value in range(3)])
    with contextlib.ExitStack() as programs:
        process = programs.enter_context(program(tmp_path, PROGRAM, db, log.path, gate.path))
        [worker, *_] = log.wait_for(1)
        # Its call ends while the file is locked: nothing is recorded, and nothing deleted.
        with contextlib.closing(sqlite3.connect(db, isolation_level=None, timeout=30)) as file:
            file.execute("BEGIN IMMEDIATE")
            gate.open()
            below = [child.pid for child in children(process.pid)]
            [keeper] = [pid for pid in below if pid != worker]
            for pid in [worker] if victim == "worker" else [keeper] if victim == "keeper" else [process.pid, *below]:
                with contextlib.suppress(ProcessLookupError):
                    kill(pid)
            file.execute("ROLLBACK")
        if victim == "supervisor":
            ended(process)
            process = programs.enter_context(program(tmp_path, PROGRAM, db, log.path, gate.path))
        eventually(lambda: query(db, "SELECT count(*) FROM messages") == [0], "all values are done")
        eventually(lambda: children(process.pid), "the program runs")
        process.terminate()
        status, _, errors = ended(process)
    assert status == 0, errors
    wanted = [(value, [value, index]) for value in range(3) for index in (1, 2)]
    for _ in range(2):
        assert sorted(run(engine, range(3))) == wanted


def test_what_cannot_keep_says_so(db: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_results.*SQS"):
        Engine([noted_nothing], domain="t", broker=SQS("us-east-1", access_key="x", secret_key="x")).map(
            [1], key=str, keep_results=True
        )
    with pytest.raises(ConfigError, match=r"given with keep_results=True"):
        pipeline(db, noted_nothing).map([1], keep_results=True)
    assert not db.exists()
