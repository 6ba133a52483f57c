"""Deliveries and their receipts: find, extend, dead-letter.

A receipt is ``seq-receives``: it is current until the message is received again or deleted. On standard queues its
visibility may have ended meanwhile, on FIFO queues it may not, both as on SQS.
"""

from collections.abc import Sequence

from sqspipes_mp.brokers.base import DeadLetter, Handle
from sqspipes_mp.brokers.sqlite.program import Program, Row, Step, row
from sqspipes_mp.brokers.sqlite.session import Queue, Session
from sqspipes_mp.messages.ids import moved_id

_FOUND = "SELECT place FROM leases WHERE seq IS NOT NULL"


def parse(session: Session, handle: Handle) -> tuple[int, int, Queue] | None:
    """Return number, delivery and queue of a receipt; None for one that was never given."""
    number, _, delivery = handle.receipt.partition("-")
    queue = session.queues.get(handle.queue)
    if queue is None or not (number.isdecimal() and delivery.isdecimal() and delivery != "0"):
        return None
    return int(number), int(delivery), queue


def find(session: Session, place: int, handle: Handle, *, in_order: bool = False) -> list[Row]:
    """Return the step that finds the message behind a receipt; none for a receipt never given.

    ``in_order``: not if an earlier one of these steps found its FIFO group to be somebody else's by now.
    """
    known = parse(session, handle)
    if known is None:
        return []
    seq, receives, queue = known
    return [row(Step.FIND, place, queue=queue.id, fifo=queue.fifo, seq=seq, receives=receives, flag=in_order)]


def found(session: Session) -> set[int]:
    """Return the places whose receipts were current."""
    return {place for (place,) in session.db.execute(_FOUND)}


def extend(session: Session, handles: Sequence[Handle], seconds: float, *, attempts: int) -> list[Handle]:
    """Hide deliveries for ``seconds`` from now; returns the stale ones."""
    rows: list[Row] = []
    for place, handle in enumerate(handles):
        rows += find(session, place, handle)
        rows.append(row(Step.EXTEND, place, millis=int(seconds * 1000), number=attempts))
    session.run(Program.EXTEND, [*rows, row(Step.CLOSE)])
    current = found(session)
    return [handle for place, handle in enumerate(handles) if place not in current]


def dead_letter(session: Session, letters: Sequence[DeadLetter]) -> list[Handle]:
    """Move deliveries to their dead-letter queues; returns the stale ones."""
    rows: list[Row] = []
    for place, letter in enumerate(letters):
        dead = session.queue(letter.queue)
        hop = moved_id(letter.hop, "dead", letter.handle.message_id)
        rows += find(session, place, letter.handle)
        rows.append(
            row(
                Step.BURY,
                place,
                queue=dead.id,
                fifo=dead.fifo,
                number=place,
                hop=hop,
                grp=letter.group or hop,
                # Others' ids may hold lone surrogates, which SQLite does not store.
                origin=letter.hop.encode("utf-8", "backslashreplace").decode(),
                source=letter.handle.queue,
                failure=letter.failure,
                body=letter.body,
            )
        )
    session.run(Program.MOVE, [*rows, row(Step.CLOSE, number=len(letters))])
    current = found(session)
    return [letter.handle for place, letter in enumerate(letters) if place not in current]
