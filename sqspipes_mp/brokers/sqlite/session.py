"""One open handle of the SQLite file: its tables, its clock, its queues (any process, one thread at a time).

The clock is the one that leases are judged by (``clock``), shifted to epoch time by a number the file keeps per boot.
All processes of a boot therefore read the same clock, setting the wall clock neither ends nor prolongs a lease, and a
new boot goes on where the last one stopped.
"""

import ctypes
import math
import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from sqspipes_mp.brokers.sqlite import program as sqlite_program
from sqspipes_mp.brokers.sqlite import schema as sql
from sqspipes_mp.brokers.sqlite.program import Program, Row, Step, row
from sqspipes_mp.errors import BrokerError, QueueMissing
from sqspipes_mp.host.clock import lease_now, lease_now_ns

#: Milliseconds SQLite itself waits for a lock: no longer, since a transaction is as of the moment before.
_BUSY_TIMEOUT = 100
_BOOTS_KEPT = 8


class QueuesChanged(Exception):
    """The list of queues is another one than this process knows; nothing was done."""


@dataclass(frozen=True, slots=True)
class Queue:
    """A row of ``queues``. ``retention`` in milliseconds."""

    name: str
    id: int
    fifo: bool
    visibility: float
    dead: str | None
    retention: int


class Session:
    """A connection of ``sqlite3`` with what this process knows of the file."""

    def __init__(self, file: str, *, synchronous: str, patience: float | None = None) -> None:
        timeout = _BUSY_TIMEOUT / 1000 if patience is None else min(_BUSY_TIMEOUT / 1000, patience / 2)
        self.db = sqlite3.connect(file, timeout=timeout, isolation_level=None, check_same_thread=False)
        # Strict decoding would raise for one foreign row, out of every receive that comes across it.
        self.db.text_factory = readable
        try:
            prepare(self.db, file)
            self.db.execute(f"PRAGMA synchronous = {synchronous}")
            # Zeroing what is deleted would double the writing; a queue's file is as private as its folder.
            self.db.execute("PRAGMA secure_delete = OFF")
            self.db.execute("PRAGMA temp_store = MEMORY")
            self.db.execute("PRAGMA wal_autocheckpoint = 2000")
            self.db.execute("PRAGMA journal_size_limit = 67108864")
            self.token: str = self.db.execute("SELECT token FROM meta").fetchone()[0]
            self.boot = _boot_id()
            self._shift = _read_shift(self.db, self.boot)
            sqlite_program.install(self.db)
        except BaseException:
            self.db.close()
            raise
        #: Which list of queues is known here; -1: none.
        self.generation = -1
        self.queues: dict[str, Queue] = {}
        self.by_id: dict[int, Queue] = {}
        self._looks: dict[tuple[str, ...], tuple[str, list[int]]] = {}

    def now(self) -> int:
        """Return the file's time in milliseconds."""
        return _ticks(self.boot) + self._shift

    def leased(self, now: int) -> float:
        """Return the file's time ``now`` on the clock that leases are judged by."""
        return lease_now() - (self.now() - now) / 1000

    def run(self, program: Program, rows: Sequence[Row]) -> int:
        """Run steps in one transaction; returns the time it is of. Raises ``QueuesChanged``."""
        try:
            return sqlite_program.run(self.db, program, [row(Step.OPEN, seq=self.generation), *rows], self.now)
        except sqlite3.IntegrityError as error:
            if str(error) == sqlite_program.CHANGED:
                raise QueuesChanged from None
            raise

    def pass_on(self, rows: Sequence[Row]) -> bool:
        """Send and delete what needs no more than that; False: it does, and nothing was done."""
        try:
            sqlite_program.pass_on(self.db, rows, self.generation, self.now)
        except sqlite3.IntegrityError as error:
            if str(error) == sqlite_program.CHANGED:
                raise QueuesChanged from None
            if str(error) == sqlite_program.STREAMED:
                return False
            raise
        return True

    def queue(self, name: str) -> Queue:
        """Return a queue of the file as of the last transaction or look."""
        try:
            return self.queues[name]
        except KeyError:
            cure = "It was deleted, or never created: run with create_queues=True, or see that the name is right"
            raise QueueMissing(name, cure) from None

    def refresh(self) -> None:
        """Read the list of queues anew if it changed."""
        generation = self.db.execute(sql.GENERATION).fetchone()[0]
        if generation != self.generation:
            self._reload(generation)

    def look(self, names: Sequence[str]) -> float:
        """Return in how many seconds one of the queues has something to receive: 0 = now, infinity = unknown."""
        wanted = tuple(names)
        while True:
            text, ids = self._looks.get(wanted) or self._compose_look(wanted)
            generation, *earliest = self.db.execute(text, ids).fetchone()
            if generation == self.generation:
                due = min((at for at in earliest if at is not None), default=None)
                return math.inf if due is None else max(0.0, (due - self.now()) / 1000)
            self._reload(generation)

    def _compose_look(self, names: tuple[str, ...]) -> tuple[str, list[int]]:
        self.refresh()
        queues = [self.queue(name) for name in names]
        parts = ["(SELECT generation FROM meta)"]
        parts += [f"({sql.LOOK_FIFO if queue.fifo else sql.LOOK_STANDARD})" for queue in queues]
        self._looks[names] = "SELECT " + ", ".join(parts), [queue.id for queue in queues]
        return self._looks[names]

    def _reload(self, generation: int) -> None:
        # The generation was read before the rows: if they are newer, it is found outdated at the next look.
        rows = self.db.execute(sql.QUEUES).fetchall()
        found = [Queue(name, id_, bool(fifo), vis, dead, keep) for name, id_, fifo, vis, dead, keep in rows]
        self.queues = {queue.name: queue for queue in found}
        self.by_id = {queue.id: queue for queue in found}
        self._looks = {}
        self.generation = generation

    def close(self) -> None:
        """Close the handle."""
        self.db.close()

    def leak(self) -> None:
        """Keep the handle from ever being closed, not even at the interpreter's exit."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.db))


def readable(stored: bytes) -> str:
    r"""Return stored text; bytes that are no UTF-8 become ``\xff`` and the like, with which no body is JSON."""
    return stored.decode("utf-8", "backslashreplace")


@overload
def as_text(value: str | bytes) -> str: ...
@overload
def as_text(value: str | bytes | None) -> str | None: ...
def as_text(value: str | bytes | None) -> str | None:
    """Return a column of text, also where another program has put a BLOB into it; None is none."""
    return readable(value) if isinstance(value, bytes) else value


def prepare(db: sqlite3.Connection, file: str) -> None:
    """Create the tables in an empty file; refuse another program's."""
    if is_ours(db, file):
        return
    if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise BrokerError(f"SQLite file {file} cannot use WAL. Put it on a local disk, not on a network drive")
    db.execute("BEGIN IMMEDIATE")
    try:
        if not is_ours(db, file):
            for statement in sql.TABLES:
                db.execute(statement)
            db.execute("INSERT INTO meta VALUES (1, ?, 0, 1)", (secrets.token_hex(8),))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def is_ours(db: sqlite3.Connection, file: str) -> bool:
    """Tell whether the file has our tables (False: it is empty); raise ``BrokerError`` for any other content."""
    mark, layout, tables = _marks(db)
    if mark == sql.APPLICATION_ID:
        if layout != sql.LAYOUT:
            raise BrokerError(
                f"SQLite file {file} has layout {layout}, this version of sqspipes_mp reads {sql.LAYOUT}. "
                "Finish its messages with the version that made it, or give another path"
            )
        return True
    if mark or layout or tables:
        raise BrokerError(f"SQLite file {file} belongs to another program. Give a path of its own to the queues")
    return False


def _marks(db: sqlite3.Connection) -> tuple[int, int, int]:
    # In one transaction: another process may be creating the tables, and half of its work would look like a stranger's.
    inside = db.in_transaction
    if not inside:
        db.execute("BEGIN")
    try:
        mark = db.execute("PRAGMA application_id").fetchone()[0]
        layout = db.execute("PRAGMA user_version").fetchone()[0]
        return mark, layout, db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    finally:
        if not inside and db.in_transaction:
            db.execute("COMMIT")


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return None


def _ticks(boot: str | None) -> int:
    # Without a boot id nobody can tell whether two monotonic times are of the same boot.
    return (time.time_ns() if boot is None else lease_now_ns()) // 1_000_000


def _read_shift(db: sqlite3.Connection, boot: str | None) -> int:
    if boot is None:
        return 0
    query = "SELECT shift FROM clocks WHERE boot = ?"
    found = db.execute(query, (boot,)).fetchone()
    if found is None:
        _add_clock(db, boot)
        found = db.execute(query, (boot,)).fetchone()
    shift: int = found[0]
    return shift


def _add_clock(db: sqlite3.Connection, boot: str) -> None:
    # A machine that boots with its wall clock in the past must not hide every message until it has caught up.
    wall = time.time_ns() // 1_000_000
    db.execute(sql.ADD_CLOCK, (boot, wall, _ticks(boot), wall))
    db.execute(
        "DELETE FROM clocks WHERE boot NOT IN (SELECT boot FROM clocks ORDER BY last DESC LIMIT ?)", (_BOOTS_KEPT,)
    )
