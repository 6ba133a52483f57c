"""The owner (domain) of each queue in the file: two pipelines can arrive at the same queue name (any process).

A row counts only for the queue with the same creation time: 0.1.0 deleted and created queues without touching owners.
"""

from collections.abc import Collection, Sequence

from sqspipes_mp.brokers.base import QueueSpec, Stray
from sqspipes_mp.brokers.sqlite import schema as sql
from sqspipes_mp.brokers.sqlite.session import Session
from sqspipes_mp.errors import ConfigError


def check(session: Session, specs: Sequence[QueueSpec], file: str) -> list[QueueSpec]:
    """Return the pipeline's own queues that have no owner yet, also those that do not exist.

    Raises ``ConfigError`` for a queue that another pipeline owns.
    """
    # Dead-letter queues last: an error about a task's queue is easier to understand.
    own = sorted((spec for spec in specs if spec.owned and spec.domain is not None), key=lambda spec: spec.dead is None)
    owners = _owners(session) if own else {}
    for spec in own:
        owner = owners.get(spec.name, spec.domain)
        if owner != spec.domain:
            raise ConfigError(
                "Engine(domain)",
                spec.domain,
                f"another one here: queue {spec.name!r} in {file} belongs to the pipeline of domain {owner!r}, whose "
                "domain and task names join to the same name",
                "Rename the domain or the task, or give this pipeline a file of its own",
            )
    return [spec for spec in own if spec.name not in owners]


def adopt(session: Session, specs: Sequence[QueueSpec], file: str) -> None:
    """Make the domain the owner of its existing queues. Raises as ``check``, also where another process was first."""
    for spec in check(session, specs, file):
        session.db.execute(sql.OWN, (spec.domain, spec.name))
    check(session, specs, file)


def forget(session: Session) -> None:
    """Remove the owners of queues that no longer exist."""
    session.db.execute(sql.DISOWN)


def strays(session: Session, domain: str, known: Collection[str]) -> list[Stray]:
    """Return a domain's queues that hold messages, without the ``known`` ones.

    A queue without an owner counts as the domain's where its name begins with it.
    """
    session.refresh()
    owners = _owners(session)
    found = [
        Stray(name, session.db.execute(sql.COUNT, (session.queues[name].id,)).fetchone()[0], owned=name in owners)
        for name in sorted(session.queues)
        if name not in known and name.startswith(f"{domain}-") and owners.get(name, domain) == domain
    ]
    return [stray for stray in found if stray.messages]


def _owners(session: Session) -> dict[str, str]:
    return dict(session.db.execute(sql.OWNERS).fetchall())
