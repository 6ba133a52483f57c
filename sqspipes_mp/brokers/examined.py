"""A queue service as it was found by asking alone, for ``doctor``. Pure declarations; imports no broker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from sqspipes_mp.brokers.base import Broker, QueueSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedQueue:
    """One queue of a pipeline."""

    spec: QueueSpec
    #: None: it could not be told, see ``trouble``.
    exists: bool | None
    #: The error of the service; empty: it has answered.
    trouble: str = ""
    #: One text for each attribute that differs from that of a queue which the engine creates.
    differences: tuple[str, ...] = ()
    #: Seconds that the queue keeps a message; None: for ever, or unknown.
    retention: int | None = None
    #: Receives after which the service itself moves a message away; None: never.
    redrive_after: int | None = None
    #: Messages in it, of every state; None: unknown.
    messages: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A queue service, with the queues that were asked for."""

    #: "sqs", "sqlite", or another one's name.
    service: str
    #: The error for which nothing could be asked; empty: the service has answered.
    trouble: str = ""
    #: Where requests go, without secrets; empty: unknown.
    region: str = ""
    #: Where the credentials come from, never these themselves; empty: the service takes none, or unknown.
    credentials: str = ""
    #: Seconds by which the service's clock is ahead of this machine's; None: unknown.
    clock_ahead: float | None = None
    #: Requests that a worker may have under way, with this process's limit of open files and without one; None: not
    #: bounded by it.
    at_once: tuple[int, int] | None = None
    #: Path of the queues' file; None: there is none that stays.
    file: str | None = None
    queues: tuple[ExaminedQueue, ...] = ()


class Examinable(Protocol):
    """A broker that can be examined."""

    def examine(self, queues: Sequence[QueueSpec]) -> Examined:
        """Ask about the service and these queues, and change nothing. Never raises ``BrokerError``."""


def examine(broker: Broker, queues: Sequence[QueueSpec]) -> Examined:
    """Examine a broker; one of another package may not know how."""
    if not hasattr(broker, "examine"):
        return Examined(service="other", queues=tuple(ExaminedQueue(spec=spec, exists=None) for spec in queues))
    return cast("Examinable", broker).examine(queues)
