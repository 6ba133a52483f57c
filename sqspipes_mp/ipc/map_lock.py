"""A file lock: one ``map`` per pipeline on SQLite. The kernel frees it when its holders die (caller, supervisor).

Two maps would take each other's results. The lock is ``flock`` on a file of its own beside the database, one per
domain. A row in the database would outlive a crash, and closing a descriptor of the database would drop SQLite's own
locks. The file is never unlinked: a process that opens it and the holder would then have two different files.

The holders are the caller and its supervisor, so that either may be killed while the other still has messages in hand.
Every other fork closes the lock. The file's text is for people and decides nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing import reduction
from typing import Any, Self

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.errors import BrokerError, MapRunning
from sqspipes_mp.host import fork_guard as forks

#: Most bytes of a lock file's text that are read.
_MOST = 500


class MapLock:
    """The lock of one domain, held from its making until ``release`` or the death of its last holder."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        #: The thread that forks the one child that keeps the lock.
        self._heirs_parent: int | None = None
        forks.protect(self)

    @classmethod
    def take(cls, broker: Broker, domain: str, what: str) -> Self | None:
        """Take the lock of ``domain`` for a method of the engine, ``what``; None where the broker has no locks (SQS).

        ``map`` excludes all other holders; another method excludes maps. Raises ``MapRunning`` and ``BrokerError``.
        """
        broker.check()
        path = broker.lock_file(domain)
        if path is None:
            return None
        alone = what == "map"
        # No fork before the lock is protected: the child would keep the descriptor.
        with forks.postponed():
            try:
                fd = _open(path)
            except OSError as error:
                cure = "Give the database a folder in which this user may make files, with room for one"
                raise BrokerError(f"{path}: the lock file of {what}() cannot be opened ({error}). {cure}") from error
            try:
                fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, _MOST, 0).decode("utf-8", "replace").strip()
                os.close(fd)
                raise MapRunning(domain, what, holder, path) from None
            except OSError as error:
                os.close(fd)
                raise BrokerError(
                    f"{path}: this file system has no locks for it ({error}). Keep the database on a local disk"
                ) from error
            lock = cls(fd)
        lock.sign(os.getpid() if alone else None)
        return lock

    def sign(self, pid: int | None, supervisor: int | None = None) -> None:
        """Write the holders and the time into the file; None: the file is empty."""
        text = ""
        if pid is not None:
            also = "" if supervisor is None else f" with its supervisor {supervisor}"
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            text = f"pid {pid}{also} on {socket.gethostname()} since {now}"
        # The lock holds without its text, on a full disk say, or in another user's file.
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, text.encode(), 0)

    @contextlib.contextmanager
    def bequeathed(self) -> Iterator[None]:
        """Let the child that this thread forks in the block keep the lock as well."""
        self._heirs_parent = threading.get_ident()
        try:
            yield
        finally:
            self._heirs_parent = None

    def release(self) -> None:
        """Free the lock for every process: the supervisor is reaped, or was never started."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
        # Closing is not enough: a program that another thread is starting has the descriptor for a moment.
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        """Close the lock in this process; the other holder keeps it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def hold(self, patience: float) -> None:
        """Do nothing before a fork."""

    def resume(self, *, child: bool) -> None:
        """Close the lock in a forked ``child``, but for the supervisor."""
        if not child:
            return
        if self._heirs_parent == threading.get_ident():
            self._heirs_parent = None
        else:
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Only multiprocessing pickles a lock, to start the supervisor by forkserver or spawn; its descriptor goes too.
        return _attach, (reduction.DupFd(self._fd),)


@contextlib.contextmanager
def no_map(broker: Broker, domain: str, what: str) -> Iterator[None]:
    """Keep maps of ``domain`` from beginning during the block. Raises ``MapRunning``, ``BrokerError``."""
    lock = MapLock.take(broker, domain, what)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _open(path: str) -> int:
    flags = os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_RDWR, 0o600)
    except PermissionError:
        # Another user's file: it can be locked, but not written.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _attach(handle: Any) -> MapLock:
    fd = handle.detach()
    # The descriptor came through an exec, which kept it open; the next exec must not.
    os.set_inheritable(fd, False)
    return MapLock(fd)
