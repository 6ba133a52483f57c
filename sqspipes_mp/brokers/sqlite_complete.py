"""Sending outputs and deleting their inputs, all at once or not at all (inside a write transaction)."""

from collections.abc import Sequence
from itertools import chain

from sqspipes_mp.brokers import sqlite_groups, sqlite_keys, sqlite_leases
from sqspipes_mp.brokers import sqlite_schema as sql
from sqspipes_mp.brokers.base import Completion, Handle, Output
from sqspipes_mp.brokers.sqlite_leases import Lease
from sqspipes_mp.brokers.sqlite_session import Queue, Session

#: Expired hop ids forgotten for each one recorded: more than one, so that they cannot pile up.
_SWEEP = 2

Row = tuple[int, int, int, int, int | None, str]


def complete(session: Session, completions: Sequence[Completion]) -> list[Handle]:
    """Send and delete; nothing is sent for a stale receipt, nor for what follows it in its FIFO group. Returns both."""
    now = session.now()
    strays: dict[Handle, int] = {}
    leases = sqlite_leases.find(session, [completion.input for completion in completions if completion.input], strays)
    held_up: set[int | None] = set()
    stale: dict[Handle, None] = {}
    done: list[Lease] = []
    rows: list[Row] = []
    keyed = 0
    for completion in completions:
        lease = None
        handle = completion.input
        if handle is not None:
            lease = leases.get(handle)
            if handle in strays:
                held_up.add(strays[handle])
            if lease is None or lease.group in held_up:
                stale[handle] = None
                continue
            if not (completion.last or lease.streamed):
                sqlite_keys.start_stream(session, lease.seq, lease.queue.id)
                lease.streamed = True
        for output in completion.outputs:
            queue = session.queue(output.queue)
            if lease is None or lease.streamed or queue.fifo:
                keyed += 1
                if not _is_new(session, queue, output, lease, now, again=completion.again):
                    continue
            rows.append(_row(session, queue, output, now))
        if handle is not None and lease is not None and completion.last:
            done.append(leases.pop(handle))
    if rows:
        _send(session, rows)
    if done:
        sqlite_leases.remove(session, done, now)
    if keyed:
        sqlite_keys.sweep(session, now, _SWEEP * keyed)
    return list(stale)


def feed(session: Session, outputs: Sequence[Output], *, keyed: bool) -> list[int]:
    """Send what has no input; a hop id that is ``keyed`` is remembered until its queue is purged."""
    now = session.now()
    rows: list[Row] = []
    seen: list[int] = []
    for place, output in enumerate(outputs):
        queue = session.queue(output.queue)
        if keyed and not sqlite_keys.remember(session, queue.id, output.hop, None, None, now):
            seen.append(place)
        else:
            rows.append(_row(session, queue, output, now))
    if rows:
        _send(session, rows)
    return seen


def _send(session: Session, rows: Sequence[Row]) -> None:
    for start in range(0, len(rows), sql.AT_ONCE):
        some = rows[start : start + sql.AT_ONCE]
        session.db.execute(sql.send(len(some)), tuple(chain.from_iterable(some)))
    session.ring = True


def _is_new(session: Session, queue: Queue, output: Output, lease: Lease | None, now: int, *, again: bool) -> bool:
    if lease is not None and lease.streamed:
        return sqlite_keys.remember(session, queue.id, output.hop, lease.seq, None, now)
    expires = now + (sqlite_keys.AGAIN if again else sqlite_keys.WINDOW)
    return sqlite_keys.remember(session, queue.id, output.hop, None, expires, now)


def _row(session: Session, queue: Queue, output: Output, now: int) -> Row:
    seq = session.next_seq
    session.next_seq = seq + 1
    visible_at = now + int(output.delay * 1000) if output.delay else now
    # SQS refuses a FIFO send without a group; a group of its own serves such a message best.
    group = sqlite_groups.join(session, queue.id, output.group or output.hop, seq, visible_at) if queue.fifo else None
    return seq, queue.id, visible_at, now, group, output.body
