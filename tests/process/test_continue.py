"""Long calls: a task returns ``Continue(state)``, and its value comes to it again with the state."""

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, Continue, Engine, OutputError, Retry, SQLite, SqsPipesError, Task, current_message
from sqspipes_mp.brokers.base import Completion, Output, QueueSpec
from sqspipes_mp.messages.ids import hop_id
from tests.gates import (
    Background,
    Gate,
    Log,
    bodies,
    dead,
    drain,
    engine_at,
    eventually,
    feed,
    kill,
    present,
    values,
    waiting,
)


def source() -> Iterator[int]:
    yield from ()


def sink(value: object) -> object:
    return value


def in_steps(state: Any, log: Log) -> Any:
    """Count a value's steps, three of them in continuations; the value is changed in place."""
    if not isinstance(state, dict):
        state = {"value": state, "step": 0}
    message = current_message()
    log.note(message.id, message.hop, message.continuation, message.attempt, message.priority)
    if state["step"] == 3:
        return state
    state["step"] += 1
    return Continue(state)


def test_a_value_goes_on_with_its_state_under_the_same_id(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(source, priorities=2), Task(in_steps, name="work", args=(log,), priorities=2), sink])
    body = json.dumps({"meta": {"id": "root", "priority": 1, "x-mine": 7}, "value": 5})
    with contextlib.closing(engine.broker.open()) as connection:
        connection.ensure(engine.pipeline.queues, create=True)
        high = engine.pipeline.stage("work").inputs[0]
        connection.complete([Completion(None, (Output(high, body, "root"),))])
    summary = drain(engine, "work")
    assert [line[0] for line in log.lines()] == ["root"] * 4
    assert [line[2:] for line in log.lines()] == [(number, 1, 1) for number in range(4)]
    assert len({line[1] for line in log.lines()}) == 4
    [made] = map(json.loads, bodies(engine, *engine.pipeline.stage("sink").inputs))
    assert made["value"] == {"value": 5, "step": 3}
    # The chain stays behind, and what is the user's travels on. Outputs' ids derive from the chain's first message.
    assert made["meta"] == {"id": "root", "priority": 1, "x-mine": 7, "hop": hop_id("root", "work", 0)}
    assert summary["work"].failed == 0


@pytest.mark.parametrize("fifo", [False, True])
def test_it_goes_on_over_sqs(sqs: SQS, log: Log, fifo: bool, caplog: pytest.LogCaptureFixture) -> None:
    sqs._settle = 0.5
    task = Task(in_steps, name="work", args=(log,), input=True)
    engine = Engine([task, sink], domain="t", broker=sqs, fifo=fifo, start_method="forkserver")
    root = engine.put(5)
    engine.run(only="work", until="drained", idle=0.0)
    assert [line[:1] + line[2:] for line in log.lines()] == [(root, number, 1, 0) for number in range(4)]
    assert sum("would take a state for a value" in record.getMessage() for record in caplog.records) == 1


def ever_on(value: int) -> Any:
    return Continue(value + 1) if value < 11 else None


def test_a_chain_without_work_in_its_calls_is_held_back_and_that_is_said_once(
    db: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Records of fresh children come to this program's log.
    engine = engine_at(db, [source, Task(ever_on, name="work"), sink], start_method="forkserver")
    feed(engine, "work", [0])
    assert drain(engine, "work")["work"].done == 12
    assert sum("they are held back for up to 30 s each" in record.getMessage() for record in caplog.records) == 1


def in_parts(start: int, cuts: Log, log: Log, gate: Gate) -> Generator[Any, None, Continue | None]:
    """Yield the numbers from ``start`` on; the last line of ``cuts`` says where this call ends."""
    end = cuts.lines()[-1]
    log.note(os.getpid(), start, end)
    yield from range(start, end)
    if end == 230:
        gate.wait()
    return Continue(end) if end < 250 else None


def test_a_fan_out_that_is_killed_and_cuts_elsewhere_gives_each_output_once(db: Path, log: Log, gate: Gate) -> None:
    cuts = Log(f"{log.path}-cuts")
    cuts.note(230)
    task = Task(in_parts, name="work", args=(cuts, log, gate))
    engine = engine_at(db, [source, task, sink], on_error="retry")
    feed(engine, "work", [0])
    with Background(engine, only="work", until="drained", idle=0.0):
        [(pid, _, _)] = log.wait_for(1)
        eventually(lambda: waiting(engine, "sink")[0] == 200, "two batches are sent")
        # The call that runs again ends earlier, and its continuation yields what is there already.
        cuts.note(120)
        kill(pid)
        eventually(lambda: (0, 120) in [line[1:] for line in log.lines()])
        cuts.note(250)
    assert values(engine, "sink") == list(range(250))


def until_asked(state: str, log: Log) -> Any:
    """Work until asked to end; it is a thread of its own that sees that."""
    message = current_message()
    log.note(os.getpid(), message.continuation, message.deadline)
    if message.continuation or len(log.lines()) > 1:
        return "done"
    seen, pause = threading.Event(), threading.Event()

    def look() -> None:
        while not message.stopping:
            pause.wait(0.01)
        seen.set()

    threading.Thread(target=look, daemon=True).start()
    seen.wait()
    log.note("left", present(message.deadline) - time.monotonic())
    return Continue("changed" if state == "changes" else state)


@pytest.mark.parametrize("state", ["changes", "stays"])
def test_a_drain_asks_calls_to_end_and_tells_how_long_they_have(db: Path, log: Log, state: str) -> None:
    task = Task(until_asked, name="work", args=(log,), max_attempts=1, prefetch=0)
    engine = engine_at(db, [source, task, sink], shutdown_grace=90)
    feed(engine, "work", [state])
    with Background(engine, only="work"):
        log.wait_for(1)
        engine.stop()
    (_, count, deadline), (_, left) = log.lines()
    assert (count, deadline) == (0, None)
    assert 0 < left <= 90
    # What has not changed goes back as it was, uncharged: this task has one attempt.
    assert waiting(engine, "work") == (1, 0, 0)
    drain(engine, "work")
    assert values(engine, "sink") == ["done"]
    assert log.lines()[2][1] == (1 if state == "changes" else 0)


def stays(value: object) -> Continue:
    return Continue(value)


def test_a_state_that_does_not_change_is_a_failed_attempt(db: Path) -> None:
    engine = engine_at(db, [source, Task(stays, name="work", max_attempts=1), sink])
    feed(engine, "work", [1])
    summary = drain(engine, "work")
    [(_, failure)] = dead(engine, "work")
    assert "nothing would ever change" in failure.text
    assert summary["work"].failed == 1


def twice(value: object) -> Any:
    return value if isinstance(value, str) else Continue(str(value))


def yields_in_two(value: Any) -> Generator[str, None, Continue | None]:
    """Yield two results for a text, one in each call."""
    text, done = value if isinstance(value, list) else (value, 0)
    yield f"{text}-{done}"
    return None if done else Continue([text, 1])


@pytest.mark.parametrize("ordered", [False, True])
def test_map_waits_for_continuations_and_gives_their_results(db: Path, ordered: bool) -> None:
    engine = engine_at(db, [Task(twice, name="work", input=True), Task(yields_in_two, name="last")])
    found = list(engine.map(range(20), ordered=ordered))
    expected = [f"{number}-{part}" for number in range(20) for part in range(2)]
    assert (found if ordered else sorted(found, key=lambda text: [*map(int, text.split("-"))])) == expected


def goes_on_once(value: int, log: Log, gate: Gate) -> Any:
    log.note(os.getpid())
    if len(log.lines()) > 1:
        return value
    gate.wait()
    log.note("goes on")
    return Continue("never sent")


@pytest.mark.parametrize("last", [False, True])
def test_map_ends_where_a_call_that_went_on_runs_again_and_does_not(db: Path, log: Log, gate: Gate, last: bool) -> None:
    tasks = [Task(goes_on_once, name="work", args=(log, gate), input=True), sink]
    engine = engine_at(db, tasks[:1] if last else tasks, on_error="retry")

    def kill_before_it_is_sent() -> None:
        [pid] = log.wait_for(1)
        lock = sqlite3.connect(db, isolation_level=None, timeout=30)
        lock.execute("BEGIN IMMEDIATE")
        gate.open()
        eventually(lambda: len(log.lines()) > 1)
        # Long enough for the caller to be told, as a rule.
        threading.Event().wait(0.3)
        kill(pid)
        lock.rollback()
        lock.close()

    killer = threading.Thread(target=kill_before_it_is_sent)
    killer.start()
    try:
        assert list(engine.map([7])) == [7]
    finally:
        killer.join()


def refused_with(engine: Engine) -> str:
    with pytest.raises(OutputError) as caught:
        engine.run(only="work")
    return str(caught.value)


def test_continue_is_refused_where_no_message_can_go_on(db: Path) -> None:
    ordered = engine_at(db, [source, Task(stays, name="work", group=str), sink], fifo=True)
    feed(ordered, "work", [1], group="1")
    assert "promises an order" in refused_with(ordered)
    foreign = Engine([Task(stays, name="work", input="others"), sink], domain="f", broker=SQLite(db))
    with contextlib.closing(foreign.broker.open()) as connection:
        connection.ensure([QueueSpec(name="others", fifo=False, visibility=30)], create=True)
        connection.complete([Completion(None, (Output("others", "1", "1"),))])
    assert "put a stage before it" in refused_with(foreign)
    made_by_source = Engine([Task(stays, name="work", args=(1,)), sink], domain="s", broker=SQLite(db))
    assert "a source has no message" in refused_with(made_by_source)


def batch_of(batch: list[Any], log: Log) -> list[Any]:
    message = current_message()
    log.note(message.stopping, message.deadline is not None)
    with pytest.raises(SqsPipesError, match="not known with Task"):
        _ = message.id
    return [value if isinstance(value, str) else Continue(str(value)) for value in batch]


def test_a_batch_may_continue_some_of_its_values(db: Path, log: Log) -> None:
    task = Task(batch_of, name="work", args=(log,), batch=4, batch_wait=0.01, timeout=90)
    engine = engine_at(db, [source, task, sink])
    feed(engine, "work", [1, "two", 3])
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == ["1", "3", "two"]
    assert set(log.lines()) == {(False, True)}


def test_call_follows_continuations(db: Path, log: Log) -> None:
    tasks = [Task(in_steps, args=(log,), input=True), Task(lambda value: value["step"], name="step")]
    assert engine_at(db, tasks).call(5) == [3]
    assert [line[2] for line in log.lines()] == [0, 1, 2, 3]
    assert engine_at(db, [Task(yields_in_two, input=True)]).call("a") == ["a-0", "a-1"]
    assert engine_at(db, [Task(batch_of, args=(log,), batch=2, input=True)]).call(3) == ["3"]
    with pytest.raises(Retry, match="nothing would ever change"):
        engine_at(db, [Task(stays, input=True)]).call(3)


def test_a_yielded_or_wrapped_continue_is_no_output(db: Path) -> None:
    def yields(value: int) -> Iterator[Any]:
        yield Continue(value)

    with pytest.raises(OutputError, match="returns it after its yields"):
        engine_at(db, [Task(yields, name="yields", input=True)]).call(1)
