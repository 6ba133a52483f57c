"""Orders to a running engine: pause, resume, scale, cancel. Nothing is lost or doubled, and nobody else is charged."""

import collections
import contextlib
import ctypes
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, Cancelled, ConfigError, Engine, OrderRefused, SQLite, Task, current_message
from sqspipes_mp.brokers.base import Completion
from sqspipes_mp.caller.dead_letters import redrive
from sqspipes_mp.cli.main import main
from sqspipes_mp.errors import CANCELLED
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.ipc.running.asking import ask
from sqspipes_mp.ipc.running.folders import Engine as Found
from sqspipes_mp.ipc.running.folders import Unanswered, engines
from sqspipes_mp.ipc.running.memory import open_memory
from sqspipes_mp.ipc.running.state import state
from sqspipes_mp.ipc.statistics import Statistics
from standin import StandIn
from tests.gates import (
    Background,
    Gate,
    Log,
    charges,
    dead,
    engine_at,
    eventually,
    kill,
    present,
    query,
    values,
    waiting,
)


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(tmp_path / "registry"))


def work(value: int, gate: Gate, log: Log) -> int:
    log.note(value)
    if value < 10:
        gate.wait()
    return value


def many(batch: list[int], gate: Gate, log: Log) -> list[int]:
    for value in batch:
        log.note(value)
    if min(batch) < 10:
        gate.wait()
    return batch


def in_c(value: int, gate: Gate, log: Log) -> int:
    """Keep the GIL, in C code, for the first value."""
    log.note(value)
    if value == 0:
        ctypes.PyDLL(None).usleep(600_000_000)
    return value


def sink(value: int) -> None:
    pass


def source() -> Iterator[object]:
    yield from ()


MODES: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "plain": (work, {}),
    "threads": (work, {"threads": 3}),
    "batch": (many, {"batch": 3, "batch_wait": 0.05}),
}


def engine_of(broker: SQS | SQLite, mode: str, gate: Gate, log: Log, **settings: Any) -> Engine:
    """Return an engine whose stage "work" has one worker, unless ``settings`` say otherwise."""
    function, how = MODES[mode]
    task = Task(function, name="work", input=True, args=(gate, log), **{"workers": 1, **how, **settings})
    return Engine([task, Task(sink, name="sink")], domain="t", broker=broker, on_error="retry")


def begun(log: Log) -> collections.Counter[int]:
    return collections.Counter(log.lines())


def seen(engine: Engine) -> Callable[[], dict[str, Any]]:
    """Return a look at the state of the one engine that runs."""
    found = the_one()

    def look() -> dict[str, Any]:
        memory = open_memory(found)
        statistics = Statistics(memory.view)
        try:
            return state(statistics)
        finally:
            statistics.close()
            memory.close()

    return look


def the_one() -> Found:
    found: list[Found] = []

    def look() -> bool:
        found[:] = engines()
        return len(found) == 1

    eventually(look, "one engine is registered")
    return found[0]


def the_stage(engine: Engine) -> dict[str, Any]:
    return present(next(stage for stage in seen(engine)()["stages"] if stage["name"] == "work"))


def running_ids(engine: Engine) -> list[str]:
    """Return the ids of the calls that run, as a person sees them."""
    return [call["id"] for worker in seen(engine)()["workers"] for call in worker["calls"]]


def hop_of(log: Log, value: int) -> str:
    return present(next(hop for each, hop in log.lines() if each == value))


# -- pause ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broker", "mode"), [("sqlite", "plain"), ("sqlite", "threads"), ("sqlite", "batch"), ("sqs", "plain")]
)
def test_a_paused_stage_begins_nothing_and_gives_all_back(
    broker: str, mode: str, db: Path, gate: Gate, log: Log, request: pytest.FixtureRequest
) -> None:
    queues: SQS | SQLite = request.getfixturevalue("sqs") if broker == "sqs" else SQLite(db)
    engine = engine_of(queues, mode, gate, log, workers=2)
    held = list(range(2 if mode == "plain" else 6))
    engine.put_many(held)
    with Background(engine, only="work", until="drained", idle=0) as run:
        eventually(lambda: sorted(begun(log)) == held, "each worker has all the calls that it runs at once")
        engine.put_many(range(10, 110))
        engine.pause("work")
        engine.pause("work")
        assert the_stage(engine)["paused"]
        gate.open()
        eventually(lambda: waiting(engine, "work") == (100, 0, 0), "the calls end, and all else is given back")
        assert begun(log) == collections.Counter(held)
        assert the_stage(engine)["running"] == 0
        engine.resume("work")
    assert begun(log) == collections.Counter([*held, *range(10, 110)])
    assert run.summary["work"].done == len(held) + 100
    assert run.summary["work"].dead == run.summary["work"].failed == 0


@pytest.mark.parametrize("broker", ["sqlite", "standard", "fifo"])
def test_an_idle_worker_takes_no_message_after_the_pause_and_none_as_it_leaves(
    broker: str, db: Path, gate: Gate, log: Log, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody is in C code here, but the machine may be busy.
    monkeypatch.setattr("sqspipes_mp.supervisor.pausing.POLL_GRACE", 60.0)
    on_sqs, fifo = broker != "sqlite", broker == "fifo"
    queues: SQS | SQLite = request.getfixturevalue("sqs") if on_sqs else SQLite(db)
    server = request.getfixturevalue("server") if on_sqs else None
    task = Task(work, name="work", input=True, args=(gate, log), workers=2)
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=queues, on_error="retry", fifo=fifo)
    gate.open()

    def polls(count: int) -> None:
        if server is not None:
            eventually(lambda: server.ledger(messages=False)["waiting"] == count, f"{count} long polls wait")

    def receives() -> int:
        """Return the receives of all messages that are in the stage's queue."""
        if server is None:
            return sum(query(db, "SELECT receives FROM messages"))
        (queue,) = engine.pipeline.stage("work").inputs
        return sum(each["received"] for each in server.messages(queue) if not each["deleted"])

    with Background(engine, only="work") as run:
        eventually(lambda: the_stage(engine)["ready"] == 2, "both have booted")
        for value in (10, 20):
            polls(2)
            engine.pause("work")
            # The long polls would take them.
            engine.put_many(range(value, value + 10))
            assert waiting(engine, "work") == (10, 0, 0)
            assert receives() == 0
            polls(0)
            engine.resume("work")
            log.wait_for(value)
            eventually(lambda: waiting(engine, "work") == (0, 0, 0), "all are done")
        polls(2)
        engine.scale("work", 1)
        polls(1)
        eventually(lambda: len(_living(engine)) == 1, "the other has left")
        engine.put(30)
        log.wait_for(21)
        engine.stop()
    assert begun(log) == collections.Counter(range(10, 31))
    assert (run.summary["work"].done, run.summary["work"].failed) == (21, 0)


def test_a_worker_in_c_code_begins_nothing_after_the_pause(db: Path, gate: Gate, log: Log) -> None:
    function = Task(in_c_until, name="work", input=True, args=(gate, log), workers=1)
    engine = Engine([function, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put_many(range(5))
    with Background(engine, only="work", until="drained", idle=0):
        log.wait_for(1)
        # The worker hears of nothing while C code keeps its GIL: the word on the board has to do.
        engine.pause("work")
        gate.open()
        eventually(lambda: waiting(engine, "work") == (4, 0, 0), "the rest is given back")
        assert log.lines() == [0]
        engine.resume("work")
    assert sorted(log.lines()) == [0, 1, 2, 3, 4]


def in_c_until(value: int, gate: Gate, log: Log) -> int:
    """Keep the GIL, in C code, until the gate opens, for the first value."""
    log.note(value)
    if value == 0:
        fd = os.open(gate.path, os.O_RDONLY | os.O_NONBLOCK)
        ready = (ctypes.c_int * 2)(fd, 1)
        ctypes.PyDLL(None).poll(ready, 1, 60_000)
        os.close(fd)
    return value


def numbers(gate: Gate, log: Log) -> Iterator[int]:
    for number in range(300):
        log.note(number)
        if number == 20:
            gate.wait()
        yield number


def test_a_paused_generator_goes_on_where_it_was(db: Path, gate: Gate, log: Log) -> None:
    engine = engine_at(db, [Task(numbers, args=(gate, log)), Task(sink, name="sink")])
    with Background(engine, only="numbers", until="drained", idle=0):
        log.wait_for(21)
        engine.pause("numbers")
        with pytest.raises(OrderRefused, match="is a generator source, which has one worker"):
            engine.scale("numbers", 2)
        gate.open()
        eventually(lambda: len(values(engine, "sink")) == 21, "what was made is sent")
        assert len(log.lines()) == 21
        engine.resume("numbers")
        eventually(lambda: len(values(engine, "sink")) == 300, "it goes on")
    assert values(engine, "sink") == list(range(300))
    assert log.lines() == list(range(300))


def test_the_end_waits_for_a_paused_stage_and_says_so_and_a_stop_reaches_it(
    db: Path, gate: Gate, log: Log, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []

    def told() -> int:
        said.append(capfd.readouterr().err)
        # The records of fresh children come to this program's log, and may be on their standard error, too.
        return max(text.count("sink is paused, and has messages") for text in ("".join(said), caplog.text))

    engine = engine_of(SQLite(db), "plain", gate, log, workers=2)
    engine.put_many(range(10, 14))
    with Background(engine, only=["work", "sink"], until="drained", idle=0) as run:
        eventually(lambda: len(engines()) == 1, "it runs")
        found = the_one()
        with contextlib.suppress(OrderRefused):
            engine.pause("sink")
        # By the socket, as the command line does; a restart finds the stage paused.
        eventually(lambda: ask(found, {"do": "pause", "stage": "sink"})["ok"], "paused")
        eventually(lambda: waiting(engine, "sink") == (4, 0, 0), "the outputs wait")
        first = present(eventually(lambda: _pid_of(engine, "sink"), "its worker runs"))
        kill(first)
        eventually(lambda: _pid_of(engine, "sink") not in {None, first}, "a successor runs")
        eventually(told, "the keeper says why")
        assert waiting(engine, "sink") == (4, 0, 0)
        engine.stop()
    assert run.summary.reason == "stopped"
    assert waiting(engine, "sink") == (4, 0, 0)
    assert charges(engine) == [0] * 4
    assert told() == 1


def _pid_of(engine: Engine, stage: str) -> int | None:
    workers = [each for each in seen(engine)()["workers"] if each["stage"] == stage]
    return workers[0]["pid"] if workers and workers[0]["state"] not in {"none", "booting"} else None


# -- scale ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("broker", "mode"), [("sqlite", "plain"), ("sqlite", "threads"), ("sqs", "plain")])
def test_workers_come_and_go_under_load(
    broker: str, mode: str, db: Path, gate: Gate, log: Log, request: pytest.FixtureRequest
) -> None:
    queues: SQS | SQLite = request.getfixturevalue("sqs") if broker == "sqs" else SQLite(db)
    engine = engine_of(queues, mode, gate, log, max_tasks_per_worker=40)
    engine.put_many([0, *range(10, 500)])
    with Background(engine, only="work", until="drained", idle=0) as run:
        eventually(lambda: 0 in begun(log), "the held call runs")
        for number in (3, 2, 4, 1):
            engine.scale("work", number)
            assert the_stage(engine)["wanted"] == number
        # The one in the held call is the last that would go.
        eventually(lambda: len(_living(engine)) == 1, "the others leave")
        gate.open()
    assert begun(log) == collections.Counter([0, *range(10, 500)])
    assert (run.summary["work"].done, run.summary["work"].workers) == (491, 1)


def _living(engine: Engine) -> list[int]:
    return [each["pid"] for each in seen(engine)()["workers"] if each["state"] not in {"none", "ended"}]


def breaks(path: str) -> None:
    if Path(path).exists():
        raise OSError("no GPU left")


def slow_boot(gate: Gate, log: Log) -> None:
    log.note("boots")
    if len(log.lines()) > 1:
        gate.wait()


def test_a_new_worker_that_does_not_boot_takes_the_order_back(db: Path, tmp_path: Path, gate: Gate, log: Log) -> None:
    flag = tmp_path / "broken"
    task = Task(work, name="work", input=True, args=(gate, log), workers=1, init=partial(breaks, str(flag)))
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put_many([0, 10, 11])
    with Background(engine, only="work", until="drained", idle=0) as run:
        log.wait_for(1)
        flag.touch()
        with pytest.raises(OrderRefused, match=r"did not boot .*OSError.*; there are 1 again"):
            engine.scale("work", 4)
        assert the_stage(engine)["wanted"] == 1
        flag.unlink()
        engine.scale("work", 2)
        room = f"can have 1 to {max(32, 4 * cpus())} workers in this run"
        for wrong, why in ((0, "pause it instead"), (10_000, room), (-1, room), (True, "whole number")):
            with pytest.raises(OrderRefused, match=why):
                engine.scale("work", wrong)
        with pytest.raises(ConfigError):
            engine.scale("none", 2)
        gate.open()
    assert run.summary["work"].done == 3
    with pytest.raises(OrderRefused, match="under way"):
        engine.pause("work")


def test_a_booting_worker_that_is_one_too_many_goes_at_once(
    db: Path, gate: Gate, log: Log, new_gate: Callable[[], Gate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqspipes_mp.supervisor.scaling._PATIENCE", 0.05)
    boots, boot_gate = Log(str(tmp_path / "boots")), new_gate()
    task = Task(work, name="work", input=True, args=(gate, log), workers=1, init=partial(slow_boot, boot_gate, boots))
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put(0)
    with Background(engine, only="work", until="drained", idle=0) as run:
        log.wait_for(1)
        engine.scale("work", 2)
        boots.wait_for(2)
        engine.scale("work", 1)
        eventually(lambda: len(_living(engine)) == 1, "the booting one is gone")
        gate.open()
    assert run.summary["work"].done == 1


def sees_the_end(value: int, gate: Gate, log: Log) -> int:
    log.note("begins")
    message, pause = current_message(), threading.Event()
    while not message.stopping:
        pause.wait(0.01)
    log.note("sees")
    gate.wait()
    return value


def test_only_the_calls_of_a_worker_that_leaves_are_asked_to_end(db: Path, gate: Gate, log: Log) -> None:
    task = Task(sees_the_end, name="work", input=True, args=(gate, log), workers=2)
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put_many([1, 2])
    with Background(engine, only="work") as run:
        log.wait_for(2)
        engine.scale("work", 1)
        log.wait_for(3)
        gate.open()
        eventually(lambda: len(_living(engine)) == 1, "the worker too many has left")
        assert log.lines() == ["begins", "begins", "sees"]
        engine.stop()
    assert log.lines().count("sees") == 2
    assert run.summary["work"].done == 2


# -- cancel -----------------------------------------------------------------------------------------------------------


def hop_noted(value: int, gate: Gate, log: Log) -> int:
    log.note(value, current_message().hop)
    if value < 10:
        gate.wait()
    return value


@pytest.mark.parametrize(("broker", "threads"), [("sqlite", 1), ("sqlite", 4), ("sqs", 1)])
def test_exactly_one_call_is_cancelled_and_nobody_else_is_charged(
    broker: str, threads: int, db: Path, gate: Gate, log: Log, request: pytest.FixtureRequest
) -> None:
    queues: SQS | SQLite = request.getfixturevalue("sqs") if broker == "sqs" else SQLite(db)
    task = Task(hop_noted, name="work", input=True, args=(gate, log), workers=1, threads=threads, max_attempts=1)
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=queues, on_error="retry")
    engine.put_many(range(threads))
    with Background(engine, only="work", until="drained", idle=0) as run:
        log.wait_for(threads)
        engine.put_many(range(10, 30))
        hop = hop_of(log, 0)
        for wrong, why in (("nothing like it", "no call"), ("", "characters")):
            with pytest.raises(OrderRefused, match=why):
                engine.cancel(wrong)
        engine.cancel(hop[:16])
        with pytest.raises(OrderRefused, match="no call"):
            engine.cancel(hop)
        gate.open()
    (letter,) = engine.dead_letters()
    assert json.loads(letter.body)["value"] == 0
    assert (letter.failure.error, letter.failure.text) == ("Cancelled", CANCELLED)
    ran = collections.Counter(value for value, _ in log.lines())
    # With one attempt each, a charge would have been the end of any other.
    assert ran == collections.Counter([*range(threads), *range(1, threads), *range(10, 30)])
    assert (run.summary["work"].done, run.summary["work"].dead) == (threads - 1 + 20, 1)
    assert run.summary["work"].failed == 0


def test_a_cancelled_member_of_a_batch_goes_at_its_next_delivery_and_the_others_run_again_together(
    db: Path, gate: Gate, log: Log
) -> None:
    task = Task(together, name="work", input=True, args=(gate, log), workers=1, batch=3, batch_wait=5, max_attempts=1)
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put_many([0, 1, 2])
    with Background(engine, only="work", until="drained", idle=0):
        log.wait_for(1)
        hops = running_ids(engine)
        assert len(hops) == 3
        engine.cancel(hops[1])
        gate.open()
    (first, *again) = log.lines()
    assert first == [0, 1, 2]
    left = sorted(value for batch in again for value in batch)
    assert len(left) == 2
    ((body, failure),) = dead(engine, "work")
    assert failure.error == "Cancelled"
    assert sorted([*left, json.loads(body)["value"]]) == [0, 1, 2]
    # None of them is isolated.
    assert [len(batch) for batch in again] == [2]


def together(batch: list[int], gate: Gate, log: Log) -> list[int]:
    log.note(batch)
    gate.wait()
    return batch


def test_a_call_in_c_code_is_cancelled_and_the_worker_has_a_successor_at_once(db: Path, gate: Gate, log: Log) -> None:
    task = Task(in_c, name="work", input=True, args=(gate, log), workers=1)
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put_many(range(4))
    with Background(engine, only="work", until="drained", idle=0) as run:
        log.wait_for(1)
        eventually(lambda: running_ids(engine), "the call is told")
        (hop,) = running_ids(engine)
        engine.cancel(hop)
    assert sorted(log.lines()) == [0, 1, 2, 3]
    assert [failure.error for _, failure in dead(engine, "work")] == ["Cancelled"]
    assert run.summary["work"].done == 3


def test_a_dead_letter_of_a_cancelled_call_can_be_redriven(db: Path, gate: Gate, log: Log) -> None:
    task = Task(hop_noted, name="work", input=True, args=(gate, log), workers=1)
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put(0)
    with Background(engine, only="work") as run:
        log.wait_for(1)
        engine.cancel(hop_of(log, 0))
        eventually(lambda: dead(engine, "work"), "it is dead-lettered")
        gate.open()
        redrive(engine.pipeline, engine.broker, None)
        eventually(lambda: values(engine, "sink"), "it is done")
        engine.stop()
    assert run.summary["work"].done == 1


# -- map and iterate --------------------------------------------------------------------------------------------------


def test_map_is_paused_scaled_and_cancelled_from_its_loop(db: Path, gate: Gate, log: Log) -> None:
    task = Task(hop_noted, name="work", workers=2, args=(gate, log))
    engine = Engine([task], domain="t", broker=SQLite(db), on_error="retry")
    results = engine.map([0, *range(10, 200)], ordered=False, return_exceptions=True, with_input=True)
    got: dict[int, object] = {}
    with results:
        for number, (value, result) in enumerate(results):
            got[value] = result
            if number == 10:
                engine.scale("work", 4)
                engine.pause("work")
                engine.resume("work")
            elif number == 30:
                engine.cancel(hop_of(log, 0))
            elif number == 60:
                engine.scale("work", 1)
    assert isinstance(got.pop(0), Cancelled)
    assert got == {value: value for value in range(10, 200)}
    assert results.summary["work"].done == 190


def test_an_order_over_the_socket_says_its_reach_and_why_it_is_refused(db: Path, gate: Gate, log: Log) -> None:
    engine = engine_of(SQLite(db), "plain", gate, log)
    engine.put(0)
    with Background(engine, only="work", until="drained", idle=0):
        log.wait_for(1)
        found = the_one()
        answer = ask(found, {"do": "pause", "stage": "work"})
        assert (answer["running"], "other machines" in answer["reach"]) == (1, True)
        assert ask(found, {"do": "resume", "stage": "work"})["ok"]
        answer = ask(found, {"do": "scale", "stage": "work", "workers": 2})
        assert (answer["workers"], answer["was"]) == (2, 1)
        for order, why in (
            ({"do": "pause", "stage": "sink"}, "stage must be one of work, got 'sink'"),
            ({"do": "pause", "stage": ["work"]}, "stage must be one of work"),
            ({"do": "scale", "stage": "work", "workers": "3"}, "whole number"),
            ({"do": "cancel", "call": 7}, "must be the id"),
        ):
            with pytest.raises(Unanswered, match=why):
                ask(found, order)
        gate.open()


def test_orders_on_the_command_line(db: Path, gate: Gate, log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    task = Task(hop_noted, name="work", input=True, args=(gate, log), workers=1)
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put(0)
    with Background(engine, only="work") as run:
        log.wait_for(1)
        for order, said in (
            (["pause", "--stage", "work"], "work is paused; calls that run still: 1"),
            (["resume", "t", "--stage", "work"], "work goes on"),
            (["scale", "work=2"], "work: 2 workers, 1 before"),
            (["pause"], "work is paused"),
            (["resume"], "work goes on"),
            (["cancel", "t", hop_of(log, 0)[:12]], "is cancelled, its message is a dead letter"),
        ):
            assert main(order) == 0
            text = capsys.readouterr().err
            assert said in text
            # Said where an order could pass for one to all machines.
            assert ("other machines go on" in text) is (order[0] != "cancel")
        for order, code, why in (
            (["scale", "work"], 2, "NAME=N"),
            (["scale", "work=0"], 1, "pause it instead"),
            (["cancel", "0000"], 1, "no call 0000 runs here"),
            (["cancel", "xyz"], 1, "got 'xyz'; top shows it in its column message"),
            (["pause", "--stage", "wrk"], 2, "one of work, got 'wrk'. Did you mean 'work'?"),
            (["scale", "wrk=3"], 2, "Did you mean 'work'?"),
            (["stack", "--stage", "wrk"], 2, "Did you mean 'work'?"),
            (["stop", "t:engine"], 1, "there are: t (pid"),
            (["stop", "t:engine"], 1, "Did you mean 't'?"),
        ):
            assert main(order) == code
            assert why in capsys.readouterr().err
        assert main(["stop"]) == 0
    assert (run.summary.reason, run.summary.dead) == ("stopped", 1)


# -- aimed at a worker that boots, computes, or cannot get rid of its work --------------------------------------------


def boots_late(gate: Gate, log: Log) -> None:
    log.note("boots")
    gate.wait()


def test_a_pause_reaches_a_booting_worker(
    db: Path, gate: Gate, log: Log, new_gate: Callable[[], Gate], tmp_path: Path
) -> None:
    boots, boot_gate = Log(str(tmp_path / "boots")), new_gate()
    task = Task(work, name="work", input=True, args=(gate, log), workers=1, init=partial(boots_late, boot_gate, boots))
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put_many(range(10, 20))
    with Background(engine, only="work", until="drained", idle=0) as run:
        boots.wait_for(1)
        engine.pause("work")
        with pytest.raises(OrderRefused, match="no call"):
            engine.cancel("0123456789")
        boot_gate.open()
        eventually(lambda: the_stage(engine)["ready"] == 1, "it has booted")
        assert (log.lines(), waiting(engine, "work")) == ([], (10, 0, 0))
        engine.resume("work")
    assert begun(log) == collections.Counter(range(10, 20))
    assert run.summary["work"].done == 10


@pytest.mark.parametrize("order", ["scale", "stop"])
@pytest.mark.parametrize("mode", ["C code", "batch"])
def test_workers_that_compute_end_their_calls_before_they_leave(
    order: str, mode: str, db: Path, gate: Gate, log: Log
) -> None:
    function, how, held = (in_c_until, {}, [0, 0]) if mode == "C code" else (many, MODES["batch"][1], [*range(6)])
    task = Task(function, name="work", input=True, args=(gate, log), workers=2, max_attempts=1, **how)
    engine = Engine([task, Task(sink, name="sink")], domain="t", broker=SQLite(db), on_error="retry")
    engine.put_many(held)
    with Background(engine, only="work", until="drained", idle=0) as run:
        log.wait_for(len(held))
        engine.put_many(range(10, 40))
        if order == "scale":
            engine.scale("work", 1)
        else:
            engine.stop()
        gate.open()
    left = values(engine, "work")
    assert sorted([*values(engine, "sink"), *left]) == [*held, *range(10, 40)]
    assert begun(log) == collections.Counter([*held, *range(10, 40)]) - collections.Counter(left)
    assert charges(engine) == [0] * (len(held) + 30)
    # A call may begin until its worker hears of the stop.
    assert left if order == "stop" else not left
    assert run.summary["work"].failed == 0


def waits_for_room() -> int:
    """Return how many threads of the stage's workers wait for room in their outbox."""
    answer = ask(the_one(), {"do": "stack", "stage": "work"})
    told = answer["stacks"]
    # The thread that hears orders waits for no room.
    assert not answer["silent"]
    return sum(each["stack"].count("self._changed.wait_for(lambda: len(backlog.items)") for each in told)


def test_orders_to_workers_with_a_full_outbox_lose_and_double_nothing(
    sqs: SQS, server: StandIn, gate: Gate, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqspipes_mp.supervisor.orders._STACK_PATIENCE", 60.0)
    # Few requests at once, so that few messages fill an outbox.
    monkeypatch.setattr("sqspipes_mp.brokers.sqs.connection._MOST_AT_ONCE", 2)
    how: dict[str, Any] = {"workers": 1, "threads": 2, "prefetch": 4, "max_attempts": 1}
    task = Task(hop_noted, name="work", input=True, args=(gate, log), **how)
    engine = Engine(
        [task, Task(sink, name="sink")], domain="t", broker=sqs, on_error="retry", fifo=True, start_method="fork"
    )

    def fed(values: list[int]) -> None:
        """Have a paused stage go on with values whose outputs nobody takes."""
        engine.put_many(values)
        server.faults(throttle=1.0, only=["SendMessageBatch"])
        engine.resume("work")

    with Background(engine, only="work") as run:
        try:
            eventually(lambda: the_stage(engine)["ready"] == 1, "it has booted")
            engine.pause("work")
            fed([0, *range(10, 300)])
            eventually(lambda: waits_for_room() == 1, "the outbox is full, beside the call that is held")
            assert len(log.lines()) < 150
            engine.pause("work")
            engine.resume("work")
            engine.scale("work", 2)
            eventually(lambda: waits_for_room() == 3, "the new worker's outbox is full, too")
            engine.scale("work", 1)
            engine.cancel(hop_of(log, 0))
            server.faults(throttle=0)
            eventually(lambda: _accounted(engine) == 291, "each is at the end, or dead-lettered")
            eventually(lambda: len(_living(engine)) == 1, "the worker too many has left")
            engine.pause("work")
            fed([*range(1000, 1150)])
            eventually(lambda: waits_for_room() == 2, "the outbox is full again")
            engine.stop()
        finally:
            server.faults(throttle=0, only=[])
            gate.open()
    (letter,) = engine.dead_letters()
    assert (json.loads(letter.body)["value"], letter.failure.error) == (0, "Cancelled")
    back, done = (_received(sqs, engine.pipeline.stage(name).inputs[0]) for name in ("work", "sink"))
    assert sorted([*back, *done]) == [*range(10, 300), *range(1000, 1150)]
    assert back
    assert (run.summary["work"].dead, run.summary["work"].failed) == (1, 0)


# -- all of it, under load --------------------------------------------------------------------------------------------


def step(value: int) -> int:
    sum(range(20_000))
    return value


def steps(batch: list[int]) -> list[int]:
    return [step(value) for value in batch]


@pytest.mark.parametrize("broker", ["sqlite", "fifo"])
def test_a_storm_of_orders_loses_and_doubles_nothing(broker: str, db: Path, request: pytest.FixtureRequest) -> None:
    fifo = broker == "fifo"
    queues: SQS | SQLite = request.getfixturevalue("sqs") if fifo else SQLite(db)
    # Each has one attempt: a charge would be the end of any other than the cancelled.
    tasks = [
        Task(step, name="one", input=True, workers=2, max_attempts=1),
        Task(step, name="two", threads=3, workers=1, max_attempts=1),
        Task(steps, name="three", batch=4, batch_wait=0.01, workers=1, max_attempts=1),
        Task(sink, name="sink"),
    ]
    engine = Engine(tasks, domain="t", broker=queues, on_error="retry", fifo=fifo)
    dice, cancelled = random.Random(5), 0
    stages = ("one", "two", "three")
    with Background(engine, only=stages) as run:
        look = seen(engine)
        eventually(lambda: all(stage["ready"] for stage in look()["stages"]), "all have booted")
        engine.put_many(range(200))
        for _ in range(30):
            what = dice.choice(("pause", "resume", "scale", "cancel", "cancel"))
            stage = dice.choice(stages)
            ids = [call["id"] for worker in look()["workers"] for call in worker["calls"]]
            with contextlib.suppress(OrderRefused):
                if what == "scale":
                    engine.scale(stage, dice.randint(1, 3))
                elif what != "cancel":
                    getattr(engine, what)(stage)
                elif ids:
                    engine.cancel(dice.choice(ids))
                    cancelled += 1
        for stage in stages:
            engine.resume(stage)
        eventually(lambda: _accounted(engine) == 200, "each is at the end, or dead-lettered")
        engine.stop()
    letters = [json.loads(letter.body)["value"] for letter in engine.dead_letters()]
    assert {letter.failure.error for letter in engine.dead_letters()} <= {"Cancelled"}
    assert len(letters) == cancelled
    (queue,) = engine.pipeline.stage("sink").inputs
    assert sorted([*letters, *_received(queues, queue)]) == list(range(200))
    assert run.summary.dead == cancelled


def _accounted(engine: Engine) -> int:
    stats = engine.stats()
    return stats["sink"].visible + sum(stage.dead or 0 for stage in stats.stages)


def _received(broker: SQS | SQLite, queue: str) -> list[int]:
    found: list[int] = []
    with contextlib.closing(broker.open()) as connection:
        while batch := connection.receive([queue], 10, 0.5, 3600.0):
            found += [json.loads(each.body)["value"] for each in batch]
            connection.complete([Completion(each.handle) for each in batch])
    return found
