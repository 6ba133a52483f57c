"""``Task(max_waiting=)``: a source rests while too many messages wait, and goes on when they are fewer."""

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, Engine, SQLite, Task
from sqspipes_mp.brokers.base import Completion, Output
from sqspipes_mp.caller.progress.rates import Pace, cells
from sqspipes_mp.ipc.running.folders import engines
from sqspipes_mp.ipc.running.memory import open_memory
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import BACKLOG, BACKLOG_AT, RESTING, Statistics
from sqspipes_mp.ipc.summary import readings
from sqspipes_mp.keeper import queue_counts
from sqspipes_mp.pipeline.plan import Settings, make_plan
from sqspipes_mp.supervisor.run import new_board
from sqspipes_mp.worker.run import rest
from tests.gates import Background, Gate, Log, alive, children, drain, eventually, kill, present

MOST = 20
#: Yields before the source waits until they were counted, and in all.
FIRST, COUNT = 100, 300


def numbers(log: Log, counted: Gate):
    for value in range(COUNT):
        if value == FIRST:
            counted.wait()
        log.note(value)
        yield value


def held(value, gate: Gate):
    gate.wait()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count quickly on SQS, too; the keeper is forked."""
    monkeypatch.setattr(queue_counts, "SELDOM", 0.2)
    monkeypatch.setattr(queue_counts, "_OFTEN", 0.1)
    # On a busy machine no count is new.
    monkeypatch.setattr(rest, "_OLD", 1e9)


@pytest.fixture
def counted(new_gate: Callable[[], Gate]) -> Gate:
    return new_gate()


def engine_on(broker: Any, log: Log, counted: Gate, gate: Gate, **settings: Any) -> Engine:
    tasks = [Task(numbers, args=(log, counted), max_waiting=MOST), Task(held, args=(gate,))]
    return Engine(tasks, domain="t", broker=broker, start_method="fork", **settings)


def board_of(engine: Engine, counted: Gate) -> Scoreboard:
    """Return the run's board once too many messages were counted, and let the source go on."""
    board = eventually(lambda: engine._parts.runs._watch).board
    eventually(lambda: board.stage(0, BACKLOG) - 1 > MOST, "messages are counted")
    counted.open()
    return board


@pytest.fixture(params=["sqlite", "sqs"])
def broker(request: pytest.FixtureRequest, db: Path) -> Any:
    return SQLite(db) if request.param == "sqlite" else request.getfixturevalue("sqs")


def test_it_rests_and_goes_on(broker: SQS | SQLite, log: Log, counted: Gate, new_gate: Callable[[], Gate]) -> None:
    gate = new_gate()
    engine = engine_on(broker, log, counted, gate)
    with Background(engine, only=["numbers", "held"]) as run:
        board = board_of(engine, counted)
        eventually(lambda: board.stage(0, RESTING), "the source rests")
        last = board.stage(0, BACKLOG_AT)
        eventually(lambda: board.stage(0, BACKLOG_AT) > last + 2e8, "it is counted again")
        assert len(log.lines()) == FIRST + 1
        plan = present(engine._parts.runs._watch).plan
        assert cells(Pace(0.0).observe(1.0, readings(plan, board))[0])[2] == "rests"
        gate.open()
        eventually(lambda: len(log.lines()) == COUNT, "the source goes on")
        eventually(lambda: readings(plan, board)[1].done == COUNT, "all are done")
        engine.stop()
    assert log.lines() == list(range(COUNT))
    assert present(run.summary)["held"].done == COUNT


def test_a_drain_ends_a_rest(db: Path, log: Log, counted: Gate) -> None:
    engine = engine_on(SQLite(db), log, counted, counted)
    with Background(engine, only="numbers") as run:
        board = board_of(engine, counted)
        eventually(lambda: board.stage(0, RESTING), "the source rests where it runs alone")
        engine.stop()
    assert present(run.summary).reason == "stopped"
    # What it had made was sent.
    assert engine.stats()["held"].visible == len(log.lines())


def log_to(path: Path) -> None:
    logging.basicConfig(filename=path, force=True)


def test_an_old_count_lets_nobody_rest(
    db: Path, log: Log, tmp_path: Path, counted: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    monkeypatch.setattr(rest, "_OLD", -1e9)
    engine = engine_on(SQLite(db), log, counted, counted, setup=partial(log_to, told))
    with Background(engine, only="numbers"):
        board_of(engine, counted)
        eventually(lambda: len(log.lines()) == COUNT, "the source goes on")
        engine.stop()
    assert "goes on though" in told.read_text()


def taken(value: int, gate: Gate, seen: Log) -> None:
    gate.wait()
    seen.note(value)


def test_whoever_dies_while_it_rests_nothing_is_lost_or_doubled(
    db: Path, log: Log, new_gate: Callable[[], Gate]
) -> None:
    counted, gate, seen, births = new_gate(), new_gate(), Log(f"{log.path}-seen"), Log(f"{log.path}-births")
    tasks = [
        Task(numbers, args=(log, counted), max_waiting=MOST, init=partial(born, births, "numbers")),
        Task(taken, args=(gate, seen), init=partial(born, births, "taken")),
    ]
    engine = Engine(tasks, domain="t", broker=SQLite(db), start_method="fork")
    with Background(engine, only=["numbers", "taken"]) as run:
        board = board_of(engine, counted)
        eventually(lambda: board.stage(0, RESTING), "the source rests")
        workers = dict(births.wait_for(2))
        [keeper] = {child.pid for child in children()} - set(workers.values())
        kill(keeper)
        eventually(lambda: not alive(keeper))
        last = board.stage(0, BACKLOG_AT)
        eventually(lambda: board.stage(0, BACKLOG_AT) > last, "the next keeper counts")
        kill(workers["numbers"])
        births.wait_for(3)
        # The next one walks through all that was accepted.
        eventually(lambda: board.stage(0, RESTING) and len(log.lines()) == 2 * (FIRST + 1), "the next source rests")
        gate.open()
        eventually(lambda: len(seen.lines()) >= COUNT, "all are done")
        engine.stop()
    assert sorted(seen.lines()) == list(range(COUNT))
    assert present(run.summary)["taken"].failed == 0


def test_all_that_was_accepted_before_everything_died_at_rest_is_done_once(
    db: Path, log: Log, tmp_path: Path, new_gate: Callable[[], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(tmp_path / "registry"))
    counted, gate, seen = new_gate(), new_gate(), Log(f"{log.path}-seen")
    tasks = [Task(numbers, args=(log, counted), max_waiting=MOST), Task(taken, args=(gate, seen))]
    engine = Engine(tasks, domain="t", broker=SQLite(db), start_method="fork")
    process = multiprocessing.get_context("fork").Process(target=engine.run, kwargs={"only": "numbers"})
    process.start()
    try:
        with (
            contextlib.closing(open_memory(eventually(engines, "it is registered")[0])) as memory,
            contextlib.closing(Statistics(memory.view)) as words,
        ):
            eventually(lambda: words.stage(0, BACKLOG) - 1 > MOST, "messages are counted")
            counted.open()
            eventually(lambda: words.stage(0, RESTING), "the source rests")
    finally:
        below = [child.pid for child in children(process.pid)]
        process.kill()
        process.join()
        process.close()
    eventually(lambda: not any(alive(pid) for pid in below), "its children are gone, too")
    gate.open()
    drain(engine, "taken")
    assert seen.lines() == list(range(FIRST + 1))


def born(births: Log, stage: str) -> None:
    births.note(stage, os.getpid())


@pytest.mark.parametrize("settle", [0.0, 60.0])
def test_only_what_is_visible_counts_and_each_second_while_the_source_rests(
    db: Path, settle: float, log: Log, counted: Gate
) -> None:
    engine = engine_on(SQLite(db), log, counted, counted)
    plan = make_plan(engine.pipeline, Settings())
    with contextlib.closing(new_board(plan)) as board, contextlib.closing(engine.broker.open()) as connection:
        connection.ensure(engine.pipeline.queues, create=True)
        [queue] = engine.pipeline.stage("held").inputs
        outputs = [Output(queue, "{}", str(number), delay=600.0 if number == 2 else 0.0) for number in range(5)]
        connection.complete([Completion(None, (output,)) for output in outputs])
        connection.receive([queue], 1, 0, 600)
        # As of a broker whose counts are late, and are requests.
        connection.settle = settle
        count = queue_counts.BacklogCount(plan, board, connection, lambda: None)
        often, every = queue_counts._OFTEN, queue_counts.SELDOM if settle else queue_counts._OFTEN
        assert count.look(100.0) == 100.0 + often
        # One is in flight, and one is delayed.
        assert board.stage(0, BACKLOG) - 1 == 3
        connection.complete([Completion(None, (Output(queue, "{}", "another"),))])
        count.look(100.0 + every * 0.99)
        assert board.stage(0, BACKLOG) - 1 == 3
        board.set_stage(0, RESTING, 1)
        count.look(100.0 + often)
        assert board.stage(0, BACKLOG) - 1 == 4


def test_map_ignores_it(db: Path) -> None:
    engine = Engine([Task(abs, name="abs", max_waiting=0)], domain="t", broker=SQLite(db))
    assert sorted(engine.map(range(50))) == list(range(50))
