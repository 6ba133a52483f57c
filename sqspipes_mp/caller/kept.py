"""Results of earlier runs, read from the queues' file while ``map`` comes to their values (caller).

Nothing here grows in memory with the number of values: results are read in pages, one value's at a time, and the values
met before are noted in a temporary file.
"""

from __future__ import annotations

import sqlite3
from collections import deque

from sqspipes_mp.brokers.base import Ended, KeyedConnection

#: Results of one value that are read at a time.
_PAGE = 16


class Kept:
    """The results of one value that earlier runs have recorded, in their order.

    Args:
        connection: of the queues' file.
        queue: the value was fed to it.
        token: the value's.
        before: results from this number on are of this run, which hands them out as they come.
        ended: the first results, read already.
        keeps: whether they stay for the next run.
    """

    __slots__ = ("_before", "_connection", "_keeps", "_more", "_page", "_queue", "_read", "_token")

    def __init__(
        self, connection: KeyedConnection, queue: str, token: str, before: int, ended: Ended, *, keeps: bool
    ) -> None:
        self._connection = connection
        self._queue = queue
        self._token = token
        self._before = before
        self._keeps = keeps
        self._page = deque(text for _, text in ended.first)
        self._read = ended.first[-1][0] if ended.first else 0
        self._more = ended.more

    def first(self) -> str | None:
        """Return the first result not taken yet, in JSON; None: there is no other, and all were handed out."""
        if not self._page and self._more:
            rows = self._connection.results(self._queue, self._token, self._read, self._before, _PAGE, kept=self._keeps)
            self._more = len(rows) == _PAGE
            self._read = rows[-1][0] if rows else self._read
            self._page.extend(text for _, text in rows)
        if self._page:
            return self._page[0]
        if not self._keeps:
            self._connection.forget_results(self._queue, self._token, self._read)
        return None

    def take(self) -> None:
        """Take the first result."""
        self._page.popleft()


class Met:
    """The values whose kept results were handed out in this run, in a temporary file of this process."""

    def __init__(self) -> None:
        # An empty name: SQLite removes the file itself, and writes to it once it does not fit its cache.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE met (token BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, token: str) -> bool:
        """Note a value; False: it was noted before."""
        found = self._db.execute("INSERT OR IGNORE INTO met VALUES (?)", (bytes.fromhex(token),))
        return found.rowcount > 0

    def close(self) -> None:
        """Remove the file."""
        self._db.close()
