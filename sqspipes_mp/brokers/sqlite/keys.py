"""The user's keys in the file, and the ends of their values (any process; only ``forget_results`` writes)."""

import time
from collections.abc import Iterable, Sequence
from contextlib import closing

from sqspipes_mp.brokers.base import Ended
from sqspipes_mp.brokers.sqlite import schema as sql
from sqspipes_mp.brokers.sqlite.session import Session

#: Results of one value that are read at once with its end, and characters of all of them.
_FIRST, _AT_ONCE = 16, 1 << 20
_NO_RESULT = Ended((), more=False)


def keyed(session: Session, queues: Iterable[str], hops: Iterable[str]) -> set[str]:
    """Return the hop ids that were fed with a key to one of the queues."""
    numbers = [number for name in queues for number in _numbers(session, name)]
    return {hop for hop in hops if any(session.db.execute(sql.KEYED, (number, hop)).fetchone() for number in numbers)}


def keys(session: Session, name: str) -> tuple[int, float | None]:
    """Return the number of a queue's keys, and the epoch seconds of the first; None where there is none."""
    for number in _numbers(session, name):
        count: int = session.db.execute(sql.KEYS, (number,)).fetchone()[0]
        since = session.db.execute(sql.KEYED_SINCE, (number,)).fetchone()
        if count and since and since[0] is not None:
            return count, time.time() - (session.now() - since[0]) / 1000
        return count, None
    return 0, None


def next_end(session: Session) -> int:
    """Return the number that the next message, or end, will have."""
    number: int = session.db.execute(sql.NEXT_SEQ).fetchone()[0]
    return number


def ended(session: Session, name: str, tokens: Sequence[str], before: int, *, kept: bool) -> dict[str, Ended]:
    """Return the values with such an end, and the first of their results numbered below ``before``."""
    found: dict[str, Ended] = {}
    room = _AT_ONCE
    for number in _numbers(session, name):
        for token in tokens:
            first: list[tuple[int, str]] = []
            more = False
            with closing(session.db.execute(sql.ENDED, (number, token, kept))) as rows:
                for seq, text in rows:
                    found[token] = _NO_RESULT
                    if seq >= before:
                        break
                    if text is not None:
                        if more := room <= 0 or len(first) >= _FIRST:
                            break
                        first.append((seq, text))
                        room -= len(text)
            if first or more:
                found[token] = Ended(tuple(first), more)
    return found


def unended(session: Session, name: str) -> set[str]:
    """Return the hop ids of a queue's keys whose values have no end."""
    return {hop for number in _numbers(session, name) for (hop,) in session.db.execute(sql.UNENDED, (number,))}


def results(
    session: Session, name: str, token: str, after: int, before: int, most: int, *, kept: bool
) -> list[tuple[int, str]]:
    """Return up to ``most`` results of a value, and their numbers: above ``after``, below ``before``."""
    for number in _numbers(session, name):
        return session.db.execute(sql.RESULTS, (number, token, kept, after, before, most)).fetchall()
    return []


def forget_results(session: Session, name: str, token: str, last: int) -> None:
    """Remove a value's results up to the number ``last`` that are not kept."""
    for number in _numbers(session, name):
        session.db.execute(sql.FORGET_RESULTS, (number, token, last))


def _numbers(session: Session, name: str) -> list[int]:
    """Return a queue's number, as a list that is empty where there is no such queue."""
    session.refresh()
    queue = session.queues.get(name)
    return [] if queue is None else [queue.id]
