"""Receiving: which messages a receive gets (inside a write transaction)."""

import time
from collections.abc import Sequence
from typing import Any

from sqspipes_mp.brokers import sqlite_groups, sqlite_keys, sqlite_leases
from sqspipes_mp.brokers import sqlite_schema as sql
from sqspipes_mp.brokers.base import Handle, Received
from sqspipes_mp.brokers.sqlite_leases import Burial
from sqspipes_mp.brokers.sqlite_session import Queue, Session, as_text

#: Deliveries after which a message moves to its queue's dead-letter queue by itself: SQS's highest maxReceiveCount
#: (Amazon SQS API Reference, SetQueueAttributes, RedrivePolicy).
MAX_RECEIVES = 1_000


def take(session: Session, names: Sequence[str], limit: int, visibility: float) -> list[Received]:
    """Take up to ``limit`` messages, from the first queue on; hide them for ``visibility`` seconds."""
    now = session.now()
    until = now + int(visibility * 1000)
    taken: list[Received] = []
    for name in names:
        queue = session.queue(name)
        room = limit - len(taken)
        if room <= 0:
            break
        if queue.fifo:
            _take_groups(session, queue, room, now, until, taken)
        else:
            rows = session.db.execute(sql.DUE, (queue.id, now, room)).fetchall()
            _deliver(session, queue, rows, None, now, until, taken)
    return taken


def _take_groups(session: Session, queue: Queue, room: int, now: int, until: int, taken: list[Received]) -> None:
    full = len(taken) + room
    for group, name in session.db.execute(sql.READY, (queue.id, now, room)).fetchall():
        if len(taken) >= full:
            break
        rows = session.db.execute(sql.IN_TURN, (group, full - len(taken))).fetchall()
        due = next((i for i, row in enumerate(rows) if row[-1] > now), len(rows))
        before = len(taken)
        _deliver(session, queue, [row[:-1] for row in rows[:due]], name, now, until, taken)
        if len(taken) - before == due > 0:
            session.db.execute(sql.BLOCK, (until, group))
        else:
            # What moved away may have been the head, or all there was.
            sqlite_groups.settle(session, [group])


def _deliver(
    session: Session,
    queue: Queue,
    rows: Sequence[tuple[Any, ...]],
    group: str | None,
    now: int,
    until: int,
    taken: list[Received],
) -> None:
    seqs = []
    # Times are handed out on the wall clock; the file keeps them on its own.
    epoch = time.time() - now / 1000
    for seq, receives, charges, sent_at, first_sent_at, failure, stored in rows:
        sent = first_sent_at or sent_at
        body = as_text(stored)
        if receives >= MAX_RECEIVES and queue.dead in session.queues:
            burial = Burial(body=body, group=group or str(seq), charges=charges, sent_at=sent, source=queue.name)
            _move(session, session.queues[queue.dead], seq, burial, now)
            continue
        delivery = receives + 1
        seqs.append(seq)
        why = as_text(failure)
        handle = Handle(queue.name, f"{seq}-{delivery}", f"{session.token}-{seq}")
        taken.append(Received(handle, body, delivery, charges, group, sent / 1000 + epoch, why))
    session.each(sql.TAKE, seqs, until)


def _move(session: Session, dead: Queue, seq: int, burial: Burial, now: int) -> None:
    sqlite_keys.end_stream(session, seq, now)
    session.each(sql.DELETE, [seq])
    sqlite_leases.bury(session, dead, burial, now)
