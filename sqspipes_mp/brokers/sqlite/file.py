"""One process's access to the SQLite file: one handle, transactions, retries, forks (any process, all its threads).

One handle serves all threads of a process: writers exclude each other anyway, and the commits of a second handle would
empty the page cache of the first.

A process holds the file's write lock only within one call into C (see ``transactions``), never while one of its threads
waits for the GIL. A process that finds the file locked waits in C, too (SQLite's busy handler, at most 0.1 s).

A commit that gives receivers a message rings the file's bell (see ``bell``).
"""

import contextlib
import logging
import os
import random
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, TypeVar

from sqspipes_mp.brokers.base import ASKED_EVERY, ATTENDED, TOLD_EVERY, Unwanted
from sqspipes_mp.brokers.sqlite import faults
from sqspipes_mp.brokers.sqlite.holders import describe_holders
from sqspipes_mp.brokers.sqlite.session import QueuesChanged, Session
from sqspipes_mp.errors import BrokerBusy, BrokerError, QueueMissing
from sqspipes_mp.host import descriptors
from sqspipes_mp.host import fork_guard as forks
from sqspipes_mp.messages.attempts import exponential

T = TypeVar("T")
#: See ``Connection.feed``.
Wanted: TypeAlias = Callable[[], bool] | None

log = logging.getLogger("sqspipes_mp.brokers.sqlite")
#: The wait after a first failed try is up to twice this, seconds.
_FIRST_WAIT = 0.005
#: Seconds between two warnings about a fault that goes on.
_COMPLAIN_EVERY = 60.0
#: Seconds after which another process's lock is worth a warning.
_PATIENCE = 10.0


def make_file(path: str, mode: int) -> None:
    """Make an empty file with these permissions, where there is none; those who open it tell of what is in the way.

    SQLite gives the files that it makes beside the database the database's permissions.
    """
    with contextlib.suppress(OSError):
        # Not by opening it: closing a descriptor would drop the locks that another thread may have on the file by then.
        os.mknod(path, stat.S_IFREG | 0o600)
        Path(path).chmod(mode)


class File:
    """The file as one process has it open.

    ``durable`` False: commits need not survive a power cut. ``patience``, ``attended``: see ``Broker.open``. ``mode``:
    the file's permissions, where it is made. ``ring``: wakes the receivers of all processes.
    """

    def __init__(
        self,
        file: str,
        *,
        durable: bool,
        patience: float | None = None,
        attended: bool = False,
        mode: int = 0o600,
        ring: Callable[[], None] = lambda: None,
    ) -> None:
        self.file = file
        self._mode = mode
        self._ring = ring
        #: Longest wait of SQLite itself for a lock, seconds.
        self._lock_patience = patience
        self._patience = ATTENDED if attended else patience
        self._complain_every = TOLD_EVERY if attended else _COMPLAIN_EVERY
        self.wal = f"{file}-wal"
        self._log_path = Path(self.wal)
        self._inode = -1
        self._durable = durable
        self._synced_folder = False
        self._mutex = threading.Lock()
        self._held = False
        self._inherited = False
        self._session: Session | None = None
        self._closed = threading.Event()
        self._complained_at = float("-inf")
        forks.protect(self)

    def read(self, job: Callable[[Session], T], wanted: Wanted = None) -> T:
        """Run a job that only reads, each statement by itself; returns its result.

        Waits and tries again where that cures a fault. Raises ``BrokerError``, ``BrokerBusy`` after ``patience``, and
        ``Unwanted`` once ``wanted`` returns False (see ``Connection.feed``).
        """
        return self._retry(lambda: self._read(job), wanted)

    def write(self, job: Callable[[Session], T], *, ring: bool = False, wanted: Wanted = None) -> T:
        """Run a job whose transactions are one statement each; returns its result.

        After a fault the whole job runs again, so a transaction must bear being repeated. ``ring``: wake receivers
        after it. Raises as ``read``, and ``QueueMissing``.
        """
        return self._retry(lambda: self._write(job, ring=ring), wanted)

    def ring(self) -> None:
        """Wake receivers that wait for a message."""
        self.write(lambda _: None, ring=True)

    def sync(self, wanted: Wanted = None) -> None:
        """Return once all earlier commits are safe from a power cut.

        The effect is that of ``synchronous=FULL``, but other processes can write during the sync.
        """
        if self._durable:
            self._retry(self._sync, wanted)

    @property
    def moved(self) -> bool:
        """Whether a file is open that is no longer the one at its path."""
        with self._mutex:
            try:
                return self._session is not None and self._log_path.stat().st_ino != self._inode
            except OSError:
                return True

    def close(self) -> None:
        """Close the handle for good; a call that waits for a fault to pass raises ``BrokerError``."""
        self._closed.set()
        with self._mutex:
            self._drop()

    def hold(self, patience: float) -> None:
        """Before a fork: close the handle, waiting at most ``patience`` seconds for another thread's transaction."""
        self._held = self._mutex.acquire(timeout=patience)
        if self._held:
            self._drop()

    def resume(self, *, child: bool) -> None:
        """After a fork, on both sides: let threads in again, or give the child state of its own."""
        if self._held:
            self._mutex.release()
        elif child:
            # The thread of the transaction does not exist in the child, and closing the handle here would roll the
            # parent's transaction back: the handle is leaked.
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

    def _write(self, job: Callable[[Session], T], *, ring: bool) -> T:
        try:
            with self._mutex:
                session = self._open()
                self._check_place(self._log_path.stat())
                return self._with_current_queues(session, job)
        finally:
            if ring:
                # Not under the mutex: a fork waits for both this and the lock of the waits.
                self._ring()

    def _with_current_queues(self, session: Session, job: Callable[[Session], T]) -> T:
        """Run a job; run it again, with the list of queues read again, where that list was outdated."""
        if session.generation < 0:
            session.refresh()
        while True:
            known = session.generation
            try:
                return job(session)
            except (QueuesChanged, QueueMissing):
                session.refresh()
                if session.generation == known:
                    raise

    def _open(self) -> Session:
        """Return the open session; open one if there is none."""
        if self._session is None:
            if self._closed.is_set():
                raise BrokerError(f"the connection to {self.file} is closed")
            if self._inherited:
                raise BrokerError(f"{self.file} was in use by another thread during a fork. Fork before using it")
            make_file(self.file, self._mode)
            session = Session(self.file, synchronous="NORMAL" if self._durable else "OFF", patience=self._lock_patience)
            try:
                self._inode = self._log_path.stat().st_ino
            except BaseException:
                session.close()
                raise
            self._session = session
        return self._session

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _check_place(self, found: os.stat_result) -> None:
        # The -wal file stays the same while a session is open, unless somebody moves or removes the files.
        if found.st_ino != self._inode:
            raise faults.gone(self.file)

    def _sync(self) -> None:
        """Sync the -wal file, and once the folder with its name."""
        try:
            log = os.open(self.wal, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # Closing the last handle has copied the log into the database and synced both.
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

    def _retry(self, step: Callable[[], T], wanted: Wanted = None) -> T:
        """Run a step again and again while a wait cures its faults, and its result is wanted."""
        failures, since = 0, time.monotonic()
        while True:
            try:
                return step()
            except (sqlite3.Error, OSError) as error:
                # SQLite itself says no more than that it cannot open a file.
                short = descriptors.none_left()
                if short and descriptors.relieve():
                    continue
                wait = faults.NO_DESCRIPTOR if short else faults.plan_wait(error, self.file)
                cause = error
            failures += 1
            if wait.notable:
                self._complain(wait.reason, cause)
            elif time.monotonic() - since > _PATIENCE:
                self._complain(f"{wait.reason}{describe_holders(self.file)}", cause)
            if self._patience is not None and time.monotonic() - since > self._patience:
                raise BrokerBusy(f"{self.file}: {wait.reason} for {self._patience:g} s ({cause})") from cause
            longest = exponential(_FIRST_WAIT, failures, wait.longest)
            until = time.monotonic() + longest * random.uniform(0.5, 1.0)
            while (left := until - time.monotonic()) > 0:
                if self._closed.wait(left if wanted is None else min(left, ASKED_EVERY)):
                    raise BrokerError(f"the connection to {self.file} was closed while {wait.reason}") from cause
                if wanted is not None and not wanted():
                    raise Unwanted from cause

    def _complain(self, reason: str, error: Exception) -> None:
        now = time.monotonic()
        if now - self._complained_at >= self._complain_every:
            self._complained_at = now
            log.warning("SQLite file %s: %s; retrying until it passes (%s)", self.file, reason, error)
