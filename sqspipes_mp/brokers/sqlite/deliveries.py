"""Deliveries and their receipts: receive, find again, extend, dead-letter (any process that has the file open).

A receipt is ``seq-receives``: the message's number and the number of the delivery. It is current until the message is
received again or deleted. On standard queues it stays current after the visibility timeout has ended, on FIFO queues
it does not, both as on SQS.
"""

import time
from collections.abc import Sequence

from sqspipes_mp.brokers.base import DeadLetter, End, Handle, Received
from sqspipes_mp.brokers.sqlite.queues import with_tenants
from sqspipes_mp.brokers.sqlite.session import Session, as_text
from sqspipes_mp.brokers.sqlite.transactions import Program, Row, Step, row
from sqspipes_mp.messages.ids import moved_id

#: The bodies are read after the transaction: a message purged in between has none (NULL).
_TAKEN = """SELECT t.seq, t.receives, t.charges, t.sent_at, t.grp, t.failure, m.body, t.queue, t.moved
    FROM taken AS t LEFT JOIN messages AS m ON m.seq = t.seq ORDER BY t.rowid"""
_FOUND = "SELECT place FROM leases WHERE seq IS NOT NULL"


def take_messages(session: Session, names: Sequence[str], limit: int, visibility: float) -> tuple[list[Received], bool]:
    """Receive up to ``limit`` messages, from the first queue on; hide them for ``visibility`` seconds.

    Returns the deliveries, and whether a message moved to its dead-letter queue for having been received too often.
    """
    rows = []
    for name in names:
        queue = session.queue(name)
        dead = session.queues.get(queue.dead or "")
        rows.append(
            row(
                Step.TAKE,
                queue=queue.id,
                fifo=queue.kind,
                millis=int(visibility * 1000),
                number=limit,
                seq=dead.id if dead else None,
                receives=dead.kind if dead else 0,
            )
        )
    now = session.run(Program.TAKE, rows)
    # The file's times are on its own clock; a delivery shows them on the wall clock.
    epoch = time.time() - session.now() / 1000
    leased_at = session.to_lease_clock(now)
    taken: list[Received] = []
    moved = False
    for seq, receives, charges, sent_at, group, failure, stored, queue_id, is_moved in session.db.execute(_TAKEN):
        if is_moved:
            moved = True
            continue
        if stored is None:
            continue
        delivery = receives + 1
        handle = Handle(session.by_id[queue_id].name, f"{seq}-{delivery}", f"{session.token}-{seq}")
        sent = sent_at / 1000 + epoch
        body = stored if isinstance(stored, str) else as_text(stored)
        tag = None if group is None else as_text(group)
        reason = None if failure is None else as_text(failure)
        taken.append(Received(handle, body, delivery, charges, tag, sent, reason, leased_at=leased_at))
    session.db.execute("DELETE FROM taken")
    return taken, moved


def find_step(session: Session, place: int, handle: Handle, *, in_order: bool = False) -> list[Row]:
    """Return the step that finds a receipt's message as number ``place``; no step for a receipt that was never given.

    ``in_order``: the step finds nothing once an earlier step of the call met a stale receipt of the same FIFO group.
    """
    known = session.receipt(handle)
    if known is None:
        return []
    seq, receives, queue = known
    return [row(Step.FIND, place, queue=queue.id, fifo=queue.fifo, seq=seq, receives=receives, flag=in_order)]


def end_steps(session: Session, place: int, end: End, number: int) -> list[Row]:
    """Return the steps that record an end for place ``place``, numbered from ``number``; none without its queue."""
    queue = session.queues.get(end.queue)
    if queue is None:
        # Deleted meanwhile, and the value's key with it.
        return []
    texts: Sequence[str | None] = end.results or (None,)
    return [
        row(Step.END, place, queue=queue.id, hop=end.token, number=number + index, flag=end.kept, body=text)
        for index, text in enumerate(texts)
    ]


def found_places(session: Session) -> set[int]:
    """Return the places of the last call whose receipts were current."""
    return {place for (place,) in session.db.execute(_FOUND)}


def extend(session: Session, handles: Sequence[Handle], seconds: float, *, attempts: int) -> list[Handle]:
    """Hide deliveries for ``seconds`` from now; returns the stale handles.

    ``attempts``: failed attempts so far, noted in the row; a smaller number than the noted one changes nothing.
    """
    rows: list[Row] = []
    for place, handle in enumerate(handles):
        rows += find_step(session, place, handle)
        rows.append(row(Step.EXTEND, place, millis=int(seconds * 1000), number=attempts))
    session.run(Program.EXTEND, [*rows, row(Step.CLOSE)])
    current = found_places(session)
    return [handle for place, handle in enumerate(handles) if place not in current]


def dead_letter(session: Session, letters: Sequence[DeadLetter]) -> list[Handle]:
    """Move deliveries to their dead-letter queues; returns the stale handles."""
    with_tenants(session, [each.queue for each in letters if each.group is not None])
    rows: list[Row] = []
    number = len(letters)
    for place, letter in enumerate(letters):
        dead = session.queue(letter.queue)
        hop = moved_id(letter.hop, "dead", letter.handle.message_id)
        rows += find_step(session, place, letter.handle)
        if letter.end is not None:
            ends = end_steps(session, place, letter.end, number)
            rows += ends
            number += len(ends)
        rows.append(
            row(
                Step.DEAD_LETTER,
                place,
                queue=dead.id,
                fifo=dead.kind,
                number=place,
                hop=hop,
                grp=(letter.group or "") if dead.tenants else letter.group or hop,
                # Another sender's id may hold lone surrogates, which SQLite does not store.
                origin=letter.hop.encode("utf-8", "backslashreplace").decode(),
                source=letter.handle.queue,
                failure=letter.failure,
                body=letter.body,
            )
        )
    session.run(Program.MOVE, [*rows, row(Step.CLOSE, number=number)])
    current = found_places(session)
    return [letter.handle for place, letter in enumerate(letters) if place not in current]
