"""The kill matrix: every process, killed at every point of a message's life, on FIFO queues and on SQLite.

Nothing in the package knows of these points. A message is held at them by its function (a gate), by a service that does
not answer, or by a file that somebody else has locked.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, Engine, SQLite, Task
from sqspipes_mp.brokers.base import Completion
from standin import StandIn, standin
from standin.brokers import sqs_at
from tests.gates import Gate, Log, alive, children, ended, eventually, feed, kill, present, program, waiting

pytestmark = pytest.mark.slow

DELETES = ("DeleteMessage", "DeleteMessageBatch")


def source():
    yield from ()


def sink(value):
    return value


def work(value, log: Log, gate: Gate):
    log.note("begin", value)
    if value == 0:
        gate.wait()
    log.note("end", value)
    return value


def ready(log: Log):
    log.note(os.getpid())


def engine(broker, fifo: bool, log: Log, gate: Gate, attempts: int = 5) -> Engine:
    task = Task(
        work, args=(log, gate), prefetch=5, max_attempts=attempts, init=partial(ready, Log(f"{log.path}-workers"))
    )
    return Engine(
        [source, task, sink], domain="matrix", broker=broker, fifo=fifo, on_error="retry", visibility_timeout=6
    )


PROGRAM = """
import sys
from sqspipes_mp.brokers.url import parse
from tests.process.test_kill_matrix import *
broker, fifo, attempts, log, gate = sys.argv[1:]
engine(parse(broker), fifo == "1", Log(log), Gate(gate), int(attempts)).run(only="work")
"""


class Place:
    """A broker that can be made to stand still at each point, and to go on."""

    def __init__(self, broker: SQS | SQLite, url: str, fifo: bool) -> None:
        self.broker = broker
        self.url = url
        self.fifo = fifo

    def hold_at(self, point: str) -> None:
        raise NotImplementedError

    def reached(self, point: str) -> bool:
        raise NotImplementedError

    def waiting(self, made: Engine) -> tuple[int, int, int]:
        """Return (visible, in flight, delayed) of the input queue."""
        return waiting(made, "work")

    def go_on(self) -> None:
        raise NotImplementedError


class OnFifo(Place):
    def __init__(self, server: StandIn) -> None:
        url = f"sqs://us-east-1?endpoint_url={server.url}"
        super().__init__(sqs_at(server.url), url, fifo=True)
        self.server = server

    def hold_at(self, point: str) -> None:
        match point:
            case "finished":
                self.server.pause()
            case "sent":
                self.server.faults(error=1, only=DELETES)
            case "deleted":
                self.server.faults(lost_reply=1, only=DELETES)

    def reached(self, point: str) -> bool:
        ledger = self.server.ledger(messages=False)
        match point:
            case "finished":
                return ledger["held"] > 0
            case "sent":
                return ledger["queues"]["matrix-work.fifo"]["sent"] > 0
            case "deleted":
                return ledger["queues"]["matrix-source.fifo"]["deleted"] > 0
        return True

    def waiting(self, made: Engine) -> tuple[int, int, int]:
        # A client for each look would take longer than what is looked at.
        queue = self.server.ledger(messages=False)["queues"]["matrix-source.fifo"]
        return queue["visible"], queue["in_flight"], queue["delayed"]

    def go_on(self) -> None:
        self.server.faults(error=0, lost_reply=0, only=())
        self.server.resume()


class OnSQLite(Place):
    def __init__(self, path: Path) -> None:
        super().__init__(SQLite(path), f"sqlite:///{path}", fifo=False)
        self._path = path
        self._lock: sqlite3.Connection | None = None

    def hold_at(self, point: str) -> None:
        if point == "finished":
            self._lock = sqlite3.connect(self._path, isolation_level=None)
            self._lock.execute("PRAGMA busy_timeout = 20000")
            self._lock.execute("BEGIN IMMEDIATE")

    def reached(self, point: str) -> bool:
        if point != "deleted":
            return True
        # Sending and deleting are one: once the one is seen the other is done.
        with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as db:
            text = "SELECT count(*) FROM messages JOIN queues ON queues.id = messages.queue WHERE name = 'matrix-work'"
            return db.execute(text).fetchone()[0] > 0

    def go_on(self) -> None:
        if self._lock is not None:
            self._lock.rollback()
            self._lock.close()
            self._lock = None


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with standin() as server:
        yield server


@pytest.fixture
def place(request: pytest.FixtureRequest, db: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        made: Place = OnSQLite(db)
    else:
        server = request.getfixturevalue("server")
        made = OnFifo(server)
        server.reset()
    yield made
    made.go_on()


def results(made: Engine) -> list[object]:
    """Take what came out."""
    found: list[Any] = []
    [queue] = made.pipeline.stage("sink").inputs
    with contextlib.closing(made.broker.open()) as connection:
        while received := connection.receive([queue], connection.batch, 0, 30):
            found += [json.loads(each.body)["value"] for each in received]
            connection.complete([Completion(each.handle) for each in received])
    return sorted(found)


def kill_one(victim: str, process, workers: Log) -> None:
    """Kill it for certain: whoever waits for something after this waits for what comes next."""
    if victim == "supervisor":
        below = [child.pid for child in children(process.pid)]
        process.kill()
        ended(process)
        eventually(lambda: not any(alive(pid) for pid in below), "its children are gone, too")
        return
    pid = workers.lines()[-1] if victim == "worker" else the_keeper(process, workers)
    # The watchdog may have been quicker with a keeper that is late.
    with contextlib.suppress(ProcessLookupError):
        kill(pid)
    eventually(lambda: not alive(pid))


def the_keeper(process, workers: Log) -> int:
    """Return the pid of the keeper, also where it is just being replaced."""

    def found() -> int | None:
        pids = [child.pid for child in children(process.pid) if child.pid not in workers.lines()]
        return pids[0] if len(pids) == 1 else None

    return present(eventually(found, "there is a keeper"))


CASES = [
    pytest.param(broker, point, victim, id=f"{broker}-{point}-{victim}")
    for broker, points in (
        ("fifo", ("running", "finished", "sent", "deleted")),
        ("sqlite", ("running", "finished", "deleted")),
    )
    for point in points
    for victim in ("worker", "keeper", "supervisor")
]


@pytest.mark.parametrize(("place", "point", "victim"), CASES, indirect=["place"])
def test_killed_at_any_point_each_message_is_done_once(
    tmp_path: Path, place: Place, point: str, victim: str, log: Log, gate: Gate
) -> None:
    made = engine(place.broker, place.fifo, log, gate)
    # The first one runs; the others are received, but have not begun.
    feed_all(made, place)
    workers = Log(f"{log.path}-workers")
    arguments = (PROGRAM, place.url, int(place.fifo), 5, log.path, gate.path)
    with contextlib.ExitStack() as programs:
        process = programs.enter_context(program(tmp_path, *arguments))
        log.wait_for(1)
        eventually(lambda: place.waiting(made)[1] == 3, "all three are held")
        place.hold_at(point)
        if point != "running":
            gate.open()
            eventually(lambda: ("end", 0) in log.lines())
        eventually(lambda: place.reached(point), point)
        kill_one(victim, process, workers)
        place.go_on()
        gate.open()
        if victim == "supervisor":
            process = programs.enter_context(program(tmp_path, *arguments))
        eventually(lambda: place.waiting(made) == (0, 0, 0), "the input queue is empty")
        eventually(lambda: children(process.pid), "the program runs")
        process.terminate()
        status, _, errors = ended(process)
    assert status == 0, errors
    assert results(made) == [0, 1, 2]
    assert made.dead_letters() == []
    if point == "running" and victim == "keeper":
        assert log.lines().count(("begin", 0)) == 1


def feed_all(made: Engine, place: Place) -> None:
    """Put three messages in, each in a group of its own."""
    for number in range(3):
        feed(made, "work", [number], group=f"group-{number}" if place.fifo else None)


@pytest.mark.parametrize("place", ["fifo", "sqlite"], indirect=True)
def test_the_last_attempt_is_dead_lettered_once_though_the_keeper_is_killed_while_it_judges(
    tmp_path: Path, place: Place, log: Log, gate: Gate
) -> None:
    made = engine(place.broker, place.fifo, log, gate, attempts=1)
    feed_all(made, place)
    workers = Log(f"{log.path}-workers")
    with program(tmp_path, PROGRAM, place.url, int(place.fifo), 1, log.path, gate.path) as process:
        log.wait_for(1)
        eventually(lambda: place.waiting(made)[1] == 3, "all three are held")
        # The service stands still: what the keeper does for the dead worker reaches nobody yet.
        place.hold_at("finished")
        kill_one("worker", process, workers)
        eventually(lambda: place.reached("finished"))
        workers.wait_for(2)
        kill_one("keeper", process, workers)
        place.go_on()
        gate.open()
        eventually(lambda: place.waiting(made) == (0, 0, 0), "the input queue is empty")
        process.terminate()
        status, _, errors = ended(process)
    assert status == 0, errors
    assert results(made) == [1, 2]
    [letter] = made.dead_letters()
    assert json.loads(letter.body)["value"] == 0
    assert log.lines().count(("begin", 0)) == 1
