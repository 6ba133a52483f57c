"""Which leases are due to be extended, and until when. Pure (keeper)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sqspipes_mp.brokers.base import MAX_VISIBILITY
from sqspipes_mp.lease import Lease, LeaseState

#: Its worker is deleting a SENT one and changing a CLOSING one: extending it now would undo that.
_KEPT = frozenset({LeaseState.HELD, LeaseState.RUNNING, LeaseState.DONE, LeaseState.FAILED})
#: SQS refuses what goes past 12 hours from the receive; keep clear of it, seconds.
_MARGIN = 60.0
#: Less than this is no extension, seconds.
_WORTH = 0.01


@dataclass(frozen=True, slots=True)
class Extension:
    """A lease to extend by ``seconds`` from now."""

    lease: Lease
    seconds: int


def due(
    leases: Iterable[Lease],
    now: float,
    *,
    visibility: float,
    first: float,
    timeout: float | None,
    monotonic: float | None = None,
) -> tuple[list[Extension], float]:
    """Return the extensions to make now and the time of the next look.

    Args:
        leases: of live workers of one stage.
        now: by the clock that leases are judged by.
        visibility: what a lease is extended to, seconds.
        first: what the receive asked for, seconds.
        timeout: the task's, seconds: a running call's lease never outlives it by more than it takes to kill it.
        monotonic: the same moment by the clock that calls are timed by; None: both clocks show the same.
    """
    ahead = 0.0 if monotonic is None else now - monotonic
    extensions: list[Extension] = []
    again = now + visibility / 4
    for lease in leases:
        if lease.state not in _KEPT or lease.lost:
            continue
        at = lease.deadline - (visibility if lease.extended else first) / 2
        if now < at:
            again = min(again, at)
            continue
        until = min(now + visibility, _cap(lease, timeout, visibility, ahead))
        # What has reached its cap ends there; one that is only late is tried, its receipt may still be good.
        if until > max(lease.deadline, now) + _WORTH:
            # Rounded up: what falls short of its cap would be due again at every look.
            extensions.append(Extension(lease, max(1, math.ceil(until - now - _WORTH / 2))))
            again = min(again, now + visibility / 2)
    return extensions, again


def _cap(lease: Lease, timeout: float | None, visibility: float, ahead: float) -> float:
    """Return the time past which a lease is not extended."""
    cap = lease.received_at + MAX_VISIBILITY - _MARGIN
    if timeout is not None and lease.state is LeaseState.RUNNING and not lease.company:
        # Its worker is killed at started_at + timeout; judging it may take the keeper a few turns. Not a batch's: its
        # results may wait for a slow caller or queue one by one, long after the call.
        cap = min(cap, lease.started_at + ahead + timeout + visibility / 2)
    return cap
