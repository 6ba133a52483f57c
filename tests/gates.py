"""What tests hold real processes with: gates that block them, logs that tell what ran, looks into queues.

All of it works across fork, forkserver, spawn and programs of their own: it is named by paths and pickles.
"""

import contextlib
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

from benchmarks.watching import ROOT as ROOT
from benchmarks.watching import TIMEOUT as TIMEOUT
from benchmarks.watching import Log as Log
from benchmarks.watching import alive as alive
from benchmarks.watching import children as children
from benchmarks.watching import direct_children as direct_children
from benchmarks.watching import eventually as eventually
from benchmarks.watching import feed as feed
from benchmarks.watching import listens as listens
from benchmarks.watching import send as send
from sqspipes_mp import Engine, SQLite
from sqspipes_mp.messages.failure import Failure, parse_failure

T = TypeVar("T")

_opened: dict[str, int] = {}
_no_forks = threading.Lock()
os.register_at_fork(before=_no_forks.acquire, after_in_parent=_no_forks.release, after_in_child=_no_forks.release)


@dataclass(frozen=True)
class Gate:
    """A named pipe: ``wait`` blocks in any process until the test has called ``open``, and never again after that."""

    path: str

    def wait(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(TIMEOUT * 1000):
                raise TimeoutError(f"gate {self.path} was never opened")
        finally:
            os.close(fd)

    def open(self) -> None:
        """Let everybody through from now on: a byte that nobody reads, kept by a descriptor that stays open."""
        if self.path not in _opened:
            fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            os.write(fd, b"!")
            _opened[self.path] = fd


def close_gates() -> None:
    """Close what ``Gate.open`` holds in this process."""
    while _opened:
        os.close(_opened.popitem()[1])


# --- engines and their queues ---


class Background:
    """``engine.run`` in another thread, so that the test can look and act meanwhile."""

    def __init__(self, engine: Engine, **arguments: Any) -> None:
        self.engine = engine
        self.summary: Any = None
        self.error: BaseException | None = None
        self._arguments = arguments
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.summary = self.engine.run(**self._arguments)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, tb: object) -> None:
        if error is not None:
            self.engine.stop()
        self._thread.join()
        if self.error is not None and error is None:
            raise self.error


def present(value: T | None) -> T:
    """Return a value that must be there."""
    assert value is not None
    return value


def engine_at(path: Path | str, tasks: Sequence[Any], **settings: Any) -> Engine:
    """Return an engine of the domain "t" on the SQLite file ``path``."""
    return Engine(list(tasks), domain="t", broker=SQLite(path), **settings)


def drain(engine: Engine, *only: str, **settings: Any) -> Any:
    """Run some stages (the source being elsewhere) until their queues are empty."""
    return engine.run(only=list(only), until="drained", idle=0.0, **settings)


def query(path: Path | str, text: str, *parameters: object) -> list[Any]:
    """Ask the SQLite file, read-only."""
    # An open handle of SQLite's must not cross a fork: the child would use it without its locks.
    with _no_forks, contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        rows = db.execute(text, parameters).fetchall()
    return [row[0] if len(row) == 1 else row for row in rows]


def file_of(engine: Engine) -> str:
    """Return the path of an engine's SQLite file."""
    assert isinstance(engine.broker, SQLite)
    assert engine.broker.file is not None
    return engine.broker.file


def bodies(engine: Engine, *queues: str) -> list[str]:
    """Return what is in queues, in the order sent, received or not."""
    found = []
    for queue in queues:
        found += query(
            file_of(engine),
            "SELECT body FROM messages JOIN queues ON queues.id = messages.queue WHERE name = ? ORDER BY seq",
            queue,
        )
    return found


def values(engine: Engine, stage: str) -> list[Any]:
    """Return the values waiting for a stage, in the order sent."""
    return [json.loads(body)["value"] for body in bodies(engine, *engine.pipeline.stage(stage).inputs)]


def dead(engine: Engine, stage: str) -> list[tuple[str, Failure]]:
    """Return a stage's dead letters: body and failure."""
    found = query(
        file_of(engine),
        "SELECT body, failure FROM messages JOIN queues ON queues.id = messages.queue WHERE name = ? ORDER BY seq",
        engine.pipeline.stage(stage).dead,
    )
    return [(body, parse_failure(failure)) for body, failure in found]


def waiting(engine: Engine, stage: str) -> tuple[int, int, int]:
    """Return (visible, in flight, delayed) of a stage's input queues."""
    stats = engine.stats()[stage]
    return stats.visible, stats.in_flight, stats.delayed


def charges(engine: Engine) -> list[int]:
    """Return the attempts charged to each message in the file."""
    return query(file_of(engine), "SELECT charges FROM messages ORDER BY seq")


# --- processes ---


@contextlib.contextmanager
def program(tmp_path: Path, text: str, *args: object, python: str = sys.executable) -> Iterator[subprocess.Popen[str]]:
    """Run a Python program of its own that can import the tests' modules; end it with the block."""
    script = tmp_path / "program.py"
    # Not again under a program that was just started and may not have read it.
    if not script.exists() or script.read_text() != text:
        script.write_text(text)
    process = subprocess.Popen(
        [python, str(script), *(str(arg) for arg in args)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    except BaseException as error:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
            error.add_note(f"the program said: {process.communicate(timeout=1)}")
        raise
    finally:
        left = children(process.pid)
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()
        process.wait(TIMEOUT)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Wait for a program; return its exit status, output and errors."""
    output, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, output, errors


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)
