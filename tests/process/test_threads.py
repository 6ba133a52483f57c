"""Thread mode: several calls at once in one worker, each with the guarantees of a process."""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, Engine, Task, TaskCallback, TaskLike, current_message
from standin import standin
from tests.gates import (
    Background,
    Gate,
    Log,
    bodies,
    charges,
    dead,
    drain,
    engine_at,
    eventually,
    feed,
    kill,
    values,
    waiting,
)
from tests.process.three_stages import sink, source, stages


def gated(value: int, log: Log, gate: Gate) -> list[object]:
    message = current_message()
    log.note(value, os.getpid(), threading.get_ident())
    gate.wait()
    assert current_message() is message
    return [value, message.attempt]


def test_eight_calls_killed_with_their_worker_are_not_charged_and_done_once_downstream(
    db: Path, log: Log, gate: Gate
) -> None:
    engine = stages(db, Task(gated, name="work", args=(log, gate), threads=8), 12, visibility_timeout=2)
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        lines = log.wait_for(8)
        assert len({thread for _, _, thread in lines}) == 8
        assert waiting(engine, "work")[1] >= 8
        kill(lines[0][1])
        # Each of those eight runs alone next time, and none has got past the gate.
        log.wait_for(9)
        gate.open()
    assert sorted(values(engine, "sink")) == [[number, 1] for number in range(12)]
    assert set(charges(engine)) == {0}
    assert run.summary["work"].failed == 0


def kills_at_3(value: int, log: Log, gate: Gate) -> int:
    log.note("begin", value)
    if value == 3:
        # With the others around it, the first time.
        gate.wait()
        os._exit(1)
    if log.lines().count(("begin", value)) == 1:
        # Not over before 3 kills them all, or 3 would have been alone.
        threading.Event().wait()
    log.note("end", value)
    return value


def test_a_message_that_kills_is_found_out_by_running_alone(db: Path, log: Log, gate: Gate) -> None:
    engine = stages(db, Task(kills_at_3, name="work", args=(log, gate), threads=6, max_attempts=1), 6)
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        log.wait_for(6)
        gate.open()
    assert sorted(values(engine, "sink")) == [0, 1, 2, 4, 5]
    [(_, failure)] = dead(engine, "work")
    assert (failure.error, failure.attempts) == ("WorkerLost", 1)
    assert (run.summary["work"].dead, run.summary["work"].retried) == (1, 0)
    # Twice: among others, which says nothing about it, and alone.
    assert log.lines().count(("begin", 3)) == 2
    assert log.lines()[-1] != ("begin", 3) or ("end", 5) in log.lines()


def hangs_at_0(value: int, log: Log, gate: Gate) -> int:
    log.note(value, os.getpid())
    if value == 0:
        threading.Event().wait()
    if (0, os.getpid()) in log.lines():
        gate.wait()
    # No suspects: they begin beside each other again.
    eventually(lambda: len([pid for _, pid in log.lines() if pid == os.getpid()]) == 3)
    return value


def test_only_the_call_over_its_timeout_is_charged(db: Path, log: Log, gate: Gate) -> None:
    task = Task(hangs_at_0, name="work", args=(log, gate), threads=4, timeout=4.0, max_attempts=1)
    engine = engine_at(db, [source, task, sink])
    feed(engine, "work", [0])
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        log.wait_for(1)
        # The others begin later, so they are not late when it is.
        feed(engine, "work", range(1, 4))
        log.wait_for(7)
    [(body, failure)] = dead(engine, "work")
    assert '"value": 0' in body
    assert failure.error == "TaskTimeout"
    assert "hangs_at_0" in failure.stack
    assert sorted(values(engine, "sink")) == [1, 2, 3]
    assert run.summary["work"].failed == 1


def late_lease(value: int, log: Log, seconds: float) -> int:
    log.note(value)
    time.sleep(seconds)
    return value


def test_every_running_call_keeps_its_lease(db: Path, log: Log) -> None:
    engine = stages(db, Task(late_lease, name="work", args=(log, 3.0), threads=4), 4, visibility_timeout=2)
    drain(engine, "work")
    assert sorted(log.lines()) == sorted(values(engine, "sink")) == [0, 1, 2, 3]


def step(value: list[int], log: Log, active: Log) -> list[int]:
    group, number = value
    active.note("begin", group)
    log.note(group, number)
    time.sleep(0.002)
    active.note("end", group)
    if number == 3 and log.lines().count((group, 3)) == 1:
        raise ValueError("once")
    return value


def first(value: list[int]) -> str:
    return str(value[0])


def test_fifo_groups_keep_their_order_and_run_beside_each_other(db: Path, log: Log, tmp_path: Path) -> None:
    active = Log(str(tmp_path / "active"))
    task = Task(step, name="work", args=(log, active), threads=4, group=first, on_error=lambda *_: "retry")
    engine = engine_at(db, [source, task, Task(sink, group=first)], fifo=True)
    for number in range(6):
        for group in range(5):
            feed(engine, "work", [[group, number]], group=str(group))
    drain(engine, "work", max_priority=None)
    done = values(engine, "sink")
    for group in range(5):
        assert [number for owner, number in done if owner == group] == list(range(6))
    open_groups: Counter[int] = Counter()
    most = 0
    for what, group in active.lines():
        open_groups[group] += 1 if what == "begin" else -1
        assert open_groups[group] <= 1, "two of one group at once"
        most = max(most, sum(open_groups.values()))
    assert most > 1


def boom(value: int, log: Log, gate: Gate) -> int:
    log.note(value)
    if value == 2:
        eventually(lambda: len(log.lines()) >= 4)
        raise ValueError("two")
    gate.wait()
    return value


def test_an_exception_ends_the_run_and_what_runs_beside_it_is_finished(db: Path, log: Log, gate: Gate) -> None:
    engine = stages(db, Task(boom, name="work", args=(log, gate), threads=4), 8)
    with pytest.raises(ValueError, match="two") as caught, Background(engine, only="work") as run:
        log.wait_for(4)
        eventually(lambda: run.engine.stats()["work"].in_flight <= 8)
        gate.open()
    assert "boom" in str(caught.traceback[-1])
    assert sorted(values(engine, "sink")) == sorted(set(log.lines()) - {2})
    assert sorted([*values(engine, "work"), *values(engine, "sink")]) == list(range(8))
    assert waiting(engine, "work")[1] == 0
    assert sum(charges(engine)) == 1


class Shared:
    """One instance for all threads of a worker."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._barrier = threading.Barrier(4)
        log.note("built")

    def __call__(self, value: int) -> object:
        if value >= 8:
            return None
        self._barrier.wait(30)
        return TaskCallback(value, self._log.note, ("called back", threading.main_thread().ident))

    def close(self) -> None:
        self._log.note("closed")


def test_a_class_is_built_once_and_callbacks_run_in_the_main_thread(db: Path, log: Log) -> None:
    engine = stages(db, Task(Shared, name="work", init_args=(log,), threads=4), 10)
    summary = drain(engine, "work")
    assert sorted(values(engine, "sink")) == list(range(8))
    lines = log.lines()
    assert (lines.count("built"), lines.count("closed")) == (1, 1)
    assert sum(line[0] == "called back" for line in lines if isinstance(line, tuple)) == 8
    assert (summary["work"].done, summary["work"].dropped) == (10, 2)


def pid_of(value: int, log: Log) -> int:
    log.note(os.getpid())
    return value


def test_a_worker_is_replaced_after_exactly_its_messages(db: Path, log: Log) -> None:
    engine = stages(db, Task(pid_of, name="work", args=(log,), threads=4, max_tasks_per_worker=9), 30)
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == list(range(30))
    assert sorted(Counter(log.lines()).values()) == [3, 9, 9, 9]


def test_a_worker_whose_last_message_was_lost_is_replaced_all_the_same(db: Path, log: Log, gate: Gate) -> None:
    task = Task(gated, name="work", args=(log, gate), threads=2, max_tasks_per_worker=2, group=first)
    engine = engine_at(db, [source, task, sink], fifo=True, visibility_timeout=2)
    feed(engine, "work", ["a", "b"], group="g")
    with Background(engine, only="work") as run:
        log.wait_for(1)
        eventually(lambda: waiting(engine, "work")[1] == 2)
        # Both leases are lost; "b", which waits for its group, never begins, but was this worker's second.
        engine.purge()
        # No lease from before lasts longer.
        time.sleep(2.1)
        gate.open()
        feed(engine, "work", ["c"], group="g")
        assert log.wait_for(2)[1][0] == "c"
        # It may have to run twice: received before the loss was noticed, it goes back like all of the group.
        eventually(lambda: [value for value, _ in values(engine, "sink")] == ["c"])
        run.engine.stop()
    assert {value for value, *_ in log.lines()} == {"a", "c"}


def encodes_slowly(value: int, log: Log, gate: Gate) -> object:
    log.note(value)
    if value == 0:
        # Over before its time is; what it gave takes long to encode.
        time.sleep(0.1)
        return {value}
    return threading.Event().wait()


def slow(value: Any) -> object:
    time.sleep(2.5)
    return list(value)


def test_a_call_that_is_over_is_not_the_late_one(db: Path, log: Log, gate: Gate) -> None:
    task = Task(encodes_slowly, name="work", args=(log, gate), threads=2, timeout=1.5, max_attempts=1)
    engine = engine_at(db, [source, task, sink], json_default=slow)
    feed(engine, "work", [0])
    with Background(engine, only="work", until="drained", idle=0.0):
        log.wait_for(1)
        feed(engine, "work", [1])
    [(body, failure)] = dead(engine, "work")
    assert '"value": 1' in body
    assert failure.error == "TaskTimeout"
    assert values(engine, "sink") == [[0]]


def test_stopped_it_finishes_what_runs_and_gives_back_the_rest(db: Path, log: Log, gate: Gate) -> None:
    engine = stages(db, Task(gated, name="work", args=(log, gate), threads=3, prefetch=4), 10)
    with Background(engine, only="work") as run:
        log.wait_for(3)
        engine.stop()
        gate.open()
    assert run.summary.reason == "stopped"
    # The gate may open before the worker has heard of the stop: what had begun is done, the rest is there.
    assert sorted(value for value, _ in values(engine, "sink")) == sorted(value for value, *_ in log.lines())
    assert len(bodies(engine, *engine.pipeline.stage("work").inputs)) == 10 - len(log.lines())
    assert waiting(engine, "work")[1] == 0
    assert set(charges(engine)) == {0}


def ten() -> Iterator[int]:
    yield from range(10)


def fan_out(value: int) -> Iterator[int]:
    for part in range(12):
        yield 100 * value + part


def test_threads_on_sqs_with_a_generator_and_results_for_the_caller() -> None:
    with standin() as server:
        broker = SQS("us-east-1", endpoint_url=server.url, access_key="x", secret_key="x")
        broker._settle = 0.2
        engine = Engine([ten, Task(fan_out, threads=5), Task(sink, threads=4)], domain="t", broker=broker)
        with engine.run(until="drained", iterate=True) as results:
            found = list(results)
    assert sorted(found) == [100 * value + part for value in range(10) for part in range(12)]


def mixed(value: int) -> Iterator[list[int]]:
    for part in range(25 if value == 0 else 1):
        yield [value, part]


def test_a_stream_on_fifo_waits_for_what_was_before_it_and_not_for_what_others_make_meanwhile() -> None:
    with standin() as server:
        broker = SQS("us-east-1", endpoint_url=server.url, access_key="x", secret_key="x")
        broker._settle = 0.1
        tasks: list[TaskLike] = [source, Task(mixed, name="work", threads=8, prefetch=30), sink]
        engine = Engine(tasks, domain="t", broker=broker, fifo=True)
        feed(engine, "work", range(600))
        # Slow enough that there is always something to carry.
        server.faults(latency_ms=15)
        drain(engine, "work")
        server.faults(latency_ms=0)
        found = []
        with contextlib.closing(broker.open()) as connection:
            while received := connection.receive(["t-work.fifo"], 10, 0, 60):
                found += [(message.sent_at, json.loads(message.body)["value"]) for message in received]
    assert len(found) == 624
    last = max(place for place, (_, value) in enumerate(sorted(found)) if value[0] == 0)
    assert last < 560
