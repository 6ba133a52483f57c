"""The kill matrix of the messages that go on, come again uncharged, or come too early, and of a tenant's message.

They are at their steps at once, in one worker: the continuation is accepted and its predecessor not deleted, the
uncharged retry is not visible yet, the early message is not hidden (or sent anew, and not deleted), and a call runs.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from sqspipes_mp import SQS, Continue, Engine, Retry, SQLite, Task, current_message
from sqspipes_mp.brokers.base import Completion, Handle
from sqspipes_mp.messages.ids import token
from sqspipes_mp.worker.receive import intake
from sqspipes_mp.worker.send import continuing
from standin import StandIn
from tests.gates import Gate, Log, alive, children, eventually, file_of, kill, present, query, send, values

pytestmark = pytest.mark.slow

#: Deletes, releases and extensions.
AFTER_SENDS = ("DeleteMessage", "DeleteMessageBatch", "ChangeMessageVisibility", "ChangeMessageVisibilityBatch")
#: Seconds before its due time at which the early message comes.
EARLY = 600.0
#: The values on each broker. Over a network two carriers at most stand still.
VALUES = {
    "sqlite": ("goes on", "free", "early", "runs"),
    "fifo": ("goes on", "free", "runs"),
    "sqs": ("goes on", "early", "runs"),
}


def step(value: str, log: Log, gate: Gate, last: Gate) -> Any:
    message = current_message()
    again = any(line[:2] == ("begin", value) for line in log.lines())
    log.note("begin", value, message.attempt, message.continuation, message.group)
    if value == "runs":
        last.wait()
    elif value in ("goes on", "free"):
        gate.wait()
        log.note("end", value)
    if value == "free" and not again:
        raise Retry(0, charge=False)
    return Continue("went on") if value == "goes on" else value


def sink(value: str) -> None:
    raise AssertionError(value)


def ready(log: Log) -> None:
    log.note(os.getpid())


class Place:
    """A broker that can be made to stand still behind the sends, and to go on."""

    def __init__(self, broker: SQS | SQLite, kind: str, log: Log, gates: tuple[Gate, Gate, Gate]) -> None:
        self.broker, self.log, self.values = broker, log, VALUES[kind]
        self.fifo, self.doubles = kind == "fifo", kind == "sqs"
        self.workers, self.due = Log(f"{log.path}-workers"), Path(f"{log.path}-due")
        self.gate, self.last, self.early = gates
        # One thread more than calls that wait: it has the intake ask for the early message.
        task = Task(
            step,
            name="work",
            input=True,
            args=(log, self.gate, self.last),
            threads=4,
            init=partial(ready, self.workers),
        )
        self.engine = Engine(
            [task, sink], domain="steps", broker=broker, fifo=self.fifo, on_error="retry", visibility_timeout=60
        )

    def run(self) -> None:
        """Run the stage in this process, which is a fork; it says that the early message came, and waits."""

        def early(*arguments: Any) -> float:
            if self.due.exists():
                return 0.0
            rest = continuing.early(*arguments)
            if rest:
                self.log.note("early")
                self.early.wait()
            return rest

        with patch.object(intake, "early", early):
            self.engine.run(only="work")

    def stand_still(self) -> None:
        raise NotImplementedError

    def reached(self) -> bool:
        raise NotImplementedError

    def early_goes(self) -> None:
        """Let the early message be put off. Where it is sent anew, wait until its carrier stands still."""
        self.early.open()

    def go_on(self) -> None:
        raise NotImplementedError

    def left(self) -> list[str]:
        """Return the values in the stage's input queue, received or not."""
        raise NotImplementedError

    def is_put_off(self) -> bool:
        """Tell whether all but the early message are done, and that one is hidden or delayed."""
        return set(self.left()) == {"early"} & set(self.values)

    def leases_end(self) -> None:
        """Let what dead processes have received be visible again."""
        raise NotImplementedError

    def time_comes(self) -> None:
        """Let the early message be due, and visible."""
        self.due.touch()


class OnSqs(Place):
    def __init__(self, server: StandIn, broker: SQS, *rest: Any) -> None:
        super().__init__(broker, *rest)
        self._server, suffix = server, ".fifo" if self.fifo else ""
        self._queue = f"steps--input{suffix}"

    def _counts(self) -> dict[str, int]:
        found: dict[str, int] = self._server.ledger(messages=False)["queues"][self._queue]
        return found

    def stand_still(self) -> None:
        self._sent = self._counts()["sent"]
        self._server.faults(error=1, only=AFTER_SENDS)

    def reached(self) -> bool:
        sent = len({"goes on", "early"}.intersection(self.values))
        if self._counts()["sent"] != self._sent + sent:
            return False
        changes = self._server.ledger(messages=False)["requests"].get("ChangeMessageVisibilityBatch", {})
        return "free" not in self.values or bool(changes.get("errors"))

    def early_goes(self) -> None:
        super().early_goes()
        if "early" in self.values:
            # Behind another carrier that stands still it would wait for company.
            eventually(lambda: self._counts()["sent"] > self._sent, "it is sent anew")

    def go_on(self) -> None:
        self._server.faults(error=0, only=())

    def left(self) -> list[str]:
        # A deleted message has no body any more.
        return [
            json.loads(body)["value"] for message in self._server.messages(self._queue) if (body := message["body"])
        ]

    def is_put_off(self) -> bool:
        return super().is_put_off() and not self._counts()["visible"]

    def leases_end(self) -> None:
        self._server.advance(61)

    def time_comes(self) -> None:
        super().time_comes()
        self._server.advance(EARLY + 1)


class OnSQLite(Place):
    _queue = "steps--input"
    _lock: sqlite3.Connection | None = None

    @property
    def _file(self) -> str:
        return file_of(self.engine)

    def stand_still(self) -> None:
        self._lock = sqlite3.connect(self._file, isolation_level=None, timeout=30)
        self._lock.execute("BEGIN IMMEDIATE")

    def reached(self) -> bool:
        # Sends, deletes and releases wait for the lock alike.
        return {("end", "goes on"), ("end", "free")} <= set(self.log.lines())

    def go_on(self) -> None:
        if self._lock is not None:
            self._lock.rollback()
            self._lock.close()
            self._lock = None

    def left(self) -> list[str]:
        return values(self.engine, "work")

    def is_put_off(self) -> bool:
        later = "SELECT visible_at - sent_at > ? FROM messages JOIN queues ON queues.id = queue WHERE name = ?"
        return super().is_put_off() and query(self._file, later, 500 * EARLY, self._queue) == [1]

    def leases_end(self) -> None:
        text = "SELECT seq, receives FROM messages JOIN queues ON queues.id = queue WHERE name = ? AND receives > 0"
        [name] = query(self._file, "SELECT token FROM meta")
        found = query(self._file, text, self._queue)
        with contextlib.closing(self.broker.open()) as connection:
            connection.extend([Handle(self._queue, f"{seq}-{count}", f"{name}-{seq}") for seq, count in found], 0)

    def time_comes(self) -> None:
        super().time_comes()
        self.leases_end()


@pytest.fixture
def place(
    request: pytest.FixtureRequest, db: Path, log: Log, new_gate: Callable[[], Gate], server: StandIn
) -> Iterator[Place]:
    rest = (request.param, log, (new_gate(), new_gate(), new_gate()))
    made: Place = (
        OnSQLite(SQLite(db), *rest)
        if request.param == "sqlite"
        else OnSqs(server, request.getfixturevalue("sqs"), *rest)
    )
    yield made
    made.go_on()


@contextlib.contextmanager
def running(place: Place) -> Iterator[BaseProcess]:
    process = multiprocessing.get_context("fork").Process(target=place.run)
    process.start()
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: BaseProcess) -> None:
    below = [child.pid for child in children(process.pid)]
    process.kill()
    process.join()
    process.close()
    eventually(lambda: not any(alive(pid) for pid in below), "its children are gone, too")


def kill_one(victim: str, process: BaseProcess, place: Place) -> None:
    workers = place.workers.lines()
    keepers = [child.pid for child in children(process.pid) if child.pid not in workers]
    pid = workers[-1] if victim == "worker" else keepers[0]
    kill(pid)
    eventually(lambda: not alive(pid))


def put_early(place: Place) -> None:
    """Put a message that is visible before its due time, as if the clock were set back after ``put(delay=)``."""
    meta = {"id": "early", "hop": token("early"), "priority": 0, "not_before": time.time() + EARLY}
    send(place.engine, "work", json.dumps({"meta": meta, "value": "early"}))


def results(place: Place) -> list[str]:
    """Take what came out."""
    found: list[str] = []
    [queue] = place.engine.pipeline.stage("sink").inputs
    with contextlib.closing(place.broker.open()) as connection:
        while received := connection.receive([queue], connection.batch, 0, 30):
            found += [json.loads(each.body)["value"] for each in received]
            connection.complete([Completion(each.handle) for each in received])
    return sorted(found)


@pytest.mark.parametrize("victim", ["worker", "keeper", "supervisor"])
@pytest.mark.parametrize("place", ["sqlite", "fifo", "sqs"], indirect=True)
def test_killed_behind_the_sends_nothing_is_lost_or_doubled_and_nobody_else_charged(place: Place, victim: str) -> None:
    log, tenant = place.log, None if place.fifo else "owner"
    fed = [value for value in place.values if value != "early"]
    for value in fed:
        place.engine.put(value, tenant=tenant)
    place.engine.close()
    with contextlib.ExitStack() as programs:
        process = programs.enter_context(running(place))
        log.wait_for(len(fed))
        if "early" in place.values:
            put_early(place)
            eventually(lambda: "early" in log.lines(), "the early one is about to be put off")
        place.stand_still()
        place.early_goes()
        place.gate.open()
        eventually(place.reached, "the rest stands still")
        if victim == "supervisor":
            programs.close()
            place.go_on()
            place.leases_end()
            process = programs.enter_context(running(place))
        else:
            kill_one(victim, process, place)
            place.go_on()
        place.last.open()
        eventually(place.is_put_off, "all but the early one are done, and that is put off")
        place.time_comes()
        eventually(lambda: not place.left(), "the input queue is empty")
        os.kill(present(process.pid), signal.SIGTERM)
        process.join()
        assert process.exitcode == 0
    found = results(place)
    # A standard queue takes a second copy of what comes again after its send.
    once = sorted(set(found)) if place.doubles else found
    assert once == sorted("went on" if value == "goes on" else value for value in place.values)
    assert place.engine.dead_letters() == []
    calls = [line[1:] for line in log.lines() if line[0] == "begin"]
    # The killed worker's running call alone has a second attempt.
    assert {value for value, attempt, _, _ in calls if attempt != 1} == ({"runs"} if victim == "worker" else set())
    assert all(count == (value == "went on") for value, _, count, _ in calls)
    if tenant is not None:
        assert {group for value, _, _, group in calls if value != "early"} == {tenant}
