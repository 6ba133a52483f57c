"""Batches: one call for several messages, of which each still has its own fate."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sqspipes_mp import SQS, Engine, Reject, Retry, SqsPipesError, Task, WrongShape, current_message
from standin import standin
from tests.gates import (
    Background,
    Gate,
    Log,
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


def noted(batch: list[int], log: Log) -> list[int]:
    log.note(len(batch))
    return [10 * value for value in batch]


def test_values_come_in_lists_and_their_results_keep_their_places(db: Path, log: Log) -> None:
    engine = stages(db, Task(noted, name="work", args=(log,), batch=8), 28)
    summary = drain(engine, "work")
    assert sorted(values(engine, "sink")) == [10 * number for number in range(28)]
    assert max(log.lines()) == 8
    assert sum(log.lines()) == summary["work"].done == 28


def test_a_batch_that_does_not_fill_begins_after_its_wait(db: Path, log: Log) -> None:
    engine = stages(db, Task(noted, name="work", args=(log,), batch=100, batch_wait=0.1), 3)
    drain(engine, "work")
    assert sum(log.lines()) == 3


def each_its_own(batch: list[int], log: Log) -> list[object]:
    log.note(batch)
    fates = {1: Reject("one"), 2: Retry(0), 3: None, 4: ValueError("four"), 5: {6}}
    # The second delivery of 2 is good.
    return [value if value == 2 and log.lines().count([2]) else fates.get(value, value) for value in batch]


def test_an_exception_as_a_result_fails_its_message_alone(db: Path, log: Log) -> None:
    task = Task(each_its_own, name="work", args=(log,), batch=7, batch_wait=0.5, on_error="reject")
    engine = stages(db, task, 7)
    summary = drain(engine, "work")
    assert sorted(values(engine, "sink")) == [0, 2, 6]
    failures = {failure.error: failure for _, failure in dead(engine, "work")}
    assert set(failures) == {"Reject", "ValueError", "OutputError"}
    assert "four" in failures["ValueError"].text
    assert {failure.attempts for failure in failures.values()} == {1}
    assert (summary["work"].dropped, summary["work"].failed, summary["work"].dead) == (1, 4, 3)


def bad_three(batch: list[int], log: Log) -> list[int]:
    log.note(batch)
    if 3 in batch:
        raise ValueError("three")
    return batch


def test_after_a_raise_the_members_run_one_by_one(db: Path, log: Log) -> None:
    task = Task(bad_three, name="work", args=(log,), batch=6, batch_wait=0.5, max_attempts=1, on_error="retry")
    engine = stages(db, task, 6)
    summary = drain(engine, "work")
    assert sorted(values(engine, "sink")) == [0, 1, 2, 4, 5]
    [(_, failure)] = dead(engine, "work")
    assert (failure.error, failure.text, failure.attempts) == ("ValueError", "three", 1)
    assert "bad_three" in failure.traceback
    assert set(charges(engine)) == {0}
    assert summary["work"].failed == 1


def test_a_raise_ends_the_run_with_the_bad_ones_exception_and_the_rest_goes_back(db: Path, log: Log) -> None:
    engine = stages(db, Task(bad_three, name="work", args=(log,), batch=6, batch_wait=0.5), 6)
    with pytest.raises(ValueError, match="three"):
        engine.run(only="work")
    assert sorted([*values(engine, "sink"), *values(engine, "work")]) == list(range(6))
    assert 3 in values(engine, "work")
    assert sum(charges(engine)) == 1
    assert waiting(engine, "work")[1] == 0


def shorter(batch: list[int]) -> list[int]:
    return batch if len(batch) == 1 else batch[1:]


def test_a_list_of_another_length_is_the_functions_error_and_no_messages(db: Path) -> None:
    engine = stages(db, Task(shorter, name="work", batch=4, batch_wait=0.5), 4)
    with pytest.raises(WrongShape, match=r"'work'.* batch of \d values gave a list of \d, not a list of \d"):
        engine.run(only="work")
    # Alone they were good, so they are done, and a fleet that is restarted gets on.
    assert sorted([*values(engine, "sink"), *values(engine, "work")]) == list(range(4))
    assert set(charges(engine)) == {0}


def no_list(batch: list[int]) -> object:
    return dict.fromkeys(batch)


def test_what_is_no_list_fails_and_says_so(db: Path) -> None:
    engine = stages(db, Task(no_list, name="work", batch=4, on_error="reject"), 2)
    drain(engine, "work")
    # Of the size that the user's batches have, though they ran alone at last.
    assert all(
        "a batch of 2 values gave a dict, not a list of 2." in failure.text for _, failure in dead(engine, "work")
    )
    assert len(dead(engine, "work")) == 2


def dies_with_2(batch: list[int], log: Log) -> list[int]:
    log.note(batch)
    if 2 in batch:
        os._exit(1)
    return batch


def test_after_a_death_each_runs_alone_and_only_the_guilty_pays(db: Path, log: Log) -> None:
    task = Task(dies_with_2, name="work", args=(log,), batch=5, batch_wait=0.5, max_attempts=1)
    engine = stages(db, task, 5)
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == [0, 1, 3, 4]
    [(body, failure)] = dead(engine, "work")
    assert '"value": 2' in body
    assert (failure.error, failure.attempts) == ("WorkerLost", 1)
    assert set(charges(engine)) == {0}
    # Nobody met the others again.
    first = max(log.lines(), key=len)
    assert [batch for batch in log.lines() if len(batch) > 1].count(first) == 1


def held(batch: list[int], log: Log, gate: Gate) -> list[int]:
    log.note(batch, os.getpid())
    gate.wait()
    return batch


def test_a_killed_batch_comes_back_uncharged_and_is_done_once(db: Path, log: Log, gate: Gate) -> None:
    task = Task(held, name="work", args=(log, gate), batch=8, batch_wait=0.9)
    engine = stages(db, task, 8, visibility_timeout=2)
    with Background(engine, only="work", until="drained", idle=0.0):
        [(_, pid)] = log.wait_for(1)
        kill(pid)
        log.wait_for(2)
        gate.open()
    assert sorted(values(engine, "sink")) == list(range(8))
    assert set(charges(engine)) == {0}


def hangs_with_1(batch: list[int], log: Log, gate: Gate) -> list[int]:
    log.note(batch)
    if 1 in batch:
        gate.wait()
    return batch


def test_a_timeout_covers_the_call_and_blames_the_one_that_is_late_alone(db: Path, log: Log, gate: Gate) -> None:
    task = Task(hangs_with_1, name="work", args=(log, gate), batch=3, batch_wait=0.5, timeout=0.5, max_attempts=1)
    engine = stages(db, task, 3)
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == [0, 2]
    [(body, failure)] = dead(engine, "work")
    assert '"value": 1' in body
    assert (failure.error, failure.attempts) == ("TaskTimeout", 1)


def first(value: list[int]) -> str:
    return str(value[0])


def fails_once(batch: list[list[int]], log: Log) -> list[object]:
    results: list[object] = []
    for value in batch:
        seen = log.lines().count(tuple(value))
        log.note(*value)
        results.append(Retry(0) if value[1] == 2 and not seen else value)
    return results


def test_nothing_overtakes_what_failed_in_its_group(db: Path, log: Log) -> None:
    task = Task(fails_once, name="work", args=(log,), batch=6, batch_wait=0.3, group=first)
    engine = engine_at(db, [source, task, Task(sink, group=first)], fifo=True)
    for number in range(5):
        for group in range(3):
            feed(engine, "work", [[group, number]], group=str(group))
    drain(engine, "work")
    for group in range(3):
        assert [number for owner, number in values(engine, "sink") if owner == group] == list(range(5))
    assert Counter(log.lines())[(0, 2)] == 2


def whose(batch: list[int]) -> list[str]:
    try:
        _ = current_message().id
    except SqsPipesError as error:
        return [str(error)] * len(batch)
    return ["there was one"] * len(batch)


def test_the_current_message_says_little(db: Path) -> None:
    engine = stages(db, Task(whose, name="work", batch=4), 1)
    drain(engine, "work")
    assert "batch" in values(engine, "sink")[0]


def pid_of(batch: list[int], log: Log) -> list[int]:
    log.note(os.getpid(), len(batch))
    return batch


def test_a_worker_is_replaced_after_exactly_its_messages(db: Path, log: Log) -> None:
    engine = stages(db, Task(pid_of, name="work", args=(log,), batch=4, max_tasks_per_worker=6), 15)
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == list(range(15))
    had: Counter[int] = Counter()
    for pid, count in log.lines():
        had[pid] += count
    assert sorted(had.values()) == [3, 6, 6]


def forty() -> Iterator[int]:
    yield from range(40)


def times_ten(batch: list[int]) -> list[int]:
    return [10 * value for value in batch]


def test_a_batch_on_sqs_whose_results_go_to_the_caller() -> None:
    with standin() as server:
        broker = SQS("us-east-1", endpoint_url=server.url, access_key="x", secret_key="x")
        broker._settle = 0.2
        engine = Engine([forty, Task(times_ten, batch=25)], domain="t", broker=broker)
        with engine.run(until="drained", iterate=True) as results:
            assert sorted(results) == [10 * value for value in range(40)]


def note_pid(log: Log) -> None:
    log.note(os.getpid())


def test_a_batch_of_which_every_lease_was_lost_is_not_called(tmp_path: Path, db: Path, log: Log) -> None:
    workers = Log(str(tmp_path / "workers"))
    task = Task(noted, name="work", args=(log,), batch=4, batch_wait=1.9, init=partial(note_pid, workers))
    engine = stages(db, task, 2, visibility_timeout=4)
    with Background(engine, only="work"):
        [worker] = workers.wait_for(1)
        eventually(lambda: waiting(engine, "work")[1] == 2)
        kill(worker, signal.SIGSTOP)
        engine.purge()
        time.sleep(4.1)
        kill(worker, signal.SIGCONT)
        feed(engine, "work", [7])
        assert log.wait_for(1) == [1]
        engine.stop()
    assert log.lines() == [1]
