"""One process's hold on the SQLite file: taking turns, transactions, retries, forks (any process, all its threads).

One handle serves all threads of a process: writers exclude each other anyway, and a second handle's commits would
empty the first one's page cache.

Writers of all processes queue for a kernel lock (``flock``) rather than for SQLite's own, whose losers sleep up to
100 ms at a time. It is taken on the -wal file, which exists while any handle is open and holds no locks of SQLite's:
closing a descriptor of the database file itself would drop those. The kernel drops ours with its process.

A commit that gives others something to receive is announced by closing a *writable* descriptor of the -wal file,
opened before the commit: waiting processes watch for just that (see ``wake``), and the kernel closes it even for
a process that is killed between its commit and the announcement.
"""

import contextlib
import fcntl
import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from sqspipes_mp.brokers import sqlite_errors, sqlite_fork
from sqspipes_mp.brokers.sqlite_session import Session
from sqspipes_mp.errors import BrokerBusy, BrokerError

T = TypeVar("T")

_log = logging.getLogger("sqspipes_mp.brokers.sqlite")
_SHORTEST_WAIT = 0.005
#: Seconds between two log lines about a fault that goes on.
_COMPLAIN_EVERY = 60.0
#: Seconds after which even another program's lock is worth a line.
_PATIENCE = 10.0


class File:
    """The file, for one process. ``durable`` False: it need not survive a power cut. ``patience``: see ``base``."""

    def __init__(self, file: str, *, durable: bool, patience: float | None = None) -> None:
        self.file = file
        self._patience = patience
        self.wal = f"{file}-wal"
        self._log_path = Path(self.wal)
        #: How many times the file was opened; the -wal file is the same one in between.
        self.opened = 0
        self._inode = -1
        self._durable = durable
        self._synced_folder = False
        self._mutex = threading.Lock()
        self._held = False
        self._inherited = False
        self._session: Session | None = None
        self._closed = threading.Event()
        self._complained_at = float("-inf")
        sqlite_fork.protect(self)

    def read(self, job: Callable[[Session], T]) -> T:
        """Run a job that only reads, outside any transaction."""
        return self._retry(lambda: self._read(job))

    def write(self, job: Callable[[Session], T]) -> T:
        """Run a job in one write transaction; it may run again after a fault."""
        return self._retry(lambda: self._write(job))

    def sync(self) -> None:
        """Return when everything committed before is safe from a power cut.

        Equals ``synchronous=FULL`` for the commits before it, but keeps no other process from writing meanwhile.
        """
        if self._durable:
            self._retry(self._sync)

    def close(self) -> None:
        """Close the handle for good; calls that wait for a fault to pass give up."""
        self._closed.set()
        with self._mutex:
            self._drop()

    def hold(self, patience: float) -> None:
        """Before a fork: close the handle."""
        self._held = self._mutex.acquire(timeout=patience)
        if self._held:
            self._drop()

    def resume(self, *, child: bool) -> None:
        """After a fork."""
        if self._held:
            self._mutex.release()
        elif child:
            # Its thread is not here to finish with it, and closing it would undo the parent's transaction: leak it.
            self._mutex = threading.Lock()
            if self._session is not None:
                self._session.leak()
                self._inherited, self._session = True, None
        if child:
            self._closed, closed = threading.Event(), self._closed.is_set()
            if closed:
                self._closed.set()

    def _read(self, job: Callable[[Session], T]) -> T:
        with self._mutex:
            session = self._open()
            self._check_place(self._log_path.stat())
            return job(session)

    def _write(self, job: Callable[[Session], T]) -> T:
        with self._mutex:
            session = self._open()
            with self._turn():
                return self._transact(session, job)

    def _transact(self, session: Session, job: Callable[[Session], T]) -> T:
        bell = -1
        try:
            session.begin()
            result = job(session)
            session.save()
            if session.ring:
                bell = os.open(self.wal, os.O_WRONLY | os.O_CLOEXEC)
            session.db.execute("COMMIT")
        except BaseException:
            self._roll_back(session)
            raise
        finally:
            if bell >= 0:
                os.close(bell)
        return result

    def _roll_back(self, session: Session) -> None:
        try:
            session.rollback()
        except sqlite3.Error:
            # The fault that led here is about to be raised; a new handle starts clean.
            self._drop()

    def _open(self) -> Session:
        if self._session is None:
            if self._closed.is_set():
                raise BrokerError(f"the connection to {self.file} is closed")
            if self._inherited:
                raise BrokerError(f"{self.file} was in use by another thread during a fork. Fork before using it")
            session = Session(self.file, synchronous="NORMAL" if self._durable else "OFF", patience=self._patience)
            try:
                self._inode = self._log_path.stat().st_ino
            except BaseException:
                session.close()
                raise
            self._session = session
            self.opened += 1
        return self._session

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        turn = os.open(self.wal, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._queue_up(turn)
            self._check_place(os.fstat(turn))
            yield
        finally:
            # Not by closing alone: a process the user's function forked meanwhile may have inherited the descriptor.
            with contextlib.suppress(OSError):
                fcntl.flock(turn, fcntl.LOCK_UN)
            os.close(turn)

    def _queue_up(self, turn: int) -> None:
        if self._patience is None:
            fcntl.flock(turn, fcntl.LOCK_EX)
            return
        # The kernel's queue has no deadline: whoever has one stands beside it and asks.
        until = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until or self._closed.wait(_SHORTEST_WAIT):
                    raise BrokerBusy(f"{self.file}: another process has kept it for {self._patience:g} s") from None
            else:
                return

    def _check_place(self, found: os.stat_result) -> None:
        # It cannot change under an open session, unless someone moves or removes the files.
        if found.st_ino != self._inode:
            raise sqlite_errors.gone(self.file)

    def _sync(self) -> None:
        try:
            log = os.open(self.wal, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # Closing the last handle copied the log into the database, with all the syncs that takes.
        try:
            os.fsync(log)
        finally:
            os.close(log)
        if not self._synced_folder:
            folder = os.open(Path(self.file).parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._synced_folder = True

    def _retry(self, step: Callable[[], T]) -> T:
        failures, since = 0, time.monotonic()
        while True:
            try:
                return step()
            except (sqlite3.Error, OSError) as error:
                wait = sqlite_errors.judge(error, self.file)
                cause = error
            failures += 1
            if wait.notable or time.monotonic() - since > _PATIENCE:
                self._complain(wait.reason, cause)
            if self._patience is not None and time.monotonic() - since > self._patience:
                raise BrokerBusy(f"{self.file}: {wait.reason} for {self._patience:g} s ({cause})") from cause
            longest = min(wait.longest, _SHORTEST_WAIT * 2 ** min(failures, 20))
            if self._closed.wait(longest * random.uniform(0.5, 1.0)):
                raise BrokerError(f"the connection to {self.file} was closed while {wait.reason}") from cause

    def _complain(self, reason: str, error: Exception) -> None:
        now = time.monotonic()
        if now - self._complained_at >= _COMPLAIN_EVERY:
            self._complained_at = now
            _log.warning("SQLite file %s: %s; retrying until it passes (%s)", self.file, reason, error)
