"""Errors of SQLite and the file system: the ones worth waiting for, and advice for the others. Pure (any process)."""

import errno
import sqlite3
from dataclasses import dataclass

from sqspipes_mp.errors import BrokerError

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_WAITABLE = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_IOERR: "the disk reports an error",
    sqlite3.SQLITE_NOMEM: "memory is short",
}
_WAITABLE_ERRNO = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "this process has too many open files (ulimit -n)",
    errno.ENFILE: "the system has too many open files",
    errno.ENOMEM: "memory is short",
    errno.ENOLCK: "the system has too many file locks",
}
_GONE = "was moved or removed while in use. Stop every process that uses it, then start again"
_CURES = {
    sqlite3.SQLITE_CORRUPT: "is damaged. Stop every process, keep a copy, try `sqlite3 FILE .recover`, or remove it",
    sqlite3.SQLITE_NOTADB: "is not an SQLite database. Give another path, or remove the file",
    sqlite3.SQLITE_READONLY: "cannot be written. Make the file, its -wal and -shm and their folder writable",
    sqlite3.SQLITE_PERM: "may not be accessed. Make the file and its folder readable and writable",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened. See that its folder exists and is writable",
}


@dataclass(frozen=True, slots=True)
class Wait:
    """A fault that waiting cures."""

    reason: str
    #: False for the short lock of another process, which is not logged.
    notable: bool
    #: Longest wait between two tries, seconds.
    longest: float


#: The wait of a process that has no descriptor left.
NO_DESCRIPTOR = Wait(_WAITABLE_ERRNO[errno.EMFILE], notable=True, longest=5.0)


def plan_wait(error: sqlite3.Error | OSError, file: str) -> Wait:
    """Return the wait that cures an error.

    Raises ``BrokerError``, its cure in the text, where waiting does not help; an error of the program itself (a wrong
    statement, say) is raised as it is.
    """
    if isinstance(error, OSError):
        return _plan_os_wait(error, file)
    extended: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    code = extended & 0xFF
    if code in _BUSY:
        return Wait("another process holds it", notable=False, longest=0.1)
    if extended == sqlite3.SQLITE_READONLY_DBMOVED:
        raise gone(file) from error
    if code in _WAITABLE:
        return Wait(_WAITABLE[code], notable=True, longest=5.0)
    if code in _CURES:
        raise BrokerError(f"SQLite file {file} {_CURES[code]} ({error})") from error
    if isinstance(error, sqlite3.OperationalError):
        raise BrokerError(f"SQLite file {file} cannot be used: {error}. See that nothing else writes to it") from error
    raise error


def _plan_os_wait(error: OSError, file: str) -> Wait:
    if error.errno in _WAITABLE_ERRNO:
        return Wait(_WAITABLE_ERRNO[error.errno], notable=True, longest=5.0)
    if isinstance(error, FileNotFoundError):
        raise gone(file) from error
    raise BrokerError(f"SQLite file {file} cannot be used: {error}") from error


def gone(file: str) -> BrokerError:
    """Return the error of a connection whose open file is no longer the one at its path."""
    return BrokerError(f"SQLite file {file} {_GONE}")
