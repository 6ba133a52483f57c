"""Look at SQS without changing it: region, credentials, clock, and the attributes of queues (the caller's process)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from sqspipes_mp.brokers.base import QueueSpec
from sqspipes_mp.brokers.examined import ExaminedQueue
from sqspipes_mp.brokers.sqs.calls import Calls
from sqspipes_mp.brokers.sqs.queues import COUNTS, Queues, differences, redrive_of, whole_number
from sqspipes_mp.errors import AccessDenied, QueueMissing

#: Seconds that a call may take.
PATIENCE = 10.0


def watch_clock(calls: Calls) -> Callable[[], float | None]:
    """Watch the Date of SQS's replies; return a function that returns the seconds by which it is ahead."""
    found: list[float] = []

    def note(http_response: Any, **_: Any) -> None:
        with contextlib.suppress(ValueError, TypeError):
            # Date has whole seconds.
            found.append(parsedate_to_datetime(http_response.headers["Date"]).timestamp() + 0.5 - time.time())

    calls.clients.hot.meta.events.register("after-call.sqs", note)
    # The reply with the least delay is the nearest one.
    return lambda: min(found, key=abs, default=None)


def examine_queues(queues: Queues, specs: Sequence[QueueSpec]) -> tuple[ExaminedQueue, ...]:
    """Return each queue as SQS tells of it: dead-letter queues first, whose ARNs the others' attributes name.

    Raises ``BrokerError`` where SQS does not answer at all.
    """
    found = {spec.name: _examine(queues, spec) for spec in sorted(specs, key=lambda spec: spec.dead is not None)}
    return tuple(found[spec.name] for spec in specs)


def _examine(queues: Queues, spec: QueueSpec) -> ExaminedQueue:
    try:
        found = queues.attributes(spec.name)
    except QueueMissing:
        return ExaminedQueue(spec=spec, exists=False)
    except AccessDenied as error:
        return ExaminedQueue(spec=spec, exists=None, trouble=str(error))
    policy = redrive_of(found.get("RedrivePolicy"))
    return ExaminedQueue(
        spec=spec,
        exists=True,
        differences=tuple(differences(queues.wanted(spec), found)) if spec.owned else (),
        retention=whole_number(found.get("MessageRetentionPeriod")) or None,
        redrive_after=whole_number(policy.get("maxReceiveCount")) or None,
        messages=sum(whole_number(found.get(name)) for name in COUNTS),
    )
