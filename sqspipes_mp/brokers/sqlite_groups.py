"""FIFO groups: who may be received, in which order (inside a write transaction).

A group is ready when its oldest message is visible and none of it is in flight. A delayed message holds back the ones
behind it, not those before it.
"""

from collections.abc import Iterable

from sqspipes_mp.brokers import sqlite_schema as sql
from sqspipes_mp.brokers.sqlite_session import Session


def join(session: Session, queue: int, name: str, seq: int, visible_at: int) -> int:
    """Return the id of the group a new message goes to; made if this is its first one."""
    known = session.groups.get((queue, name))
    if known is None:
        row = session.db.execute(sql.GROUP, (queue, name)).fetchone()
        known = row[0] if row else _create(session, queue, name, seq, visible_at)
        session.groups[queue, name] = known
    return known


def _create(session: Session, queue: int, name: str, seq: int, visible_at: int) -> int:
    created = session.db.execute(sql.NEW_GROUP, (queue, name, visible_at, seq)).lastrowid
    assert created is not None
    return created


def settle(session: Session, groups: Iterable[int]) -> None:
    """Work out anew when each group is ready, after messages of it were deleted or extended."""
    for group in groups:
        head, ready_at = None, 0
        prefix = session.db.execute(sql.PREFIX, (group,))
        for seq, visible_at, receives in prefix:
            if head is None:
                head, ready_at = seq, visible_at
            if not receives:
                break
            ready_at = max(ready_at, visible_at)
        prefix.close()
        if head is None:
            session.db.execute(sql.DROP_GROUP, (group,))
        else:
            session.db.execute(sql.SETTLE, (ready_at, head, group))
