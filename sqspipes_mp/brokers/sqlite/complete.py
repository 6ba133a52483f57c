"""Sending outputs and deleting their inputs, all at once or not at all."""

from collections.abc import Collection, Iterable, Sequence

from sqspipes_mp.brokers.base import Completion, Handle, Output
from sqspipes_mp.brokers.sqlite import leases as sqlite_leases
from sqspipes_mp.brokers.sqlite import schema as sql
from sqspipes_mp.brokers.sqlite.program import Key, Program, Row, Step, row
from sqspipes_mp.brokers.sqlite.session import Session

_FRESH = "SELECT place FROM leases WHERE fresh"


def size(completion: Completion) -> int:
    """Return the characters of the bodies it sends."""
    return sum(len(output.body) for output in completion.outputs)


def complete(session: Session, completions: Sequence[Completion], held_up: Sequence[Handle] = ()) -> list[Handle]:
    """Send and delete; nothing is sent for a stale receipt, nor for what follows it in its FIFO group. Returns both.

    ``held_up``: what was found stale just before; its group is not known any more, so its FIFO queue waits.
    """
    closed = {handle.queue for handle in held_up if handle.queue.endswith(".fifo")}
    behind = [each.input for each in completions if each.input and each.input.queue in closed]
    if behind:
        completions = [each for each in completions if each.input not in behind]
    plain = _plain(session, completions)
    if plain is None or not session.pass_on(plain):
        _run(session, completions)
    found = sqlite_leases.found(session)
    handles = {place: completion.input for place, completion in enumerate(completions)}
    stale = [handle for place, handle in handles.items() if handle and place not in found]
    return list(dict.fromkeys([*behind, *stale]))


def _plain(session: Session, completions: Sequence[Completion]) -> list[Row] | None:
    """Return the rows of ``pass``, if these completions are of the kind that it serves."""
    rows: list[Row] = []
    seen: set[int] = set()
    sent = 0
    for place, completion in enumerate(completions):
        known = completion.last and completion.input and sqlite_leases.parse(session, completion.input)
        if not known or known[0] in seen or known[2].fifo:
            return None
        seq, receives, queue = known
        seen.add(seq)
        if not completion.outputs:
            rows.append((place, seq, receives, queue.id, None, 0, 0, None))
        for output in completion.outputs:
            target = session.queue(output.queue)
            if target.fifo:
                return None
            rows.append((place, seq, receives, queue.id, target.id, int(output.delay * 1000), sent, output.body))
            sent += 1
    return rows


def _run(session: Session, completions: Sequence[Completion]) -> None:
    rows: list[Row] = []
    sent = 0
    for place, completion in enumerate(completions):
        handle = completion.input
        if handle is None:
            rows.append(row(Step.SOURCE, place))
        else:
            rows += sqlite_leases.find(session, place, handle, in_order=True)
            if not completion.last:
                rows.append(row(Step.STREAM, place))
        key = Key.AGAIN if completion.again else Key.WINDOW
        for output in completion.outputs:
            rows.append(_send(session, place, output, sent, key))
            sent += 1
        if handle is not None and completion.last:
            rows.append(row(Step.REMOVE, place))
    rows.append(row(Step.CLOSE, number=sent))
    session.run(Program.COMPLETE, rows)


def feed(session: Session, outputs: Sequence[Output], *, keyed: bool) -> list[int]:
    """Send what has no input; a hop id that is ``keyed`` is remembered until its queue is purged."""
    rows: list[Row] = []
    key = Key.FOREVER if keyed else Key.NONE
    for place, output in enumerate(outputs):
        rows += (row(Step.SOURCE, place), _send(session, place, output, place, key))
    rows.append(row(Step.CLOSE, number=len(outputs)))
    session.run(Program.COMPLETE, rows)
    fresh = {place for (place,) in session.db.execute(_FRESH)}
    return [place for place in range(len(outputs)) if place not in fresh]


def keyed(session: Session, queues: Collection[str], hops: Iterable[str]) -> set[str]:
    """Return those of the hop ids that were fed to one of the queues with a key."""
    session.refresh()
    numbers = [session.queues[name].id for name in queues if name in session.queues]
    return {hop for hop in hops if any(session.db.execute(sql.KEYED, (number, hop)).fetchone() for number in numbers)}


def _send(session: Session, place: int, output: Output, number: int, key: Key) -> Row:
    queue = session.queue(output.queue)
    return row(
        Step.OUTPUT,
        place,
        queue=queue.id,
        fifo=queue.fifo,
        flag=key,
        millis=int(output.delay * 1000) if output.delay else 0,
        number=number,
        hop=output.hop,
        # SQS refuses a FIFO send without a group; a group of its own serves such a message best.
        grp=(output.group or output.hop) if queue.fifo else None,
        body=output.body,
    )
