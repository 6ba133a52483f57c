"""Deduplication: which hop ids were accepted before, and for how long that is remembered.

Runs inside a write transaction. A hop id sent while its input stays (a stream) lives as long as that input, then five
minutes, like SQS's window; one sent without an input lives for five minutes, too, unless it may come ``again``: then
for 14 days, longer than any run of a generator takes to be restarted. What is sent in the transaction that deletes its
input needs no key, except on FIFO queues, whose window users may count on.
"""

from collections.abc import Collection, Iterable

from sqspipes_mp.brokers import sqlite_schema as sql
from sqspipes_mp.brokers.sqlite_session import Session

#: Milliseconds a hop id is remembered after its input is gone: SQS's deduplication interval (Amazon SQS Developer
#: Guide, "Exactly-once processing in Amazon SQS").
WINDOW = 300_000
#: Milliseconds a hop id that may come again is remembered.
AGAIN = 14 * 86_400_000


def remember(session: Session, queue: int, hop: str, stream: int | None, expires: int | None, now: int) -> bool:
    """Record a hop id; False if it is a duplicate. Either ``stream`` (its input's seq) or ``expires`` is given."""
    return session.db.execute(sql.REMEMBER, (queue, hop, stream, expires, now, now)).rowcount == 1


def keyed(session: Session, queues: Collection[str], hops: Iterable[str]) -> set[str]:
    """Return those of the hop ids that were fed to one of the queues with a key."""
    session.refresh()
    numbers = [session.queues[name].id for name in queues if name in session.queues]
    return {hop for hop in hops if any(session.db.execute(sql.KEYED, (number, hop)).fetchone() for number in numbers)}


def start_stream(session: Session, seq: int, queue: int) -> None:
    """Note that an input's outputs come in several calls."""
    session.db.execute(sql.START_STREAM, (seq, queue))
    session.db.execute(sql.MARK_STREAMED, (seq,))


def end_stream(session: Session, seq: int, now: int) -> None:
    """Note that such an input is gone."""
    session.db.execute(sql.END_STREAM, (now + WINDOW, seq))


def sweep(session: Session, now: int, limit: int) -> None:
    """Forget up to ``limit`` expired hop ids of each kind."""
    _forget(session, sql.EXPIRED_KEYS, now, limit)
    while limit > 0:
        ended = session.db.execute(sql.ENDED_STREAM, (now,)).fetchone()
        if ended is None:
            break
        forgotten = _forget(session, sql.STREAM_KEYS, ended[0], limit)
        if forgotten < limit:
            session.db.execute(sql.DROP_STREAM, ended)
        limit -= forgotten + 1


def forget_queue(session: Session, queue: int, limit: int) -> int:
    """Forget up to ``limit`` hop ids of a queue; returns how many."""
    return _forget(session, sql.QUEUE_KEYS, queue, limit)


def _forget(session: Session, which: str, value: int, limit: int) -> int:
    keys = session.db.execute(which, (value, limit)).fetchall()
    session.db.executemany(sql.FORGET, keys)
    return len(keys)
