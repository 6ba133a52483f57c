"""``SQLite(path)``, the SQLite broker as the user declares it (any process).

One file holds all queues of a pipeline on one machine, with SQS's semantics. ``file`` has transactions and forks,
``schema`` the tables, ``transactions`` the transactions themselves, ``wake`` the wait without polling.
"""

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqspipes_mp.brokers.base import QueueSpec, Wallet
from sqspipes_mp.brokers.examined import Examined, ExaminedQueue
from sqspipes_mp.brokers.sqlite import folders
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from sqspipes_mp.brokers.sqlite.examine import examine_file
from sqspipes_mp.brokers.sqlite.file import make_file
from sqspipes_mp.brokers.sqlite.session import layout_of
from sqspipes_mp.errors import BrokerError, ConfigError
from sqspipes_mp.host import fork_guard as forks

_CURE = "Give the path of a file in an existing, writable folder on a local disk, or None for a temporary file"


@dataclass(frozen=True, slots=True)
class SQLite:
    """Queues in one SQLite file, for all processes of one machine. Picklable; constructing it touches no file.

    Raises ``ConfigError`` for a value that cannot be a path.
    """

    #: The file's path. A relative one is resolved against the working directory at the first ``check`` or ``open``.
    #: None: a temporary file, created by that first call and removed by ``cleanup``.
    path: str | os.PathLike[str] | None = None
    #: Permissions of the file, and of those beside it, where it is made: by default its owner's alone. An existing
    #: file stays as it is.
    mode: int = field(default=0o600, kw_only=True)
    #: The absolute path, once resolved; a pickle and a forked child have it, too.
    file: str | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.mode, int) or not 0o600 <= self.mode <= 0o777 or self.mode & 0o600 != 0o600:
            allowed = "permissions with which the owner can read and write, such as 0o600 or 0o660"
            raise ConfigError("SQLite(mode)", self.mode, allowed)
        if self.path is None:
            return
        if not isinstance(self.path, (str, os.PathLike)):
            raise ConfigError("SQLite(path)", self.path, "a str, a path-like object or None", _CURE)
        text = os.fspath(self.path)
        if not isinstance(text, str) or not text or "\0" in text:
            raise ConfigError("SQLite(path)", self.path, "the path of a file", _CURE)
        if text == ":memory:":
            raise ConfigError("SQLite(path)", text, "a file: other processes cannot see memory", _CURE)
        object.__setattr__(self, "path", text)

    @property
    def temporary(self) -> bool:
        """True for a temporary file, which ``cleanup`` removes."""
        return self.path is None

    @property
    def longest_hold(self) -> None:
        """None: a lease in a file can be extended for ever."""

    @property
    def longest_delay(self) -> None:
        """None: a message is kept for 14 days from when it is due."""

    @property
    def remembers_keys(self) -> bool:
        """True: a key lives until its queue is purged."""
        return True

    def exists(self) -> bool:
        """Return False where there is no file; creates none."""
        return self.file is not None and Path(self.file).exists()

    def lock_file(self, domain: str) -> str | None:
        """Return the path of a lock file beside the database, one for each domain."""
        path = f"{self.file}-{domain}.lock"
        make_file(path, self.mode)
        return path

    def check(self) -> None:
        """Resolve the path. Raises ``ConfigError`` for a path that cannot be used, or another program's file."""
        if self.file is None:
            object.__setattr__(self, "file", self._resolve())
        elif self.path is not None:
            _check(self.file)

    def warm(self) -> None:
        """Do nothing: importing this module has loaded all that children can share."""

    def open(
        self,
        *,
        patience: float | None = None,
        wallet: Wallet | None = None,  # noqa: ARG002  (the port's)
        attended: bool = False,
    ) -> SQLiteConnection:
        """Return a connection for this process, which opens the file at its first call.

        ``patience``, ``attended``: see ``Broker.open``; ``wallet`` is not used. Raises ``ConfigError`` as ``check``.
        """
        self.check()
        assert self.file is not None
        return SQLiteConnection(
            self.file, durable=not self.temporary, patience=patience, attended=attended, mode=self.mode
        )

    def examine(self, queues: Sequence[QueueSpec]) -> Examined:
        """Look at the file, and change nothing."""
        if self.path is None:
            return Examined(service="sqlite", queues=tuple(ExaminedQueue(spec=spec, exists=False) for spec in queues))
        try:
            self.check()
        except ConfigError as error:
            return Examined(service="sqlite", trouble=str(error))
        assert self.file is not None
        return examine_file(self.file, queues)

    def cleanup(self) -> None:
        """Remove a temporary file and its folder; the user's own file stays."""
        if self.temporary and self.file is not None:
            folders.remove(str(Path(self.file).parent))
            object.__setattr__(self, "file", None)

    def describe(self) -> str:
        """A short text for logs."""
        if self.temporary:
            return f"SQLite {self.file} (temporary)" if self.file else "SQLite in a temporary file"
        return f"SQLite {self.file or os.fspath(self.path or '')}"

    def _resolve(self) -> str:
        """Return the absolute path of the file, or of a new temporary one."""
        if self.path is None:
            try:
                return str(Path(folders.make()) / "queues.db")
            except OSError as error:
                allowed = "None only where a temporary folder can be made"
                raise ConfigError("SQLite(path)", None, allowed, f"{error}. Set TMPDIR, or give a path") from error
        # SQLite puts the -wal file beside the target of a symbolic link.
        try:
            file = os.path.realpath(self.path)
        except FileNotFoundError as error:
            cure = "Start the program in a folder that stays, or give the file's whole path"
            raise ConfigError(
                "SQLite(path)", self.path, "a whole path where the working directory is gone", cure
            ) from error
        _check(file)
        return file


def _check(file: str) -> None:
    try:
        _check_place(file)
    except OSError as error:
        raise ConfigError("SQLite(path)", file, f"a file this user can reach ({error.strerror})", _CURE) from error


def _check_place(file: str) -> None:
    """Raise ``ConfigError`` where a file at this path cannot be the queues'."""
    path = Path(file)
    folder = path.parent
    if path.is_dir():
        raise ConfigError("SQLite(path)", file, "a file, not a folder", _CURE)
    if not folder.is_dir():
        raise ConfigError("SQLite(path)", file, f"a file in an existing folder ({folder} is none)", _CURE)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError("SQLite(path)", file, "a file in a writable folder (SQLite makes others beside it)", _CURE)
    if not path.exists():
        return
    if not path.is_file():
        raise ConfigError("SQLite(path)", file, "a regular file", _CURE)
    if not os.access(file, os.R_OK | os.W_OK):
        raise ConfigError("SQLite(path)", file, "a file this user may read and write", _CURE)
    if path.stat().st_size:
        with forks.postponed():
            _check_content(file)


def _check_content(file: str) -> None:
    """Raise ``ConfigError`` for the file of another program or layout."""
    # Through SQLite: closing a descriptor of our own would drop the locks that this process may have on the file.
    try:
        db = sqlite3.connect(file, timeout=0.0)
        try:
            layout_of(db, file)
        finally:
            db.close()
    except sqlite3.OperationalError:
        return  # Busy, or a fault that may pass: the first call of a connection will tell.
    except BrokerError as error:
        raise ConfigError("SQLite(path)", file, f"a file of its own ({error})", _CURE) from error
    except sqlite3.DatabaseError as error:
        raise ConfigError("SQLite(path)", file, f"an SQLite database or a new file ({error})", _CURE) from error
