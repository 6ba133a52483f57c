"""A session: one open handle of the SQLite file with its tables, clock and queues (any process, one thread at a time).

The file's clock is the clock of leases (``host.clock``) plus a shift to epoch time, which the file keeps for each boot.
So all processes of a boot read the same time, setting the wall clock neither ends nor prolongs a lease, and the time
goes on after a reboot where it stopped before.
"""

import ctypes
import logging
import math
import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from sqspipes_mp.brokers.base import Handle
from sqspipes_mp.brokers.sqlite import schema as sql
from sqspipes_mp.brokers.sqlite import transactions as sqlite_program
from sqspipes_mp.brokers.sqlite.transactions import Program, Row, Step, row
from sqspipes_mp.errors import BrokerError, QueueMissing
from sqspipes_mp.host.clock import lease_now, lease_now_ns

log = logging.getLogger("sqspipes_mp.brokers.sqlite")
#: Longest wait of SQLite itself for a lock, milliseconds. Short, because the time of a transaction is read before it.
_BUSY_TIMEOUT = 100
#: Boots whose clock shifts the file keeps.
_BOOTS_KEPT = 8


class QueuesChanged(Exception):
    """The file's list of queues is newer than the session's; the transaction did nothing."""


@dataclass(frozen=True, slots=True)
class Queue:
    """A row of ``queues``."""

    name: str
    #: A purge gives the queue a new number.
    id: int
    fifo: bool
    #: Default visibility timeout, seconds.
    visibility: float
    #: Name of its dead-letter queue; None for a dead-letter queue.
    dead: str | None
    #: Milliseconds that a message is kept.
    retention: int
    #: Its kind in ``transactions``: 0, 1 for FIFO, 2 for tenants, who take turns on a standard queue.
    kind: int = 0

    @property
    def tenants(self) -> bool:
        """Whether its messages have tenants."""
        return self.kind == 2


class Session:
    """A connection of ``sqlite3`` and a copy of the file's list of queues.

    ``synchronous``: the pragma's value. ``patience``: most seconds that one call may take; None: no limit. Raises
    ``BrokerError`` for a file of another program or layout, and ``sqlite3.Error``.
    """

    def __init__(self, file: str, *, synchronous: str, patience: float | None = None) -> None:
        timeout = _BUSY_TIMEOUT / 1000 if patience is None else min(_BUSY_TIMEOUT / 1000, patience / 2)
        self.db = sqlite3.connect(file, timeout=timeout, isolation_level=None, check_same_thread=False)
        # Strict decoding would raise out of every receive that meets a row with bytes that are no UTF-8.
        self.db.text_factory = readable
        try:
            prepare(self.db, file)
            self.db.execute(f"PRAGMA synchronous = {synchronous}")
            # Zeroing deleted rows would double the writing; the file is as private as its folder.
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
        #: Number of the list of queues below, as in ``meta``; -1: not read yet.
        self.generation = -1
        self.queues: dict[str, Queue] = {}
        self.by_id: dict[int, Queue] = {}
        #: Query and its parameters for the earliest due time of some queues, by their names.
        self._due_queries: dict[tuple[str, ...], tuple[str, list[int]]] = {}

    def now(self) -> int:
        """Return the file's time in milliseconds."""
        return _ticks(self.boot) + self._shift

    def to_lease_clock(self, now: int) -> float:
        """Return the file's time ``now`` (milliseconds) as a time of ``lease_now`` (seconds)."""
        return lease_now() - (self.now() - now) / 1000

    def run(self, program: Program, rows: Sequence[Row]) -> int:
        """Run steps in one transaction; returns its time, milliseconds. Raises ``QueuesChanged``."""
        try:
            return sqlite_program.run(self.db, program, [row(Step.OPEN, seq=self.generation), *rows], self.now)
        except sqlite3.IntegrityError as error:
            if str(error) == sqlite_program.CHANGED:
                raise QueuesChanged from None
            raise

    def pass_on(self, rows: Sequence[Row]) -> bool:
        """Send and delete by sets (see ``program.pass_on``); False where an input has a stream: nothing was done.

        Raises ``QueuesChanged``.
        """
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
        """Return a queue by its name, as of the last refresh. Raises ``QueueMissing``."""
        try:
            return self.queues[name]
        except KeyError:
            cure = "It was deleted, or never created: run with create_queues=True, or see that the name is right"
            raise QueueMissing(name, cure) from None

    def receipt(self, handle: Handle) -> tuple[int, int, Queue] | None:
        """Return the message's number, the delivery's number and the queue; None for a receipt that was never given."""
        number, _, delivery = handle.receipt.partition("-")
        queue = self.queues.get(handle.queue)
        if queue is None or not (number.isdecimal() and delivery.isdecimal() and delivery != "0"):
            return None
        return int(number), int(delivery), queue

    def refresh(self) -> None:
        """Read the list of queues again if it changed."""
        generation = self.db.execute(sql.GENERATION).fetchone()[0]
        if generation != self.generation:
            self._reload(generation)

    def next_due(self, names: Sequence[str]) -> float:
        """Return the seconds until one of the queues has a message to receive: 0 = now, infinity = it has none."""
        wanted = tuple(names)
        while True:
            text, ids = self._due_queries.get(wanted) or self._compose_due_query(wanted)
            generation, *earliest = self.db.execute(text, ids).fetchone()
            if generation == self.generation:
                due = min((at for at in earliest if at is not None), default=None)
                return math.inf if due is None else max(0.0, (due - self.now()) / 1000)
            self._reload(generation)

    def _compose_due_query(self, names: tuple[str, ...]) -> tuple[str, list[int]]:
        """Return the query and parameters for the earliest due time of some queues, and keep them."""
        self.refresh()
        queues = [self.queue(name) for name in names]
        parts = ["(SELECT generation FROM meta)"]
        parts += [f"({sql.DUE_FIFO if queue.kind else sql.DUE_STANDARD})" for queue in queues]
        self._due_queries[names] = "SELECT " + ", ".join(parts), [queue.id for queue in queues]
        return self._due_queries[names]

    def _reload(self, generation: int) -> None:
        # The generation was read before the rows. Should the rows be newer, the next comparison reads them again.
        rows = self.db.execute(sql.QUEUES).fetchall()
        found = [Queue(name, id_, kind == 1, vis, dead, keep, kind) for name, id_, kind, vis, dead, keep in rows]
        self.queues = {queue.name: queue for queue in found}
        self.by_id = {queue.id: queue for queue in found}
        self._due_queries = {}
        self.generation = generation

    def close(self) -> None:
        """Close the handle."""
        self.db.close()

    def leak(self) -> None:
        """Keep the handle from being closed, even at the interpreter's exit."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.db))


def readable(stored: bytes) -> str:
    r"""Return stored text; a byte that is no UTF-8 becomes an escape such as ``\xff``, which no JSON body has."""
    return stored.decode("utf-8", "backslashreplace")


@overload
def as_text(value: str | bytes) -> str: ...
@overload
def as_text(value: str | bytes | None) -> str | None: ...
def as_text(value: str | bytes | None) -> str | None:
    """Return a text column's value; another program may have stored a BLOB in it. NULL stays None."""
    return readable(value) if isinstance(value, bytes) else value


def prepare(db: sqlite3.Connection, file: str) -> None:
    """Create the tables in an empty file, and bring older ones up to this layout, in one transaction.

    Raises ``BrokerError`` for another program's file, a newer layout, or a file without WAL.
    """
    layout = layout_of(db, file)
    if layout == sql.LAYOUT:
        return
    if not layout and db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise BrokerError(f"SQLite file {file} cannot use WAL. Put it on a local disk, not on a network drive")
    db.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have been first.
        layout = layout_of(db, file)
        for statement in {0: sql.TABLES, 1: sql.FROM_1}.get(layout, ()):
            db.execute(statement)
        if not layout:
            db.execute("INSERT INTO meta VALUES (1, ?, 0, 1)", (secrets.token_hex(8),))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    if layout == 1:
        log.info("SQLite file %s: its layout is %d now; sqspipes_mp 0.1 does not open it any more", file, sql.LAYOUT)


def layout_of(db: sqlite3.Connection, file: str) -> int:
    """Return the layout of the file's tables; 0: it is empty. Raises ``BrokerError`` for any other content."""
    mark, layout, tables = _marks(db)
    if mark == sql.APPLICATION_ID:
        if not 0 < layout <= sql.LAYOUT:
            raise BrokerError(
                f"SQLite file {file} has layout {layout}, this version of sqspipes_mp reads up to {sql.LAYOUT}. "
                "Finish its messages with the version that made it, or give another path"
            )
        return layout
    if mark or layout or tables:
        raise BrokerError(f"SQLite file {file} belongs to another program. Give a path of its own to the queues")
    return 0


def _marks(db: sqlite3.Connection) -> tuple[int, int, int]:
    """Return application id, layout and number of tables of a file; 0 each of an empty one."""
    # In one transaction: another process may be creating the tables, and half of them look like another program's.
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
    """Return the clock of leases in milliseconds; without a boot id, the wall clock."""
    # Without a boot id, two monotonic times could be of different boots.
    return (time.time_ns() if boot is None else lease_now_ns()) // 1_000_000


def _read_shift(db: sqlite3.Connection, boot: str | None) -> int:
    """Return the milliseconds to add to this boot's clock; the first reader of a boot sets them."""
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
    # After a boot with the wall clock in the past, the file's time goes on from its last one: else every message would
    # stay hidden until the wall clock has caught up.
    wall = time.time_ns() // 1_000_000
    db.execute(sql.ADD_CLOCK, (boot, wall, _ticks(boot), wall))
    db.execute(
        "DELETE FROM clocks WHERE boot NOT IN (SELECT boot FROM clocks ORDER BY last DESC LIMIT ?)", (_BOOTS_KEPT,)
    )
