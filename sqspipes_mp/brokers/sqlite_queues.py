"""Queues as a whole: create, compare, count, purge, delete, and clearing away what is past its time (any process)."""

from collections.abc import Sequence

from sqspipes_mp.brokers import sqlite_groups, sqlite_keys, sqlite_owners
from sqspipes_mp.brokers import sqlite_schema as sql
from sqspipes_mp.brokers.base import Depth, QueueSpec
from sqspipes_mp.brokers.sqlite_session import Session, as_text
from sqspipes_mp.errors import BrokerError, QueueMissing

#: Milliseconds a message is kept: SQS's longest retention (Amazon SQS API Reference, CreateQueue).
RETENTION = 14 * 86_400_000
#: Rows cleared away in one transaction, so that others get their turn within milliseconds.
CHUNK = 2_000
_OLDEST = 100


def missing(session: Session, specs: Sequence[QueueSpec]) -> list[QueueSpec]:
    """Return the queues that the file does not have; raise ``BrokerError`` for one of the other type."""
    for spec in specs:
        found = session.queues.get(spec.name)
        if found is not None and found.fifo != spec.fifo:
            raise BrokerError(
                f"queue {spec.name!r} is a {_type(found.fifo)} queue, the pipeline needs a {_type(spec.fifo)} one. "
                "Delete it, or use another domain"
            )
    return [spec for spec in specs if spec.name not in session.queues]


def _type(fifo: bool) -> str:
    return "FIFO" if fifo else "standard"


def create(session: Session, specs: Sequence[QueueSpec]) -> None:
    """Create the queues the file does not have (inside a write transaction)."""
    now = session.now()
    for spec in missing(session, specs):
        if not spec.owned:
            raise QueueMissing(spec.name, "It is not the pipeline's own, so it is never created here: create it first")
        row = (session.changed(), spec.name, spec.fifo, spec.visibility, spec.dead, now, RETENTION)
        session.db.execute(sql.CREATE_QUEUE, row)
    session.reload()


def differences(session: Session, spec: QueueSpec) -> list[str]:
    """Return, in words, in what an existing queue differs from what the pipeline would have created."""
    found = session.queues[spec.name]
    texts = []
    if found.visibility != spec.visibility:
        texts.append(f"its visibility timeout is {found.visibility:g} s, not {spec.visibility:g} s")
    if found.dead != spec.dead:
        texts.append(f"its dead-letter queue is {found.dead}, not {spec.dead}")
    return texts


def depth(session: Session, name: str) -> Depth:
    """Count one queue exactly: one step per message through an index, no message is read but those hidden now."""
    session.refresh()
    queue, now = session.queue(name), session.now()
    # One snapshot: a message given back between the two would be missed by both.
    session.db.execute("BEGIN")
    try:
        (visible,) = session.db.execute(sql.COUNT_VISIBLE, (queue.id, now)).fetchone()
        hidden, in_flight = session.db.execute(sql.COUNT_HIDDEN, (queue.id, now)).fetchone()
    finally:
        session.db.execute("COMMIT")
    return Depth(visible, in_flight, hidden - in_flight)


def bodies(session: Session, name: str) -> list[tuple[str, str, str | None]]:
    """Return body, message id and text of the failure attribute of every message of a queue."""
    session.refresh()
    rows = session.db.execute(sql.BODIES, (session.queue(name).id,)).fetchall()
    return [(as_text(body), str(seq), as_text(failure)) for body, seq, failure in rows]


def existing(session: Session, name: str) -> str:
    """Return the name of a queue that exists. Raises ``QueueMissing``."""
    session.refresh()
    return session.queue(name).name


def empty(session: Session, names: Sequence[str], *, delete: bool) -> None:
    """Empty queues at once, keys included, by giving them a new number (inside a write transaction).

    The rows under the old one are garbage, which ``clear`` removes piece by piece, in whichever process.
    """
    expires = session.now() + sqlite_keys.WINDOW
    for name in names:
        queue = session.queues.get(name)
        if queue is None:
            continue
        number = session.changed()
        if delete:
            sqlite_owners.forget(session, name)
            session.db.execute(sql.DELETE_QUEUE, (queue.id,))
        else:
            session.db.execute(sql.RENUMBER_QUEUE, (number, queue.id))
        session.db.execute(sql.END_STREAMS, (expires, queue.id))
        session.db.execute(sql.ADD_GARBAGE, (queue.id,))
    session.reload()


def clear(session: Session) -> bool:
    """Remove a piece of the garbage; False when there is none (inside a write transaction)."""
    row = session.db.execute(sql.GARBAGE).fetchone()
    if row is None:
        return False
    for statement in (sql.SWEEP_MESSAGES, sql.SWEEP_GROUPS):
        if session.db.execute(statement, (row[0], CHUNK)).rowcount:
            return True
    if sqlite_keys.forget_queue(session, row[0], CHUNK):
        return True
    session.db.execute(sql.DROP_GARBAGE, row)
    return True


def tidy(session: Session) -> None:
    """Clear away a bounded amount of whatever is past its time (inside a write transaction)."""
    now = session.now()
    session.db.execute(sql.TICK, (now, session.boot))
    sqlite_keys.sweep(session, now, CHUNK)
    clear(session)
    for seq, queue_id, group, streamed, sent_at, visible_at, receives in session.db.execute(
        sql.OLDEST, (_OLDEST,)
    ).fetchall():
        queue = session.by_id.get(queue_id)
        if now - sent_at < (queue.retention if queue else RETENTION):
            break
        if receives and visible_at > now:
            continue
        session.each(sql.DELETE, [seq])
        if streamed:
            sqlite_keys.end_stream(session, seq, now)
        if group is not None:
            sqlite_groups.settle(session, [group])
