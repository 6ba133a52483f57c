"""What benchmarks and tests watch an engine with: logs of what ran, its processes, its queues.

All of it works across fork, forkserver, spawn and programs of their own: it is named by paths and pickles.
"""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from sqspipes_mp import Engine
from sqspipes_mp.brokers.base import Completion, Output

T = TypeVar("T")

#: Seconds after which something that should have happened counts as a deadlock; never waited for otherwise.
TIMEOUT = 40.0
#: What programs of their own import these modules from.
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Log:
    """A file to which any process appends one line at a time; the kernel keeps the lines whole and in order."""

    path: str

    def note(self, *fields: object) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(fd, json.dumps(fields).encode() + b"\n")
        finally:
            os.close(fd)

    def lines(self) -> list[Any]:
        try:
            text = Path(self.path).read_text()
        except FileNotFoundError:
            return []
        lines = [json.loads(line) for line in text.splitlines()]
        return [line[0] if len(line) == 1 else tuple(line) for line in lines]

    def wait_for(self, count: int) -> list[Any]:
        """Return the lines once there are so many."""
        eventually(lambda: len(self.lines()) >= count, f"{count} lines in {self.path}, has {self.lines()}")
        return self.lines()


def eventually(condition: Callable[[], T], what: str = "a condition") -> T:
    """Return the condition's result once it is true."""
    clock = threading.Event()
    for _ in range(int(TIMEOUT / 0.01)):
        if result := condition():
            return result
        clock.wait(0.01)
    raise AssertionError(f"never came true: {what}")


def listens(pid: int) -> bool:
    """Tell whether a process has the bell of an SQLite file mapped, by which it hears of commits."""
    with contextlib.suppress(OSError):
        return "-bell\n" in Path(f"/proc/{pid}/maps").read_text()
    return False


def send(engine: Engine, stage: str, *bodies: str, group: str | None = None) -> None:
    """Put bodies into a stage's input queue as they are."""
    queue = engine.pipeline.stage(stage).inputs[-1]
    broker = engine.broker
    broker.check()
    with contextlib.closing(broker.open()) as connection:
        connection.ensure(engine.pipeline.queues, create=True)
        outputs = [Output(queue, body, os.urandom(8).hex(), group=group) for body in bodies]
        for start in range(0, len(outputs), 100):
            connection.complete([Completion(None, (output,)) for output in outputs[start : start + 100]])


def feed(engine: Engine, stage: str, values: Sequence[object], group: str | None = None) -> None:
    """Put values into a stage's input queue, as envelopes without ids."""
    send(engine, stage, *(json.dumps({"meta": {"priority": 0}, "value": value}) for value in values), group=group)


def alive(pid: int) -> bool:
    """Tell whether a process runs (a zombie does not)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def children(pid: int | None = None) -> list[psutil.Process]:
    """Return the engine's processes below ``pid``: not the helpers of multiprocessing, nor moto's server."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in found if not _is_helper(process)]


def _is_helper(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.ZombieProcess:
        # A kind of NoSuchProcess; but nobody has reaped it, which is what a test wants to know.
        return False
    except psutil.NoSuchProcess:
        return True
    helpers = ("moto_server.py", "-m standin", "multiprocessing.resource_tracker", "multiprocessing.forkserver")
    # A child of the forkserver has its command line, but another parent.
    if "multiprocessing.forkserver" in command:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = process.parent()
            return parent is None or "multiprocessing.forkserver" not in " ".join(parent.cmdline())
    return any(helper in command for helper in helpers)


def direct_children(pid: int | None = None) -> list[int]:
    """Return the pids of a process's own children, oldest first (the keeper before the workers)."""
    found = sorted(psutil.Process(pid).children(), key=lambda child: child.create_time())
    return [child.pid for child in found if not _is_helper(child)]
