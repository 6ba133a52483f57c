"""What the tests of the SQLite broker share."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from sqspipes_mp.brokers.base import Completion, Output, QueueSpec, Received
from sqspipes_mp.brokers.sqlite import SQLite
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection

#: Seconds that pass only in a deadlock.
DEADLOCK = 60

SPECS = (
    QueueSpec(name="dead", fifo=False, visibility=60),
    QueueSpec(name="in", fifo=False, visibility=60, dead="dead"),
    QueueSpec(name="out", fifo=False, visibility=60),
    QueueSpec(name="dead.fifo", fifo=True, visibility=60),
    QueueSpec(name="in.fifo", fifo=True, visibility=60, dead="dead.fifo"),
    QueueSpec(name="out.fifo", fifo=True, visibility=60),
)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[SQLiteConnection]:
    """Open a connection with all of SPECS."""
    connection = SQLite(path).open()
    try:
        connection.ensure(SPECS, create=True)
        yield connection
    finally:
        connection.close()


def send(
    connection: SQLiteConnection,
    queue: str,
    *hops: str,
    group: str | None = None,
    delay: float = 0.0,
    again: bool = False,
) -> None:
    """Send bodies equal to their hops, without an input."""
    connection.complete([Completion(None, tuple(Output(queue, hop, hop, group, delay) for hop in hops), again=again)])


def take(connection: SQLiteConnection, queue: str, count: int = 10, visibility: float = 60.0) -> list[Received]:
    """Receive what is there."""
    return connection.receive([queue], count, 0, visibility)


def bodies(connection: SQLiteConnection, queue: str, count: int = 10) -> list[str]:
    """Receive what is there; return the bodies."""
    return [message.body for message in take(connection, queue, count)]


def later(path: Path, seconds: float) -> None:
    """Let time pass for all who open the file after this."""
    look(path, f"UPDATE clocks SET shift = shift + {int(seconds * 1000)}")  # noqa: S608  (a number)


def look(path: Path, query: str) -> list[tuple[object, ...]]:
    """Run one statement beside the broker."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(query).fetchall()
