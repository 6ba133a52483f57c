"""Queues in the file: create, compare, count, purge, delete; and the removal of expired rows (any process)."""

from collections.abc import Iterable, Sequence

from sqspipes_mp.brokers.base import Depth, QueueSpec
from sqspipes_mp.brokers.sqlite import schema as sql
from sqspipes_mp.brokers.sqlite import transactions as sqlite_program
from sqspipes_mp.brokers.sqlite.session import Session, as_text
from sqspipes_mp.brokers.sqlite.transactions import Program, Step, row
from sqspipes_mp.errors import BrokerError, QueueMissing

#: Most rows removed in one transaction, so that other processes get the write lock within milliseconds.
CHUNK = 2_000


def missing(session: Session, specs: Sequence[QueueSpec]) -> list[QueueSpec]:
    """Return the queues that the file does not have. Raises ``BrokerError`` for a queue of the other type."""
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
    """Create the queues that the file does not have. Raises ``QueueMissing`` for a queue of others."""
    rows = []
    for spec in missing(session, specs):
        if not spec.owned:
            raise QueueMissing(spec.name, "It is not the pipeline's own, so it is never created here: create it first")
        rows.append(row(Step.CREATE, hop=spec.name, grp=spec.dead, body=spec.visibility, fifo=spec.fifo))
    if rows:
        session.run(Program.TEND, [*rows, row(Step.CLOSE)])


def with_tenants(session: Session, names: Iterable[str]) -> None:
    """Have the messages of standard queues take turns by tenant from now on."""
    plain = [queue for queue in map(session.queue, dict.fromkeys(names)) if not queue.kind]
    if plain:
        session.db.execute(sql.CREATE_TENANT)
        session.run(Program.TEND, [*(row(Step.TENANTS, queue=queue.id) for queue in plain), row(Step.CLOSE)])
        session.refresh()


def differences(session: Session, spec: QueueSpec) -> list[str]:
    """Return one text for each attribute of an existing queue that the pipeline would have set otherwise."""
    found = session.queues[spec.name]
    texts = []
    if found.visibility != spec.visibility:
        texts.append(f"its visibility timeout is {found.visibility:g} s, not {spec.visibility:g} s")
    if found.dead != spec.dead:
        texts.append(f"its dead-letter queue is {found.dead}, not {spec.dead}")
    return texts


def depth(session: Session, name: str) -> Depth:
    """Count one queue exactly. Raises ``QueueMissing``.

    Visible messages are counted in an index; only the rows of hidden ones are read.
    """
    session.refresh()
    queue, now = session.queue(name), session.now()
    visible, hidden, in_flight = session.db.execute(sql.DEPTH, (queue.id, now, queue.id, now)).fetchone()
    return Depth(visible, in_flight, hidden - in_flight)


def bodies(session: Session, name: str) -> list[tuple[str, str, str | None]]:
    """Return body, message id and failure attribute of each message of a queue. Raises ``QueueMissing``."""
    session.refresh()
    rows = session.db.execute(sql.BODIES, (session.queue(name).id,)).fetchall()
    return [(as_text(body), str(seq), as_text(failure)) for body, seq, failure in rows]


def existing(session: Session, name: str) -> str:
    """Return a queue's name if the queue exists. Raises ``QueueMissing``."""
    session.refresh()
    return session.queue(name).name


def empty(session: Session, names: Sequence[str], *, delete: bool) -> None:
    """Empty queues at once, keys included; missing ones are fine. ``clear`` removes the rows later, in any process."""
    session.refresh()
    found = [session.queues[name] for name in names if name in session.queues]
    if found:
        session.run(Program.TEND, [*(row(Step.EMPTY, queue=queue.id, flag=delete) for queue in found), row(Step.CLOSE)])


def clear(session: Session) -> bool:
    """Remove up to ``CHUNK`` rows of an emptied queue; False when none are left."""
    found = session.db.execute(sql.GARBAGE).fetchone()
    if found is None:
        return False
    queue: int = found[0]
    for statement in (sql.SWEEP_MESSAGES, sql.SWEEP_GROUPS):
        if session.db.execute(statement, (queue, CHUNK)).rowcount:
            return True
    if session.db.execute(sql.QUEUE_KEYS, (queue, 1)).fetchone():
        session.db.execute(sqlite_program.FORGET_QUEUE, (queue, CHUNK))
        return True
    if session.db.execute(sql.SWEEP_ENDS, (queue, queue, CHUNK)).rowcount:
        return True
    # No program adds rows under a number that no queue has.
    session.db.execute(sql.DROP_GARBAGE, (queue,))
    return True


def redate(session: Session, skew: int) -> bool:
    """Bring forward delayed messages that are due by the wall clock; False when none are left.

    ``skew``: milliseconds of the wall clock beyond the file's, which setting the wall clock does not move.
    """
    now = session.now()
    if session.db.execute(sql.EARLIER, (now, skew, 1)).fetchone() is None:
        return False
    session.db.execute(sql.REDATE, (now, skew, now, skew, now, skew, CHUNK))
    session.db.execute(sqlite_program.READY_TENANTS, (now,))
    return True


def tidy(session: Session) -> None:
    """Remove a bounded number of expired keys and messages, and of rows of emptied queues."""
    session.db.execute(sql.TICK, (session.now(), session.boot))
    session.run(Program.TEND, [row(Step.SWEEP, number=CHUNK), row(Step.RETIRE), row(Step.CLOSE)])
    clear(session)
