"""Kept results, killed at each step between a result's hand-out and its record, and with values that go on."""

import contextlib
import multiprocessing
import os
import sqlite3
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import Continue, Engine, SQLite, SupervisorLost, Task
from tests.gates import Gate, Log, alive, children, direct_children, eventually, kill, present, query

VALUES = range(4)


def noted(value: int, log: Log) -> list[int]:
    log.note(value, os.getpid())
    return [value]


def kept_map(engine: Engine, values: Any = VALUES) -> Any:
    return engine.map(values, key=str, keep_results=True, with_input=True)


@pytest.mark.parametrize(
    ("point", "victim"),
    [
        ("handed out", "worker"),
        ("handed out", "supervisor"),
        ("acknowledged", "worker"),
        ("acknowledged", "keeper"),
        ("acknowledged", "supervisor"),
        ("recorded", "worker"),
    ],
)
def test_killed_between_hand_out_and_record_each_run_has_each_result_once(
    db: Path, log: Log, point: str, victim: str
) -> None:
    engine = Engine([Task(noted, input=True, args=(log,))], domain="t", broker=SQLite(db), visibility_timeout=2)
    results = kept_map(engine)
    found = [next(results)]
    worker = log.wait_for(len(VALUES))[0][1]
    [supervisor] = direct_children()
    [keeper] = {child.pid for child in children(supervisor)} - {worker}
    with contextlib.closing(sqlite3.connect(db, isolation_level=None, timeout=30)) as lock:
        if point == "acknowledged":
            # The record and the delete are one transaction, which waits.
            lock.execute("BEGIN IMMEDIATE")
        if point != "handed out":
            found.append(next(results))
        if point == "recorded":
            eventually(lambda: query(db, "SELECT count(*) FROM ends")[0], "the first result is recorded")
        pid = {"worker": worker, "keeper": keeper, "supervisor": supervisor}[victim]
        kill(pid)
        eventually(lambda: not alive(pid))
        if lock.in_transaction:
            lock.execute("ROLLBACK")
    wanted = [(value, [value]) for value in VALUES]
    if victim == "supervisor":
        with pytest.raises(SupervisorLost):
            found += results
        eventually(lambda: not children(), "its children are gone, too")
        found = list(kept_map(engine))
    else:
        found += results
    assert sorted(found) == wanted
    calls = len(log.lines())
    again = kept_map(engine)
    next(again)
    again.close()
    assert sorted(kept_map(engine)) == wanted
    assert len(log.lines()) == calls


# --- values that go on ---

#: Steps of a value, and the calls' ends before and after the kill.
STEPS = 12
#: Results of each step of a fan-out.
WIDE = 20
TWO = range(2)
#: The first result of the second value's second call.
IN_THE_MIDDLE = [1, 3 * WIDE]
CUTS = {"before": (3, 7, STEPS), "after": (2, 5, 9, STEPS)}


def end_of_call(value: int, done: int, log: Log, cuts: Log) -> int:
    run = cuts.lines()[-1]
    log.note(value, done, run, os.getpid())
    return next(end for end in CUTS[run] if end > done)


def process_of(log: Log) -> int | None:
    """Return the process of the second value's second call in the first run."""
    return next((pid for *call, pid in log.lines() if call == [1, 3, "before"]), None)


def adds(state: Any, log: Log, gate: Gate, cuts: Log) -> Any:
    """Add up a value's steps over several calls."""
    value, done, total = state if isinstance(state, list) else (state, 0, 0)
    end = end_of_call(value, done, log, cuts)
    if (value, done, end) == (1, 3, 7):
        gate.wait()
    total += sum(range(done, end))
    return Continue([value, end, total]) if end < STEPS else (value, total)


def spreads(state: Any, log: Log, _: Gate, cuts: Log) -> Generator[Any, None, Continue | None]:
    """Yield ``WIDE`` results for each of a value's steps, over several calls."""
    value, done = state if isinstance(state, list) else (state, 0)
    end = end_of_call(value, done, log, cuts)
    yield from ((value, part) for part in range(done * WIDE, end * WIDE))
    return Continue([value, end]) if end < STEPS else None


def going_on(db: Path, function: Callable[..., Any], *args: object) -> Engine:
    task = Task(function, name="work", input=True, args=args)
    return Engine([task], domain="t", broker=SQLite(db), on_error="retry", visibility_timeout=2)


def read(engine: Engine, got: Log, gate: Gate) -> None:
    for value, result in kept_map(engine, TWO):
        got.note(value, result)
        if result == IN_THE_MIDDLE:
            gate.wait()


@pytest.mark.parametrize("function", [adds, spreads])
def test_values_that_go_on_have_their_results_kept_once_though_all_is_killed_and_calls_end_elsewhere(
    db: Path, log: Log, gate: Gate, function: Callable[..., Any]
) -> None:
    cuts, got = Log(f"{log.path}-cuts"), Log(f"{log.path}-got")
    engine = going_on(db, function, log, gate, cuts)
    cuts.note("before")
    process = multiprocessing.get_context("fork").Process(target=read, args=(engine, got, gate))
    process.start()
    try:
        if function is adds:
            eventually(lambda: process_of(log), "a call in the middle of its value runs")
        else:
            # Its call is over, and its continuation waits for the results to be acknowledged.
            eventually(lambda: (1, IN_THE_MIDDLE) in got.lines(), "a result is in the caller's hands")
    finally:
        below = [child.pid for child in children(process.pid)]
        for pid in (process.pid, *below):
            with contextlib.suppress(ProcessLookupError):
                kill(pid or 0)
        process.join()
        process.close()
    eventually(lambda: not any(alive(pid) for pid in below))
    cuts.note("after")
    if function is adds:
        wanted = [(value, [value, sum(range(STEPS))]) for value in TWO]
    else:
        wanted = [(value, [value, part]) for value in TWO for part in range(STEPS * WIDE)]
    assert sorted(kept_map(engine, TWO)) == wanted
    calls = log.lines()
    assert {done for _, done, run, _ in calls if run == "after"} > {5, 9}
    assert sorted(kept_map(engine, TWO)) == wanted
    assert log.lines() == calls
    assert all(line in wanted for line in got.lines())


def test_iterated_results_of_a_value_that_goes_on_come_once_though_its_call_ends_elsewhere(
    db: Path, log: Log, gate: Gate
) -> None:
    cuts = Log(f"{log.path}-cuts")
    engine = going_on(db, spreads, log, gate, cuts)
    cuts.note("before")
    engine.put_many(TWO)
    found = []
    with engine.run(iterate=True, until="drained", idle=0.0) as results:
        for result in results:
            found.append(result)
            if list(result) == IN_THE_MIDDLE:
                # Its call is over, and its continuation waits for the results to be acknowledged.
                cuts.note("after")
                kill(present(process_of(log)))
    assert sorted(found) == [(value, part) for value in TWO for part in range(STEPS * WIDE)]
    assert (1, 3, "after") in {line[:3] for line in log.lines()}
