"""Outputs sent and their inputs deleted in one transaction (any process that has the file open).

Most messages are on standard queues, come once and have few outputs: ``pass_on`` moves them by sets. Everything else
takes the steps of ``Program.COMPLETE``, one by one.
"""

from collections.abc import Iterable, Sequence

from sqspipes_mp.brokers.base import Completion, Handle, Output
from sqspipes_mp.brokers.sqlite.deliveries import end_steps, find_step, found_places
from sqspipes_mp.brokers.sqlite.queues import with_tenants
from sqspipes_mp.brokers.sqlite.session import Session
from sqspipes_mp.brokers.sqlite.transactions import Key, Program, Row, Step, row

_FRESH = "SELECT place FROM leases WHERE fresh"


def sizes(completions: Sequence[Completion]) -> list[int]:
    """Return the characters of all bodies that each completion sends, and of the results that it keeps."""
    found = []
    for completion in completions:
        size = 0
        for output in completion.outputs:
            size += len(output.body)
        if completion.end is not None:
            size += sum(map(len, completion.end.results))
        found.append(size)
    return found


def rings(completions: Sequence[Completion]) -> bool:
    """Tell whether receivers are woken: for a send, and for a delete that may let a FIFO group go on."""
    for completion in completions:
        if completion.outputs or (completion.input is not None and completion.input.queue.endswith(".fifo")):
            return True
    return False


def complete(session: Session, completions: Sequence[Completion], held_up: Sequence[Handle] = ()) -> list[Handle]:
    """Send outputs, delete inputs; returns the stale handles.

    A completion with a stale receipt is left undone, and so are later ones of its FIFO group: they count as stale.
    ``held_up``: handles found stale by the transaction before. Their groups are not known any more, so every
    completion of their FIFO queues counts as stale.
    """
    closed = {handle.queue for handle in held_up if handle.queue.endswith(".fifo")}
    behind = [each.input for each in completions if each.input and each.input.queue in closed]
    if behind:
        completions = [each for each in completions if each.input not in behind]
    rows = _rows_to_pass(session, completions)
    if rows is None or not session.pass_on(rows):
        _run_steps(session, completions)
    found = found_places(session)
    handles = {place: completion.input for place, completion in enumerate(completions)}
    stale = [handle for place, handle in handles.items() if handle and place not in found]
    return list(dict.fromkeys([*behind, *stale]))


def _rows_to_pass(session: Session, completions: Sequence[Completion]) -> list[Row] | None:
    """Return the rows for ``pass_on``; None where a completion needs ``Program.COMPLETE``.

    Those are completions of a FIFO queue, without an input, with more outputs to come, with an end, or with a receipt
    that is invalid or that an earlier completion has.
    """
    rows: list[Row] = []
    seen: set[int] = set()
    sent = 0
    for place, completion in enumerate(completions):
        known = completion.last and completion.input and session.receipt(completion.input)
        if not known or known[0] in seen or known[2].kind or completion.end is not None:
            return None
        seq, receives, queue = known
        seen.add(seq)
        if not completion.outputs:
            rows.append((place, seq, receives, queue.id, None, 0, 0, None))
        for output in completion.outputs:
            target = session.queues.get(output.queue) or session.queue(output.queue)
            if target.kind or output.group is not None:
                return None
            rows.append((place, seq, receives, queue.id, target.id, int(output.delay * 1000), sent, output.body))
            sent += 1
    return rows


def _run_steps(session: Session, completions: Sequence[Completion]) -> None:
    """Run ``Program.COMPLETE`` over the completions."""
    _mind_tenants(session, (output for completion in completions for output in completion.outputs))
    rows: list[Row] = []
    sent = 0
    for place, completion in enumerate(completions):
        handle = completion.input
        if handle is None:
            rows.append(row(Step.SOURCE, place))
        else:
            rows += find_step(session, place, handle, in_order=True)
            if not completion.last:
                rows.append(row(Step.STREAM, place))
        key = Key.AGAIN if completion.again else Key.WINDOW
        goes_on = False
        for output in completion.outputs:
            goes_on = output is completion.outputs[-1] and completion.last and output.queue == (handle and handle.queue)
            rows.append(_output_step(session, place, output, sent, Key.CONTINUES if goes_on else key))
            sent += 1
        if completion.end is not None:
            ends = end_steps(session, place, completion.end, sent)
            rows += ends
            sent += len(ends)
        if handle is not None and completion.last:
            rows.append(row(Step.REMOVE, place, flag=goes_on))
    rows.append(row(Step.CLOSE, number=sent))
    session.run(Program.COMPLETE, rows)


def feed(session: Session, outputs: Sequence[Output], *, keyed: bool) -> list[int]:
    """Send messages that have no input; returns the places of those whose hop id was known, which were dropped.

    ``keyed``: the hop ids are remembered until their queue is purged, and only then are any known.
    """
    _mind_tenants(session, outputs)
    rows: list[Row] = []
    key = Key.FOREVER if keyed else Key.NONE
    if keyed:
        rows += [row(Step.KEYED, queue=session.queue(name).id) for name in {output.queue for output in outputs}]
    for place, output in enumerate(outputs):
        rows += (row(Step.SOURCE, place), _output_step(session, place, output, place, key))
    rows.append(row(Step.CLOSE, number=len(outputs)))
    session.run(Program.COMPLETE, rows)
    fresh = {place for (place,) in session.db.execute(_FRESH)}
    return [place for place in range(len(outputs)) if place not in fresh]


def _mind_tenants(session: Session, outputs: Iterable[Output]) -> None:
    """Have the tenants of each standard queue take turns that is sent a message with a tenant."""
    with_tenants(session, [output.queue for output in outputs if output.group is not None])


def _output_step(session: Session, place: int, output: Output, number: int, key: Key) -> Row:
    """Return the step that sends an output; ``number``: of the message in this call."""
    queue = session.queue(output.queue)
    return row(
        Step.OUTPUT,
        place,
        queue=queue.id,
        fifo=queue.kind,
        flag=key,
        millis=int(output.delay * 1000) if output.delay else 0,
        number=number,
        hop=output.hop,
        # SQS refuses a FIFO message without a group. Here it gets a group of its own: its hop id.
        grp=(output.group or output.hop) if queue.fifo else output.group or "" if queue.tenants else None,
        body=output.body,
    )
