"""Deliveries and their receipts: find, remove, extend, dead-letter (inside a write transaction).

A receipt is ``seq-receives``: it is current until the message is received again or deleted. On standard queues its
visibility may have ended meanwhile, on FIFO queues it may not, both as on SQS.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqspipes_mp.brokers import sqlite_groups, sqlite_keys
from sqspipes_mp.brokers import sqlite_schema as sql
from sqspipes_mp.brokers.base import DeadLetter, Handle
from sqspipes_mp.brokers.sqlite_session import Queue, Session
from sqspipes_mp.message import moved_id


@dataclass(slots=True)
class Lease:
    """The message behind a current receipt. ``sent_at``: when it was first sent, also if it was moved since."""

    seq: int
    queue: Queue
    group: int | None
    streamed: bool
    charges: int
    sent_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Burial:
    """A message for a dead-letter queue, with what is kept for showing it."""

    body: str
    group: str
    charges: int
    sent_at: int
    source: str
    hop: str | None = None
    origin: str | None = None
    failure: str | None = None


def find(session: Session, handles: Sequence[Handle], strays: dict[Handle, int] | None = None) -> dict[Handle, Lease]:
    """Return the messages behind those receipts that are current.

    ``strays`` is given the FIFO groups of those messages that are there, but not under these receipts.
    """
    wanted: dict[int, list[tuple[int, Handle]]] = {}
    for handle in handles:
        number, _, delivery = handle.receipt.partition("-")
        if number.isdecimal() and delivery.isdecimal() and delivery != "0":
            wanted.setdefault(int(number), []).append((int(delivery), handle))
    found: dict[Handle, Lease] = {}
    now = session.now()
    for cursor in session.each(sql.FIND, list(wanted)):
        for seq, receives, visible_at, queue_id, *rest in json.loads(cursor.fetchone()[0]):
            # A purged queue's rows may still be there, under the number it had before.
            queue = session.by_id.get(queue_id)
            # As on SQS: reviving it could let it overtake an earlier one of its group that is somebody else's now.
            expired = queue is not None and queue.fifo and visible_at < now
            for deliveries, handle in wanted[seq]:
                if queue is None or queue.name != handle.queue:
                    continue
                if deliveries == receives and not expired:
                    found[handle] = Lease(seq, queue, *rest)
                elif queue.fifo and strays is not None:
                    strays[handle] = rest[0]
    return found


def remove(session: Session, leases: Sequence[Lease], now: int) -> None:
    """Delete messages, let their streams end and their groups go on."""
    session.each(sql.DELETE, [lease.seq for lease in leases])
    for lease in leases:
        if lease.streamed:
            sqlite_keys.end_stream(session, lease.seq, now)
    settle(session, leases)


def settle(session: Session, leases: Iterable[Lease]) -> None:
    """Work out anew when the groups of these messages are ready."""
    groups = {lease.group for lease in leases if lease.group is not None}
    if groups:
        sqlite_groups.settle(session, groups)
        session.ring = True


def extend(session: Session, handles: Sequence[Handle], seconds: float, *, charge: bool) -> list[Handle]:
    """Hide deliveries for ``seconds`` from now; returns the stale ones."""
    found = find(session, handles)
    leases = list(found.values())
    until = session.now() + int(seconds * 1000)
    session.each(sql.EXTEND, [lease.seq for lease in leases], until, int(charge))
    settle(session, leases)
    session.ring = bool(leases)
    return [handle for handle in handles if handle not in found]


def dead_letter(session: Session, letters: Sequence[DeadLetter]) -> list[Handle]:
    """Move deliveries to their dead-letter queues; returns the stale ones."""
    now = session.now()
    found = find(session, [letter.handle for letter in letters])
    stale = []
    for letter in letters:
        dead = session.queue(letter.queue)
        lease = found.pop(letter.handle, None)
        if lease is None:
            stale.append(letter.handle)
            continue
        hop = moved_id(letter.hop, "dead", letter.handle.message_id)
        burial = Burial(
            body=letter.body,
            group=letter.group or hop,
            charges=lease.charges,
            sent_at=lease.sent_at,
            source=lease.queue.name,
            hop=hop,
            # Others' ids may hold lone surrogates, which SQLite does not store.
            origin=letter.hop.encode("utf-8", "backslashreplace").decode(),
            failure=letter.failure,
        )
        bury(session, dead, burial, now)
        remove(session, [lease], now)
    return stale


def bury(session: Session, dead: Queue, burial: Burial, now: int) -> None:
    """Insert a message into a dead-letter queue.

    Without a key: it leaves its own queue in the same transaction, so it cannot come twice.
    """
    seq = session.next_seq
    session.next_seq = seq + 1
    group = sqlite_groups.join(session, dead.id, burial.group, seq, now) if dead.fifo else None
    kept = (burial.charges, now, group, burial.sent_at, burial.hop, burial.origin, burial.source, burial.failure)
    session.db.execute(sql.SEND_DEAD, (seq, dead.id, now, *kept, burial.body))
    session.ring = True
