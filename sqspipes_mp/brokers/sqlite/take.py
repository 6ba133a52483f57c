"""Receiving: which messages a receive gets."""

import time
from collections.abc import Sequence

from sqspipes_mp.brokers.base import Handle, Received
from sqspipes_mp.brokers.sqlite.program import Program, Step, row
from sqspipes_mp.brokers.sqlite.session import Session, as_text

#: The bodies are read afterwards, as those of messages that are ours now: one purged meanwhile is missing.
_TAKEN = """SELECT t.seq, t.receives, t.charges, t.sent_at, t.grp, t.failure, m.body, t.queue, t.moved
    FROM taken AS t LEFT JOIN messages AS m ON m.seq = t.seq ORDER BY t.rowid"""


def take(session: Session, names: Sequence[str], limit: int, visibility: float) -> tuple[list[Received], bool]:
    """Take up to ``limit`` messages, from the first queue on; hide them for ``visibility`` seconds.

    Returns them, and whether others were moved to a dead-letter queue.
    """
    rows = []
    for name in names:
        queue = session.queue(name)
        dead = session.queues.get(queue.dead or "")
        rows.append(
            row(
                Step.TAKE,
                queue=queue.id,
                fifo=queue.fifo,
                millis=int(visibility * 1000),
                number=limit,
                seq=dead.id if dead else None,
                receives=bool(dead and dead.fifo),
            )
        )
    now = session.run(Program.TAKE, rows)
    # Times are handed out on the wall clock; the file keeps them on its own.
    epoch = time.time() - session.now() / 1000
    leased_at = session.leased(now)
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
        name = as_text(group)
        taken.append(
            Received(handle, as_text(stored), delivery, charges, name, sent, as_text(failure), leased_at=leased_at)
        )
    session.db.execute("DELETE FROM taken")
    return taken, moved
