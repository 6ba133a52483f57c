"""Sources: generators that end, functions called for ever, and what becomes of them when their worker dies."""

import itertools
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import EmptyTaskOutput, Reject, Retry, Task
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from tests.gates import (
    Background,
    Gate,
    Log,
    alive,
    direct_children,
    ended,
    engine_at,
    eventually,
    feed,
    kill,
    program,
    query,
    values,
)


def sink(value):
    return value


def some(count: int):
    yield from range(count)


def test_a_generator_that_ends_ends_the_run(db: Path) -> None:
    engine = engine_at(db, [Task(some, args=(25,)), sink])
    summary = engine.run(only="some")
    assert summary.reason == "ended"
    assert summary["some"].done == 25
    assert values(engine, "sink") == list(range(25))


def test_arguments_of_the_run_override_those_of_the_task(db: Path) -> None:
    engine = engine_at(db, [Task(some, args=(25,)), sink])
    engine.run(only="some", args=(3,))
    assert values(engine, "sink") == [0, 1, 2]


def test_a_generator_that_gives_nothing_drains(db: Path) -> None:
    assert engine_at(db, [Task(some, args=(0,)), sink]).run(until="drained").reason == "drained"


def test_each_run_gives_its_outputs_anew(db: Path) -> None:
    engine = engine_at(db, [Task(some, args=(3,)), sink])
    for _ in range(2):
        engine.run(only="some")
    assert values(engine, "sink") == [0, 1, 2, 0, 1, 2]


def gated_at(log: Log, gates: list[Gate], most: int):
    """Yields numbers; stops at every 40th until its gate opens."""
    for number in range(most):
        if number and number % 40 == 0:
            log.note(number, os.getpid())
            gates[number // 40 - 1].wait()
        yield number


@pytest.mark.parametrize("settled", [True, False], ids=["all of it sent", "whatever of it sent"])
def test_a_killed_generators_outputs_come_exactly_once(
    db: Path, log: Log, new_gate: Callable[[], Gate], settled: bool
) -> None:
    gates = [new_gate(), new_gate()]
    engine = engine_at(db, [Task(gated_at, args=(log, gates, 100)), sink], start_method="fork")
    with Background(engine, only=0) as run:
        for at in (40, 80):
            [*_, (number, pid)] = log.wait_for(1 if at == 40 else 3)
            assert number == at
            if settled:
                eventually(lambda at=at: len(values(engine, "sink")) == at)  # type: ignore[misc]
            kill(pid)
            # The replacement goes through the same values, and comes to the same gate.
            log.wait_for(2 if at == 40 else 5)
            gates[at // 40 - 1].open()
    assert run.summary.reason == "ended"
    assert values(engine, "sink") == list(range(100))


def test_a_generator_that_ended_is_not_called_again(db: Path, log: Log, gate: Gate) -> None:
    work = Task(gated, args=(log, gate))
    engine = engine_at(db, [Task(once, args=(log,)), work], start_method="fork")
    with Background(engine, until="drained"):
        eventually(lambda: "work" in log.lines())
        gate.open()
    assert log.lines().count("source") == 1


def once(log: Log):
    log.note("source")
    yield 1


def gated(value, log: Log, gate: Gate):
    log.note("work")
    gate.wait()
    return value


# --- functions ---


def stamped(log: Log):
    log.note(time.monotonic(), os.getpid())
    return len(log.lines())


@pytest.mark.parametrize("interval", [0.05, lambda: 0.05], ids=["number", "callable"])
def test_an_interval_is_shared_by_the_stages_workers(db: Path, log: Log, interval: Any) -> None:
    engine = engine_at(db, [Task(stamped, args=(log,), workers=3, interval=interval), sink], start_method="fork")
    with Background(engine, only=0):
        log.wait_for(14)
        eventually(lambda: len({pid for _, pid in log.lines()}) > 1, "another worker has its turn")
        engine.stop()
    stamps = sorted(stamp for stamp, _ in log.lines())
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    # A worker that is late for its turn does not move the others' turns: of many the sum counts. Unshared, it would be
    # a third.
    assert stamps[-1] - stamps[0] >= 0.05 * len(gaps) / 2


def numbered(value, log: Log):
    log.note(time.monotonic())
    return value


def test_a_later_task_may_have_an_interval_too(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(some, args=(20,)), Task(numbered, args=(log,), workers=2, interval=0.04)])
    engine.run(until="drained")
    stamps = sorted(log.lines())
    assert len(stamps) == 20
    # Unshared, it would be half of it.
    assert stamps[-1] - stamps[0] >= 0.04 * 19 * 0.6


def test_what_waits_for_the_stages_interval_is_not_received_over_and_over(db: Path, log: Log) -> None:
    engine = engine_at(
        db, [Task(some), Task(numbered, args=(log,), interval=0.4)], visibility_timeout=2, start_method="fork"
    )
    feed(engine, "numbered", list(range(40)))
    with Background(engine, only="numbered"):
        log.wait_for(9)
        engine.stop()
    # Each receive is one step towards the dead-letter queue: none is made for what would only wait and go back.
    (receives,) = query(db, "SELECT sum(receives) FROM messages")
    assert receives <= 4


def called(log: Log, nothing: object = None):
    log.note("call")
    return nothing


@pytest.mark.parametrize("nothing", [None, EmptyTaskOutput])
def test_a_source_that_gives_nothing_is_not_called_in_a_hurry(db: Path, log: Log, nothing: object) -> None:
    engine = engine_at(db, [Task(called, args=(log, nothing)), sink], start_method="fork")
    began = time.monotonic()
    with Background(engine, only=0):
        log.wait_for(6)
        engine.stop()
    # 0.02, 0.04, ... 0.32 s of rest: a busy loop would have made thousands in that time.
    assert len(log.lines()) <= 8 + (time.monotonic() - began)
    assert values(engine, "sink") == []


def test_none_is_sent_on_where_it_is_asked_for(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(called, args=(log,), interval=0.01), sink], start_method="fork", ignore_none=False)
    with Background(engine, only=0):
        log.wait_for(3)
        engine.stop()
    assert set(values(engine, "sink")) == {None}
    assert len(values(engine, "sink")) == len(log.lines())


def dying(log: Log, db: str):
    number = len(log.lines())
    log.note("call")
    if number in {5, 9}:
        # All it made before was accepted.
        eventually(lambda: query(db, "SELECT count(*) FROM messages") == [number - (number == 9)])
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_function_source_loses_nothing_that_was_accepted_and_doubles_nothing(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(dying, args=(log, str(db)), interval=0.05), sink], start_method="fork")
    with Background(engine, only=0):
        log.wait_for(15)
        engine.stop()
    got = values(engine, "sink")
    # Each call but those that died.
    assert got == [number for number in range(len(log.lines())) if number not in {5, 9}]


def test_functions_of_several_workers_all_count(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(stamped, args=(log,), workers=3), sink], start_method="fork")
    with Background(engine, only=0) as run:
        log.wait_for(30)
        engine.stop()
    assert len(values(engine, "sink")) == len(log.lines()) == run.summary["stamped"].done


class Flaky(Exception):
    pass


def failing(log: Log, error: Exception):
    log.note("call")
    if len(log.lines()) == 2:
        raise error
    return len(log.lines())


def at_once(error: Exception, attempt: int):
    assert (type(error), attempt) == (Flaky, 1)
    return Retry(0)


@pytest.mark.parametrize(
    ("policy", "error"),
    [("retry", Flaky()), ("reject", Flaky()), (at_once, Flaky()), ("raise", Retry(0)), ("raise", Reject("not now"))],
    ids=["retry", "reject", "callable", "Retry", "Reject"],
)
def test_a_function_source_goes_on_after_a_failure(db: Path, log: Log, policy: Any, error: Exception) -> None:
    work = Task(failing, args=(log, error), on_error=policy, interval=0.01)
    engine = engine_at(db, [work, sink], start_method="fork")
    with Background(engine, only=0) as run:
        log.wait_for(5)
        engine.stop()
    assert run.summary["failing"].failed == 1
    got = values(engine, "sink")
    assert got == [number + 1 for number in range(len(log.lines())) if number != 1]


def test_replaced_source_workers_lose_and_double_nothing(db: Path, log: Log) -> None:
    work = Task(stamped, args=(log,), workers=2, max_tasks_per_worker=3, interval=0.005)
    engine = engine_at(db, [work, sink], start_method="fork")
    with Background(engine, only=0):
        log.wait_for(20)
        engine.stop()
    assert len(values(engine, "sink")) == len(log.lines())
    assert len({pid for _, pid in log.lines()}) >= 6


def test_a_source_elsewhere_is_waited_for(db: Path, log: Log, gate: Gate) -> None:
    here = engine_at(db, [Task(once, args=(log,)), Task(gated, args=(log, gate))], start_method="fork")
    gate.open()
    with Background(here, only="gated") as run:
        eventually(lambda: len([pid for pid in direct_children() if alive(pid)]) == 2)
        here.run(only="once")
        eventually(lambda: "work" in log.lines())
        here.stop()
    assert run.summary.reason == "stopped"


def every_hour() -> str:
    return "made"


def test_what_a_paced_source_made_does_not_wait_for_company(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes to fill its batch before the next turn."""
    monkeypatch.setattr(SQLiteConnection, "linger", 1000.0)
    engine = engine_at(db, [Task(every_hour, interval=3600), sink], start_method="fork")
    with engine.run(iterate=True) as results:
        assert next(results) == "made"


LEFT = """
import logging, sys
from tests.process.test_sources import *
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
engine = engine_at(sys.argv[1], [few, taken])
for only in ("few", "few", None, None):
    engine.run(only, until="drained")
"""


def test_what_an_earlier_run_left_is_told_where_the_source_begins_anew(tmp_path: Path, db: Path) -> None:
    with program(tmp_path, LEFT, db) as process:
        code, _, errors = ended(process)
    assert code == 0
    # A part that runs here feeds others as it should; the whole pipeline would do the work twice.
    assert re.findall(r"(\w+) t: messages of an earlier run are still in the queues \((\d+)\)", errors) == [
        ("INFO", "3"),
        ("WARNING", "6"),
    ]
    assert (
        """run(only=['taken'], until="drained", idle=1), on the command line --only taken --until drained""" in errors
    )


FINISHED = """
import sys
from tests.process.test_sources import *
engine = engine_at(sys.argv[1], [few, Task(broken, name="work"), told])
try:
    engine.run()
except ValueError as error:
    call = re.search(r"run\\(only=.*?\\)", "".join(error.__notes__))[0]
    left = engine.stats()["work"].visible
    working = engine_at(sys.argv[1], [few, Task(taken_on, name="work"), told])
    made = eval(f"working.{call}")
    print(call, left > 0, left == (len(list(made)) if "iterate" in call else made["tell"].done))
"""


def broken(value):
    raise ValueError(value)


def taken_on(value):
    return value * 10


told = Task(sink, name="tell")


@pytest.mark.parametrize("iterate", [False, True])
def test_the_run_that_the_exception_names_finishes_only_what_is_left(tmp_path: Path, db: Path, iterate: bool) -> None:
    text = FINISHED
    if iterate:
        text = text.replace("engine.run()", "list(engine.run(iterate=True))")
    with program(tmp_path, text, db) as process:
        code, out, errors = ended(process)
    assert code == 0, errors
    wanted = "iterate=True, " if iterate else ""
    assert out == f"""run(only=['work', 'tell'], {wanted}until="drained", idle=1) True True\n"""


def test_a_pipeline_that_is_fed_names_no_other_run(db: Path) -> None:
    engine = engine_at(db, [Task(broken, input=True), sink])
    engine.put(1)
    with pytest.raises(ValueError, match="1") as caught:
        engine.run()
    assert not any("begins anew" in note for note in caught.value.__notes__)


def few():
    yield from range(3)


def taken(value):
    pass
