"""Workers killed in the middle of a receive, and of a word to their supervisor: nothing lost, nobody kept waiting."""

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sqspipes_mp import SQS, Engine, SQLite, Task, TaskLike
from sqspipes_mp.brokers.base import Broker
from standin import StandIn, standin
from standin.brokers import sqs_at
from tests.gates import (
    Background,
    Log,
    alive,
    ended,
    engine_at,
    eventually,
    feed,
    kill,
    listens,
    program,
    query,
    values,
    waiting,
)


def source():
    yield from ()


def sink(value):
    return value


def note_birth(log: Log):
    log.note("ready", os.getpid())


def noting(value, log: Log):
    log.note(value, os.getpid())
    return value


@pytest.fixture(scope="module")
def haunted() -> Iterator[StandIn]:
    """The stand-in at its worst: it does not notice that the client of a long poll is gone."""
    with standin(ghost_polls=1) as server:
        yield server


# --- in its receive ---


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_what_was_handed_to_a_dead_workers_poll_is_done_by_the_next_one(haunted: StandIn, log: Log, fifo: bool) -> None:
    haunted.reset()
    work = Task(noting, name="work", args=(log,), init=partial(note_birth, log))
    engine = Engine([source, work, sink], domain="t", broker=sqs_at(haunted.url), fifo=fifo, start_method="fork")
    [queue] = engine.pipeline.stage("work").inputs
    group = "g" if fifo else None
    with Background(engine, only="work") as run:
        eventually(lambda: haunted.ledger(messages=False)["waiting"] == 1, "it waits in its long poll")
        [(_, worker)] = log.wait_for(1)
        kill(worker)
        eventually(lambda: not alive(worker))
        feed(engine, "work", [1], group=group)
        feed(engine, "work", [2], group=group)
        assert deliveries(haunted, queue)[0] == 1
        eventually(lambda: births(log) == 2, "there is another worker")
        if not fifo:
            eventually(lambda: haunted.ledger(queue, messages=False)["queues"][queue]["deleted"] == 1, "2 is done")
        # The dead one's lease is the short one that every receive asks for.
        haunted.advance(16)
        eventually(lambda: haunted.ledger(queue, messages=False)["queues"][queue]["deleted"] == 2, "both are done")
        assert deliveries(haunted, queue) == [2, 1]
        engine.stop()
        # The poll in flight, which is waited for, returns with it.
        feed(engine, "work", [3], group=group)
    begun = [line for line in log.lines() if line[0] in (1, 2)]
    assert [value for value, _ in begun] == ([1, 2] if fifo else [2, 1])
    assert worker not in {pid for _, pid in begun}
    assert (run.summary["work"].failed, run.summary["work"].dead) == (0, 0)


def births(log: Log) -> int:
    return len([line for line in log.lines() if line[0] == "ready"])


def deliveries(server: StandIn, queue: str) -> list[int]:
    """Return how often each message was handed out, in the order sent."""
    return [message["received"] for message in sorted(server.messages(queue), key=lambda message: message["sent_ms"])]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_a_worker_killed_while_it_waits_for_a_message_takes_none_with_it(db: Path, log: Log) -> None:
    work = Task(noting, name="work", args=(log,), init=partial(note_birth, log))
    engine = engine_at(db, [source, work, sink], start_method="fork", visibility_timeout=60)
    with Background(engine, only="work"):
        [(_, worker)] = log.wait_for(1)
        eventually(lambda: listens(worker), "it waits for its file to change")
        kill(worker)
        eventually(lambda: not alive(worker))
        feed(engine, "work", [1])
        eventually(lambda: values(engine, "sink") == [1])
        engine.stop()
    assert [value for value, _ in log.lines()] == ["ready", "ready", 1]
    assert query(db, "SELECT receives, charges FROM messages") == [(0, 0)]
    assert waiting(engine, "work") == (0, 0, 0)


# --- in the middle of its report ---


def half_told_at_first(value, log: Log):
    """Fail with more to tell than the pipe takes while the supervisor is stopped; note when it takes no more."""
    log.note(value, os.getpid())
    if len(log.lines()) > 1:
        return value
    lines = [fd for fd in (int(path.name) for path in Path("/proc/self/fd").iterdir()) if is_line(fd)]
    for fd in lines:
        with socket.socket(fileno=os.dup(fd)) as copy:
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def watch():
        poll = select.poll()
        for fd in lines:
            poll.register(fd, select.POLLOUT)
        eventually(lambda: len(poll.poll(0)) < len(lines))
        log.note("told in part", os.getpid())

    os.kill(os.getppid(), signal.SIGSTOP)
    threading.Thread(target=watch, daemon=True).start()
    raise ValueError("x" * 100_000)


def is_line(fd: int) -> bool:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as copy:
        return copy.family == socket.AF_UNIX
    return False


HALF_TOLD = """
import sys
from sqspipes_mp.brokers.url import parse
from tests.process.test_deaths_midway import *
broker, log = sys.argv[1:]
engine_for(parse(broker), Log(log)).run(only="work")
"""


def engine_for(broker: Broker, log: Log) -> Engine:
    tasks: list[TaskLike] = [source, Task(half_told_at_first, name="work", args=(log,)), sink]
    return Engine(tasks, domain="t", broker=broker, start_method="fork")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("sqs", marks=pytest.mark.slow)])
def test_half_a_report_is_no_report(
    request: pytest.FixtureRequest, tmp_path: Path, db: Path, log: Log, kind: str
) -> None:
    broker: SQS | SQLite = request.getfixturevalue("sqs") if kind == "sqs" else SQLite(db)
    url = f"sqs://us-east-1?endpoint_url={broker.endpoint_url}" if isinstance(broker, SQS) else f"sqlite:///{db}"
    engine = engine_for(broker, log)
    feed(engine, "work", [1])
    with program(tmp_path, HALF_TOLD, url, log.path) as process:
        try:
            _, (_, worker) = log.wait_for(2)
            kill(worker)
            eventually(lambda: not alive(worker))
        finally:
            process.send_signal(signal.SIGCONT)
        # The supervisor never heard of the exception, which would have ended the run; the message comes again.
        log.wait_for(3)
        eventually(lambda: waiting(engine, "work") == (0, 0, 0), "it is done")
        process.terminate()
        if kind == "sqs":
            # The poll in flight, which is waited for, returns with it.
            feed(engine, "work", [2])
        status, _, errors = ended(process)
    assert status == 0, errors
    (first, one), _, (second, other), *_ = log.lines()
    assert (first, second) == (1, 1)
    assert one == worker != other
    assert [value for value, _ in log.lines()].count(1) == 2
    assert engine.stats()["sink"].visible >= 1 if kind == "sqs" else values(engine, "sink") == [1]
    letters = engine.stats()["work"].dead_letters
    assert letters is not None
    assert letters.depth is not None
    assert letters.depth.visible + letters.depth.in_flight == 0
