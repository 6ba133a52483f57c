"""A thread that keeps the GIL keeps nobody else from the SQLite file."""

import ctypes
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import pytest

from sqspipes_mp.brokers.base import Completion, DeadLetter, Output, QueueSpec
from sqspipes_mp.brokers.sqlite import SQLite
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from tests.unit.sqlite_bench import DEADLOCK

SPAWN = multiprocessing.get_context("spawn")
#: Seconds for which the GIL is kept; whoever waits for it is far beyond what a busy machine takes.
KEPT = 3.0
#: Times that the GIL is kept, each at another instant of the calls.
ROUNDS = 4
QUEUES = ("in", "in.fifo", "out", "out.fifo")
SPECS = [QueueSpec(name=name, fifo=name.endswith("fifo"), visibility=600, dead="dead") for name in QUEUES]
SPECS.append(QueueSpec(name="dead", fifo=False, visibility=600))

Step = Callable[[SQLiteConnection, int], object]


def fill(connection: SQLiteConnection, n: int) -> None:
    for queue in ("in", "in.fifo"):
        connection.complete([Completion(None, tuple(Output(queue, "{}", f"{queue}-{n}-{m}", "g") for m in range(5)))])


def send(connection: SQLiteConnection, n: int) -> None:
    fill(connection, n)
    connection.feed([Output("in", "{}", f"fed-{n}")], keyed=True)


def take(connection: SQLiteConnection, n: int) -> None:
    connection.receive(["in.fifo", "in"], 2, 0.0, 0.0)


def complete(connection: SQLiteConnection, n: int) -> None:
    found = connection.receive(["in.fifo", "in"], 4, 0.0, 600.0)
    connection.complete(
        [Completion(each.handle, (Output("out.fifo", "{}", f"{n}-{m}"),)) for m, each in enumerate(found)]
    )
    if not found:
        fill(connection, n)


def extend(connection: SQLiteConnection, n: int) -> None:
    connection.extend([each.handle for each in connection.receive(["in.fifo", "in"], 4, 0.0, 600.0)], 0.0)


def bury(connection: SQLiteConnection, n: int) -> None:
    found = connection.receive(["in.fifo", "in"], 2, 0.0, 600.0)
    connection.dead_letter([DeadLetter(each.handle, "dead", each.body, f"{n}", None, "{}") for each in found])
    fill(connection, n)


def tidy(connection: SQLiteConnection, n: int) -> None:
    connection._tidy_at = 0.0
    fill(connection, n)
    connection.purge(["out"])


STEPS: dict[str, Step] = {step.__name__: step for step in (send, take, complete, extend, bury, tidy)}


def keep_the_gil(file: str, name: str, pipe: Pipe) -> None:
    """Go on with one kind of call in some threads; when told to, keep the GIL for a while."""
    connection = SQLite(file).open()
    step = STEPS[name]

    def work(number: int) -> None:
        n = 0
        while True:
            n += 1
            step(connection, number * 1_000_000 + n)

    for number in range(3):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    usleep = ctypes.PyDLL(None).usleep
    pipe.send("going")
    pipe.recv()
    for _ in range(ROUNDS):
        pipe.send("keeps it")
        usleep(int(KEPT * 1_000_000))
        pipe.recv()
    os._exit(0)


@pytest.mark.parametrize("name", STEPS)
def test_who_keeps_the_gil_keeps_nobody_from_the_file(tmp_path: Path, name: str) -> None:
    file = str(tmp_path / "queues.db")
    with closing(SQLite(file).open()) as connection:
        connection.ensure(SPECS, create=True)
        fill(connection, -1)
        here, there = SPAWN.Pipe()
        process = SPAWN.Process(target=keep_the_gil, args=(file, name, there))
        process.start()
        assert here.poll(DEADLOCK)
        here.recv()
        longest = 0.0
        for n in range(ROUNDS):
            here.send("go on")
            assert here.poll(DEADLOCK)
            here.recv()
            until = time.monotonic() + KEPT / 3
            while (begun := time.monotonic()) < until:
                send(connection, -2 - n)
                longest = max(longest, time.monotonic() - begun)
        here.send("end")
        process.kill()
        process.join()
    assert longest < KEPT / 2
