"""What becomes of a message: retried, rejected, dead-lettered, timed out, dropped, called back about."""

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import (
    ConfigError,
    EmptyTaskOutput,
    Engine,
    MessageTooLarge,
    OutputError,
    Reject,
    Retry,
    SQLite,
    Task,
    TaskCallback,
    current_message,
)
from tests.gates import (
    Background,
    Gate,
    Log,
    alive,
    bodies,
    charges,
    dead,
    drain,
    engine_at,
    eventually,
    feed,
    file_of,
    present,
    query,
    send,
    values,
    waiting,
)


def source():
    yield from ()


def sink(value):
    return value


def one_stage(db: Path, work: Task, values: list[object], **settings: Any) -> Engine:
    engine = engine_at(db, [source, work, sink], **settings)
    feed(engine, "work", values)
    return engine


class Flaky(Exception):
    pass


def fails_first(value, log: Log, times: int, error: Exception):
    log.note(value, current_message().attempt)
    if value == "bad" and len([v for v, _ in log.lines() if v == "bad"]) <= times:
        raise error
    return value


def at_once(error: Exception, attempt: int):
    assert isinstance(error, Flaky)
    return Retry(0)


# --- errors ---


def test_retry_tries_again_later(db: Path, log: Log) -> None:
    work = Task(fails_first, name="work", args=(log, 1, Flaky("once")), on_error="retry")
    engine = one_stage(db, work, ["a", "bad", "b"])
    summary = drain(engine, "work")["work"]
    assert sorted(values(engine, "sink")) == ["a", "b", "bad"]
    assert (summary.done, summary.failed, summary.retried, summary.dead) == (3, 1, 1, 0)
    assert [attempt for value, attempt in log.lines() if value == "bad"] == [1, 2]


def test_used_up_attempts_dead_letter_with_the_reason(db: Path, log: Log) -> None:
    work = Task(fails_first, name="work", args=(log, 9, Flaky("for ever")), on_error=at_once, max_attempts=3)
    engine = one_stage(db, work, ["bad", "a"])
    summary = drain(engine, "work")["work"]
    [(body, failure)] = dead(engine, "work")
    assert json.loads(body)["value"] == "bad"
    assert (failure.error, failure.text, failure.stage, failure.attempts) == ("Flaky", "for ever", "work", 3)
    assert "fails_first" in failure.traceback
    assert failure.source == "t-source"
    assert present(failure.failed_at) >= present(failure.first_seen) > time.time() - 60
    assert (summary.done, summary.failed, summary.retried, summary.dead) == (1, 3, 2, 1)
    assert [attempt for value, attempt in log.lines() if value == "bad"] == [1, 2, 3]
    assert values(engine, "sink") == ["a"]


def test_reject_dead_letters_at_once_in_every_mode(db: Path, log: Log) -> None:
    work = Task(fails_first, name="work", args=(log, 9, Reject("no such customer")))
    engine = one_stage(db, work, ["bad", "a"])
    drain(engine, "work")
    [(_, failure)] = dead(engine, "work")
    assert (failure.error, failure.text, failure.attempts) == ("Reject", "no such customer", 1)
    assert values(engine, "sink") == ["a"]


def test_the_policy_reject_dead_letters_the_first_failure(db: Path, log: Log) -> None:
    engine = one_stage(db, Task(fails_first, name="work", args=(log, 9, Flaky("x"))), ["bad"], on_error="reject")
    drain(engine, "work")
    assert [failure.error for _, failure in dead(engine, "work")] == ["Flaky"]


def test_raising_retry_counts_as_an_attempt_and_keeps_its_delay(db: Path, log: Log) -> None:
    engine = one_stage(db, Task(fails_first, name="work", args=(log, 1, Retry(3600))), ["bad"], start_method="fork")
    with Background(engine, only="work"):
        eventually(lambda: charges(engine) == [1])
        engine.stop()
    [(delay, body)] = query(db, "SELECT visible_at - sent_at, body FROM messages")
    assert 3_600_000 <= delay < 3_700_000
    assert "bad" in body


def test_without_any_grace_the_attempt_that_ends_the_run_counts_all_the_same(db: Path, log: Log) -> None:
    work = Task(fails_first, name="work", args=(log, 9, Flaky("bad luck")), max_attempts=2)
    engine = one_stage(db, work, ["bad"], shutdown_grace=0.0)
    with pytest.raises(Flaky):
        drain(engine, "work")
    assert charges(engine) == [1]
    with pytest.raises(Flaky):
        drain(engine, "work")
    [(_, failure)] = dead(engine, "work")
    assert (failure.error, failure.attempts, len(log.lines())) == ("Flaky", 2, 2)


@contextmanager
def write_lock(db: Path) -> Iterator[None]:
    """Hold the file's write lock: whoever else writes waits in the midst of it."""
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def fails_behind(value, log: Log, gate: Gate):
    log.note("called", os.getpid())
    gate.wait()
    raise Flaky("bad luck")


def test_an_attempt_counts_though_its_worker_is_killed_while_it_writes_that_down(
    db: Path, log: Log, gate: Gate
) -> None:
    work = Task(fails_behind, name="work", args=(log, gate))
    engine = one_stage(db, work, ["bad"], shutdown_grace=1.0)
    with pytest.raises(Flaky), Background(engine, only="work"):
        [(_, pid)] = log.wait_for(1)
        with write_lock(db):
            # The release waits for the lock from the call's failure on; the failure begins the grace.
            gate.open()
            eventually(lambda: not alive(pid), "the end of the grace")
    assert charges(engine) == [1]


def test_a_policy_that_fails_itself_ends_the_run_with_its_own_error(db: Path, log: Log) -> None:
    work = Task(fails_first, name="work", args=(log, 9, Flaky("first")), on_error=broken_policy)
    engine = one_stage(db, work, ["bad"])
    with pytest.raises(ZeroDivisionError) as caught:
        drain(engine, "work")
    assert isinstance(caught.value.__context__, Flaky)
    assert waiting(engine, "work") == (1, 0, 0)


def broken_policy(error: Exception, attempt: int):
    return 1 // 0


def test_a_policy_that_answers_nonsense_is_a_config_error(db: Path, log: Log) -> None:
    engine = one_stage(db, Task(fails_first, name="work", args=(log, 9, Flaky()), on_error=nonsense), ["bad"])
    with pytest.raises(ConfigError, match="on_error"):
        drain(engine, "work")


def nonsense(error: Exception, attempt: int):
    return "ignore"


def test_the_tasks_policy_goes_before_the_engines(db: Path, log: Log) -> None:
    work = Task(fails_first, name="work", args=(log, 9, Flaky("x")), on_error="reject")
    drain(one_stage(db, work, ["bad"], on_error="raise"), "work")
    assert len(log.lines()) == 1


@pytest.mark.parametrize("body", ["not json", "[1, 2]", '{"meta": {}}', "\x00", '{"value": '])
def test_a_body_that_is_no_envelope_is_dead_lettered_as_it_is(db: Path, body: str) -> None:
    engine = engine_at(db, [source, Task(sink, name="work"), sink])
    send(engine, "work", body)
    feed(engine, "work", [1, 2])
    drain(engine, "work")
    [(kept, failure)] = dead(engine, "work")
    assert kept == body
    assert failure.error == "DecodeError"
    assert sorted(values(engine, "sink")) == [1, 2]


# --- outputs ---


class Strange:
    pass


def strange(value):
    return {"inside": [Strange()]}


def test_an_output_that_is_no_json_fails_the_function_naming_stage_place_and_type(db: Path) -> None:
    engine = one_stage(db, Task(strange, name="work"), [1])
    with pytest.raises(OutputError, match=r"stage 'work'.*'inside'.*Strange"):
        drain(engine, "work")
    assert waiting(engine, "work") == (1, 0, 0)
    assert charges(engine) == [1]


def huge(value):
    return "x" * 2_000_000


def test_an_output_that_is_too_large_fails_the_function_naming_stage_and_size(db: Path) -> None:
    engine = one_stage(db, Task(huge, name="work", on_error="reject"), [1])
    drain(engine, "work")
    [(_, failure)] = dead(engine, "work")
    assert failure.error == "MessageTooLarge"
    assert "stage 'work'" in failure.text
    assert "2,000," in failure.text
    with pytest.raises(MessageTooLarge):
        drain(one_stage(db, Task(huge, name="work"), [1]), "work")


def largest(value):
    return "x" * (1_048_576 - 16_384 - 300)


def test_the_largest_output_can_still_be_dead_lettered_with_its_reason(db: Path) -> None:
    engine = engine_at(db, [source, Task(largest, name="work"), Task(reject, name="next"), sink])
    feed(engine, "work", [1])
    drain(engine, "work", "next")
    [(body, failure)] = dead(engine, "next")
    assert len(body) > 1_000_000
    assert failure.error == "Reject"


def reject(value):
    raise Reject


def decimals(value):
    return {"price": Decimal("1.5")}


def test_json_default_makes_what_json_cannot(db: Path) -> None:
    engine = one_stage(db, Task(decimals, name="work"), [1], json_default=str)
    drain(engine, "work")
    assert values(engine, "sink") == [{"price": "1.5"}]


def drops(value):
    return {"none": None, "class": EmptyTaskOutput, "instance": EmptyTaskOutput()}.get(value, value)


@pytest.mark.parametrize(("ignore", "kept"), [(True, ["other"]), (False, [None, "other"])])
def test_drops(db: Path, ignore: bool, kept: list[object]) -> None:
    engine = one_stage(db, Task(drops, name="work"), ["none", "class", "instance", "other"], ignore_none=ignore)
    summary = drain(engine, "work")["work"]
    assert values(engine, "sink") == kept
    assert (summary.done, summary.dropped) == (4, 4 - len(kept))


def many(value):
    yield from range(value)


def test_a_generator_function_fans_out(db: Path) -> None:
    engine = one_stage(db, Task(many, name="work"), [0, 3, 250])
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == sorted([*range(3), *range(250)])


def dies_in_the_middle(value, log: Log):
    log.note(value)
    for number in range(250):
        if number == 220 and len(log.lines()) == 1:
            os._exit(1)
        yield number


def test_a_fan_out_that_dies_in_the_middle_doubles_nothing(db: Path, log: Log) -> None:
    engine = one_stage(db, Task(dies_in_the_middle, name="work", args=(log,)), [1])
    drain(engine, "work")
    assert len(log.lines()) == 2
    assert sorted(values(engine, "sink")) == list(range(250))


# --- callbacks ---


def with_callback(value, log: Log, db: str, fail: bool):
    log.note("call", value)
    made = EmptyTaskOutput if value == "drop" else value
    return TaskCallback(made, called_back, (value, log, db, fail))


def called_back(value, log: Log, db: str, fail: bool):
    there = query(db, "SELECT count(*) FROM messages WHERE body LIKE ?", f'%"value":"{value}"}}%')
    log.note("back", value, threading.current_thread() is threading.main_thread(), there[0])
    if fail:
        raise ValueError("callback")


@pytest.mark.parametrize("fail", [False, True], ids=["fine", "failing"])
def test_a_callback_runs_after_acceptance_in_the_main_thread_and_costs_nothing(db: Path, log: Log, fail: bool) -> None:
    engine = one_stage(db, Task(with_callback, name="work", args=(log, str(db), fail)), ["a", "drop", "b"])
    summary = drain(engine, "work")["work"]
    backs = sorted(line[1:] for line in log.lines() if line[0] == "back")
    # "drop" was fed as an envelope with spaces, and is gone when its callback runs.
    assert backs == [("a", True, 1), ("b", True, 1), ("drop", True, 0)]
    assert [line[1] for line in log.lines() if line[0] == "call"] == ["a", "drop", "b"]
    assert (summary.done, summary.failed) == (3, 0)
    assert values(engine, "sink") == ["a", "b"]


def test_a_sources_callback_runs(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(noting_source, args=(log,)), sink])
    engine.run(only=0)
    assert log.lines() == [0, 1, 2]
    assert values(engine, "sink") == [0, 1, 2]


def noting_source(log: Log):
    for number in range(3):
        yield TaskCallback(number, log.note, (number,))


def test_iterating_gives_what_a_callback_wraps(db: Path, log: Log) -> None:
    engine = one_stage(db, Task(with_callback, name="work", args=(log, str(db), False)), ["a", "drop", "b"])
    with engine.run(only="work", iterate=True, until="drained", idle=0.0) as results:
        assert list(results) == ["a", "b"]
    assert sorted(line[1] for line in log.lines() if line[0] == "back") == ["a", "b", "drop"]


# --- classes and hooks ---


class Model:
    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name
        log.note("build", name, os.getpid())

    def __call__(self, value, more):
        return [value, self.name, more]

    def close(self) -> None:
        self.log.note("close", self.name, os.getpid())


def hook(log: Log, word: str) -> None:
    log.note(word, "", os.getpid())


def test_classes_and_hooks_run_once_in_each_worker_and_setup_in_each_child(db: Path, log: Log) -> None:
    work = Task(
        Model,
        name="work",
        workers=3,
        init_args=(log, "m"),
        args=("more",),
        init=partial(hook, log, "init"),
        exit=partial(hook, log, "exit"),
    )
    engine = one_stage(db, work, list(range(30)), setup=partial(hook, log, "setup"))
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == [[n, "m", "more"] for n in range(30)]
    by_pid: dict[int, list[str]] = {}
    for word, _, pid in log.lines():
        by_pid.setdefault(pid, []).append(word)
    whole = ["setup", "init", "build", "close", "exit"]
    keeper, *workers = sorted(by_pid.values(), key=len)
    assert keeper == ["setup"]
    assert 1 <= len(workers) <= 3
    # One that is still booting when all is done has nothing to finish, and is killed.
    assert all(steps == whole[: len(steps)] for steps in workers)
    assert workers[-1] == whole


def bad_exit() -> None:
    raise Flaky("exit hook")


def test_an_exit_hook_that_fails_is_seen_and_costs_no_message(db: Path) -> None:
    engine = one_stage(db, Task(sink, name="work", exit=bad_exit), [1, 2])
    with pytest.raises(Flaky, match="exit hook"):
        drain(engine, "work")
    assert sorted(values(engine, "sink")) == [1, 2]


# --- the current message ---


def tell(value):
    message = current_message()
    return {
        "id": message.id,
        "hop": message.hop,
        "stage": message.stage,
        "attempt": message.attempt,
        "priority": message.priority,
        "group": message.group,
        "deadline": message.deadline is None,
        "age": time.time() - message.sent_at,
        "x": message.meta.get("x-mine"),
    }


def test_the_current_message_says_what_it_is(db: Path) -> None:
    engine = engine_at(db, [source, Task(tell, name="work"), Task(tell, name="next", timeout=50), sink])
    send(engine, "work", json.dumps({"meta": {"priority": 0, "id": "root", "x-mine": 7}, "value": 1}))
    drain(engine, "work")
    [first] = values(engine, "next")
    assert (first["id"], first["hop"], first["stage"], first["attempt"]) == ("root", "root", "work", 1)
    assert (first["priority"], first["group"], first["deadline"], first["x"]) == (0, None, True, 7)
    assert 0 <= first["age"] < 40
    [meta] = [json.loads(body)["meta"] for body in bodies(engine, "t-work")]
    drain(engine, "next")
    [second] = values(engine, "sink")
    assert (second["id"], second["hop"], second["stage"], second["deadline"]) == ("root", meta["hop"], "next", False)
    assert second["x"] == 7


def test_there_is_no_current_message_outside_a_call() -> None:
    with pytest.raises(Exception, match="inside a task's call only"):
        current_message()


# --- priorities ---


def levels():
    yield from (0, 3, 1, 2, 9, -1)


def level_of(value):
    return value


def noted(value, log: Log):
    log.note(value)
    return value


def test_the_highest_priority_comes_first_and_others_are_clamped(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(levels, priorities=4), Task(noted, name="work", args=(log,), prefetch=0), sink])
    engine.run(only=0, priority=level_of)
    assert [len(bodies(engine, queue)) for queue in engine.pipeline.stage("work").inputs] == [2, 1, 1, 2]
    drain(engine, "work")
    assert [min(3, max(0, value)) for value in log.lines()] == [3, 3, 2, 1, 0, 0]


def test_a_band_of_priorities_is_all_that_is_received_and_waited_for(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(levels, priorities=4), Task(noted, name="work", args=(log,)), sink])
    engine.run(only=0, priority=level_of)
    drain(engine, "work", min_priority=1, max_priority=2)
    assert sorted(log.lines()) == [1, 2]


def test_an_inputs_priority_goes_on_with_its_outputs(db: Path) -> None:
    engine = engine_at(db, [Task(levels, priorities=4), Task(sink, name="work", priorities=3), Task(sink, name="last")])
    engine.run(only=0, priority=3)
    drain(engine, "work")
    assert [len(bodies(engine, queue)) for queue in engine.pipeline.stage("last").inputs] == [6, 0, 0]


def bad_priority(value):
    return "high"


def test_a_priority_that_is_no_number_is_a_config_error(db: Path) -> None:
    engine = engine_at(db, [Task(levels, priorities=4), sink])
    with pytest.raises(ConfigError, match="priority"):
        engine.run(only=0, priority=bad_priority)


# --- limits ---


def stuck(value, log: Log):
    log.note(value)
    if value == "stuck":
        threading.Event().wait()
    return value


def test_a_call_over_its_timeout_is_killed_charged_and_dead_lettered_with_its_stack(db: Path, log: Log) -> None:
    work = Task(stuck, name="work", args=(log,), timeout=2.0, max_attempts=1)
    engine = one_stage(db, work, ["a", "stuck", "b", "c"])
    summary = drain(engine, "work")["work"]
    [(body, failure)] = dead(engine, "work")
    assert '"stuck"' in body
    assert (failure.error, failure.attempts) == ("TaskTimeout", 1)
    assert "stuck" in failure.stack
    assert sorted(values(engine, "sink")) == ["a", "b", "c"]
    assert (summary.failed, summary.dead) == (1, 1)


def test_a_late_call_whose_worker_gets_no_cpu_to_tell_its_stack_is_waited_for(
    db: Path, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    work = Task(stuck_as, name="work", args=(log,), timeout=0.3, max_attempts=1)
    engine = one_stage(db, work, ["stuck"])
    with Background(engine, only="work", until="drained", idle=0.0):
        [(_, worker)] = log.wait_for(1)
        os.kill(worker, signal.SIGSTOP)
        eventually(lambda: "a call ran over 0.3 s; killing it" in caplog.text)
        # Longer than it takes to write a stack.
        threading.Event().wait(0.2)
        os.kill(worker, signal.SIGCONT)
    [(_, failure)] = dead(engine, "work")
    assert (failure.error, "stuck_as" in failure.stack) == ("TaskTimeout", True)


def stuck_as(value, log: Log):
    log.note(value, os.getpid())
    threading.Event().wait()


def test_a_worker_that_stands_still_is_killed_for_its_late_call_all_the_same(db: Path, log: Log) -> None:
    work = Task(stuck_as, name="work", args=(log,), timeout=0.3, max_attempts=1)
    engine = one_stage(db, work, ["stuck"])
    with Background(engine, only="work", until="drained", idle=0.0):
        [(_, worker)] = log.wait_for(1)
        os.kill(worker, signal.SIGSTOP)
    [(_, failure)] = dead(engine, "work")
    assert (failure.error, failure.stack) == ("TaskTimeout", "")


def test_max_tasks_per_worker_replaces_workers_and_loses_nothing(db: Path, log: Log) -> None:
    work = Task(pid_of, name="work", workers=2, args=(log,), max_tasks_per_worker=4)
    engine = one_stage(db, work, list(range(40)))
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == list(range(40))
    pids = [pid for _, pid in log.lines()]
    assert len(pids) == 40
    assert max(pids.count(pid) for pid in pids) <= 4


def held_at_the_fourth(log: Log, gate: Gate) -> None:
    log.note("init")
    if log.lines().count("init") == 4:
        gate.wait()


def worked(value, log: Log):
    # Not before all three are there: nobody may go while another one boots.
    eventually(lambda: len(log.lines()) >= 3)
    time.sleep(0.002)
    return value


def test_workers_of_a_stage_are_replaced_one_after_the_other(db: Path, log: Log, gate: Gate) -> None:
    init = partial(held_at_the_fourth, log, gate)
    work = Task(worked, name="work", args=(log,), workers=3, init=init, max_tasks_per_worker=10)
    engine = one_stage(db, work, list(range(300)))
    with Background(engine, only="work") as run:
        # The first replacement does not get ready: the other two go on past their limit, and do all that is left.
        eventually(lambda: waiting(engine, "sink")[0] == 300 and len(log.lines()) > 3, "all are done")
        assert log.lines() == ["init"] * 4
        gate.open()
        engine.stop()
    assert run.summary["work"].done == 300


def pid_of(value, log: Log):
    log.note(value, os.getpid())
    return value


_hoard: list[bytearray] = []


def hoards(value, log: Log):
    log.note(value, os.getpid())
    # Not before it was seen how much it had when it got ready.
    if not _hoard and [pid for _, pid in log.lines()].count(os.getpid()) > 20:
        _hoard.append(bytearray(os.urandom(1)) * 70_000_000)
    return value


@pytest.mark.slow
def test_a_worker_over_its_memory_finishes_its_message_and_is_replaced(db: Path, log: Log) -> None:
    tasks = [Task(ticking, interval=0.05), Task(hoards, args=(log,), max_memory="50MB"), sink]
    engine = engine_at(db, tasks, start_method="fork")
    with Background(engine, only=["ticking", "hoards"]):
        eventually(lambda: len({pid for _, pid in log.lines()}) >= 2)
        engine.stop()
    done = [value for value, _ in log.lines()]
    assert len(done) == len(set(done)) == len(values(engine, "sink"))


def ticking():
    return time.monotonic_ns()


# --- FIFO ---


def customers():
    for number in range(30):
        yield {"customer": number % 3, "number": number}


def customer_of(value):
    return f"customer {value['customer']}"


def test_fifo_keeps_the_order_within_a_group(db: Path, log: Log) -> None:
    tasks = [customers, Task(ordered, name="work", workers=3, args=(log,), group=customer_of)]
    engine_at(db, tasks, fifo=True).run(until="drained")
    seen = log.lines()
    for customer in range(3):
        assert [number for who, number in seen if who == customer] == list(range(customer, 30, 3))


def ordered(value, log: Log):
    log.note(value["customer"], value["number"])


def test_a_retried_message_is_not_overtaken_by_its_group(db: Path, log: Log) -> None:
    tasks = [customers, Task(fails_once_at_6, name="work", workers=2, args=(log,), group=customer_of, on_error=retry)]
    summary = engine_at(db, tasks, fifo=True).run(until="drained")
    assert summary["work"].retried == 1
    done = [(who, number) for word, who, number in log.lines() if word == "done"]
    for customer in range(3):
        assert [number for who, number in done if who == customer] == list(range(customer, 30, 3))


def retry(error: Exception, attempt: int):
    return Retry(0.2)


def fails_once_at_6(value, log: Log):
    log.note("begin", value["customer"], value["number"])
    if value["number"] == 6 and log.lines().count(("begin", 0, 6)) == 1:
        raise Flaky
    log.note("done", value["customer"], value["number"])


def dies_once_at_6(value, log: Log):
    log.note("begin", value["customer"], value["number"])
    if value["number"] == 6 and log.lines().count(("begin", 0, 6)) == 1:
        os._exit(1)
    return value


def test_a_workers_death_keeps_the_order_of_its_groups(db: Path, log: Log) -> None:
    work = Task(dies_once_at_6, name="work", workers=2, args=(log,), group=customer_of)
    engine = engine_at(db, [customers, work, Task(sink, group=customer_of)], fifo=True, visibility_timeout=2)
    engine.run(only=["customers", "work"], until="drained")
    sent = [(value["customer"], value["number"]) for value in values(engine, "sink")]
    for customer in range(3):
        assert [number for who, number in sent if who == customer] == list(range(customer, 30, 3))


# --- without processes ---


def test_call_sends_one_value_through_all_functions(db: Path, log: Log) -> None:
    engine = engine_at(
        db, [source_of, Task(many, name="fan"), Task(Model, name="model", init_args=(log, "m"), args=(1,))]
    )
    assert engine.call(3) == [[0, "m", 1], [1, "m", 1], [2, "m", 1]]
    assert [word for word, *_ in log.lines()] == ["build", "close"]
    assert not db.exists()


def source_of(value):
    return value


def test_call_raises_what_a_function_raises(db: Path) -> None:
    engine = engine_at(db, [source_of, strange, sink])
    with pytest.raises(OutputError, match="stage 'strange'"):
        engine.call(1)


def limit(count=2):
    yield from range(count)


def same(value):
    return value


def test_call_without_a_value_calls_a_source_with_its_args(db: Path) -> None:
    assert engine_at(db, [Task(limit, args=(3,)), same]).call() == [0, 1, 2]
    assert engine_at(db, [limit, same]).call() == [0, 1]
    assert engine_at(db, [limit, same]).call(1) == [0]


def none_at_all():
    return 1


def test_call_tells_whether_the_first_function_takes_a_value(db: Path) -> None:
    with pytest.raises(ConfigError, match=r"call\(value\) .* source 'none_at_all' takes .*got 3\. Without a value"):
        engine_at(db, [none_at_all, same]).call(3)
    with pytest.raises(ConfigError, match="the arguments of task 'same'"):
        engine_at(db, [same]).call()
    with pytest.raises(ConfigError, match="given: the first task 'same' receives a value, got nothing"):
        engine_at(db, [Task(same, input=True)]).call()


def test_call_gives_the_first_function_what_json_makes_of_the_value(db: Path) -> None:
    engine = engine_at(db, [Task(same, input=True)])
    assert engine.call((1, {2: 3})) == [[1, {"2": 3}]]
    with pytest.raises(OutputError, match=r"the value .* cannot become JSON"):
        engine.call({1, 2})
    # It stands for what decode= makes of a body, which may be anything.
    assert engine_at(db, [Task(same, input="theirs")]).call({1, 2}) == [{1, 2}]


@pytest.mark.parametrize(
    ("verdict", "note"),
    [
        (Retry(5), "come back after 5 s, with an attempt charged"),
        (Retry(), "come back after the usual backoff"),
        (Reject("no"), "in a run the message would go there"),
    ],
)
def test_call_tells_what_a_verdict_does_in_a_run(db: Path, verdict: Exception, note: str) -> None:
    with pytest.raises(type(verdict)) as caught:
        engine_at(db, [Task(raise_it, input=True, args=(verdict,))]).call(1)
    assert note in caught.value.__notes__[0]


def raise_it(value, error):
    raise error


def test_purge_and_delete_touch_this_pipeline_only(db: Path) -> None:
    engine = one_stage(db, Task(sink, name="work"), [1, 2])
    other = Engine([source, Task(sink, name="work"), sink], domain="t-source", broker=SQLite(db))
    feed(other, "work", [3])
    engine.purge()
    assert (sum(waiting(engine, "work")), sum(waiting(other, "work"))) == (0, 1)
    engine.delete()
    assert engine.stats()["work"].inputs[0].depth is None
    assert sum(waiting(other, "work")) == 1


def test_a_missing_queue_is_one_error_where_queues_are_not_created(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work"), sink], create_queues=False)
    with pytest.raises(Exception, match=r"queue 't-.*' does not exist") as caught:
        drain(engine, "work")
    # Neither the keeper's frames and notes nor what it tried before.
    assert (caught.value.__cause__, getattr(caught.value, "__notes__", [])) == (None, [])
    assert not any("keeper" in str(entry.path) for entry in caught.traceback)
    assert file_of(engine) == str(db.resolve())
