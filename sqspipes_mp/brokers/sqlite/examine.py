"""Look at a SQLite file without changing it: no table is made, no layout brought up, no file made beside it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from sqspipes_mp.brokers.base import QueueSpec
from sqspipes_mp.brokers.examined import Examined, ExaminedQueue
from sqspipes_mp.host import fork_guard as forks

_MESSAGES = "SELECT q.name, count(m.seq) FROM queues AS q LEFT JOIN messages AS m ON m.queue = q.id GROUP BY q.id"


def examine_file(file: str, queues: Sequence[QueueSpec]) -> Examined:
    """Return the queues of a file with the numbers of their messages."""
    try:
        counts = _counts(file)
    except sqlite3.Error as error:
        return Examined(service="sqlite", file=file, trouble=f"SQLite file {file} cannot be read: {error}")
    found = tuple(
        ExaminedQueue(spec=spec, exists=spec.name in counts, messages=counts.get(spec.name)) for spec in queues
    )
    return Examined(service="sqlite", file=file, queues=found)


def _counts(file: str) -> dict[str, int]:
    """Return the messages of each queue. Raises ``sqlite3.Error``."""
    if not Path(file).exists() or not Path(file).stat().st_size:
        return {}
    # Without a log beside it nobody has the file open, and SQLite need not make one.
    alone = not Path(f"{file}-wal").exists()
    with forks.postponed():
        db = sqlite3.connect(f"file:{quote(file)}?{'immutable=1' if alone else 'mode=ro'}", uri=True, timeout=5.0)
        try:
            return dict(db.execute(_MESSAGES))
        finally:
            db.close()
