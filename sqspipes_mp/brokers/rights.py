"""The rights that a run needs at its queue service. Pure declarations; imports no broker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from sqspipes_mp.brokers.base import Broker, QueueSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A queue, with all that a run does with it; counting comes with either."""

    spec: QueueSpec
    #: Whether messages are received, extended and deleted.
    receives: bool = False
    #: Whether messages are sent.
    sends: bool = False


class Guarded(Protocol):
    """A broker whose service grants rights by a policy."""

    def policy(self, uses: Sequence[Use], *, create: bool) -> dict[str, Any]:
        """Return the policy that grants these uses, with ``create`` also the creation of the queues."""


def policy(broker: Broker, uses: Sequence[Use], *, create: bool) -> dict[str, Any] | None:
    """Return the policy of a run, for JSON; None where the service has none. Raises ``ConfigError`` as ``check``."""
    return cast("Guarded", broker).policy(uses, create=create) if hasattr(broker, "policy") else None
