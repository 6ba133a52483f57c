"""Which leases are due to be extended, and until when. Pure (keeper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqspipes_mp.ipc.leases import Lease, LeaseState, extended_until

#: Its worker is deleting a SENT one and changing a CLOSING or CHARGING one: extending it now would undo that.
_KEPT = frozenset({LeaseState.HELD, LeaseState.RUNNING, LeaseState.DONE, LeaseState.FAILED})
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
    longest: float | None,
    ahead: float = 0.0,
    credit: Callable[[float], float] = lambda _: 0.0,
) -> tuple[list[Extension], float]:
    """Return the extensions to make now and the time (``lease_now``) of the next look.

    Args:
        leases: of live workers of one stage.
        now: ``lease_now``, seconds.
        visibility: what a lease is extended to, seconds.
        first: what the receive asked for, seconds.
        timeout: the task's, seconds: a running call's lease never outlives it by more than it takes to kill it.
        longest: the broker's ``longest_hold``.
        ahead: seconds by which that clock is ahead of the monotonic one, in which calls are timed.
        credit: seconds that a call begun at a time (monotonic s) has beyond it, the engine having been stopped.
    """
    extensions: list[Extension] = []
    again = now + visibility / 4
    for lease in leases:
        if lease.state not in _KEPT or lease.lost:
            continue
        at = lease.deadline - (visibility if lease.extended else first) / 2
        if now < at:
            again = min(again, at)
            continue
        until = min(now + visibility, _cap(lease, timeout, visibility, longest, ahead, credit))
        # What has reached its cap ends there; one that is only late is tried, its receipt may still be good.
        if until > max(lease.deadline, now) + _WORTH:
            # Rounded up: what falls short of its cap would be due again at every look.
            extensions.append(Extension(lease, max(1, math.ceil(until - now - _WORTH / 2))))
            again = min(again, now + visibility / 2)
    return extensions, again


def _cap(
    lease: Lease,
    timeout: float | None,
    visibility: float,
    longest: float | None,
    ahead: float,
    credit: Callable[[float], float],
) -> float:
    """Return the time past which a lease is not extended."""
    cap = extended_until(lease, longest)
    if timeout is not None and lease.state is LeaseState.RUNNING and not lease.company:
        # Its worker is killed at started_at + timeout; judging it may take the keeper a few turns. Not a batch's: its
        # results may wait for a slow caller or queue one by one, long after the call.
        longest = timeout + (credit(lease.started_at) if math.isfinite(lease.started_at) else 0.0)
        cap = min(cap, lease.started_at + ahead + longest + visibility / 2)
    return cap
