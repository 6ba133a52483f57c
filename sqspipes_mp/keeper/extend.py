"""Chooses the leases to extend now, and for how long. Pure (keeper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqspipes_mp.ipc.leases import Lease, LeaseState, extended_until

#: States in which a lease is extended. The worker is deleting a SENT message, and changing the visibility of a CLOSING
#: or CHARGING one, which an extension would undo.
_KEPT = frozenset({LeaseState.HELD, LeaseState.RUNNING, LeaseState.DONE, LeaseState.FAILED})
#: The shortest extension, seconds.
_WORTH = 0.01


@dataclass(frozen=True, slots=True)
class Extension:
    """A lease to extend."""

    lease: Lease
    #: Seconds from now.
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
    """Return the extensions to make now, and when to look again, seconds of ``lease_now``.

    Args:
        leases: of live workers of one stage.
        now: seconds of ``lease_now``.
        visibility: seconds that a lease has after an extension.
        first: seconds that a lease has after the receive.
        timeout: the task's, seconds; a running call's lease outlives it only by the time that its kill takes.
        longest: the broker's ``longest_hold``.
        ahead: seconds by which ``lease_now`` is ahead of the monotonic clock, in which calls are timed.
        credit: returns the seconds that a call begun at a time (monotonic seconds) has beyond its timeout, because the
            engine was stopped meanwhile.
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
        # A lease at its cap ends there. A lease that has ended is extended all the same: its receipt may be valid.
        if until > max(lease.deadline, now) + _WORTH:
            # Rounded up, or a lease just short of its cap would be due at every look.
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
    """Return the time past which a lease is not extended, seconds of ``lease_now``."""
    cap = extended_until(lease, longest)
    if timeout is not None and lease.state is LeaseState.RUNNING and not lease.company:
        # The worker is killed at started_at + timeout, and its judging may take the keeper a few turns. Not so a
        # batch's: its results may wait for a slow caller or queue one by one, long after the call.
        longest = timeout + (credit(lease.started_at) if math.isfinite(lease.started_at) else 0.0)
        cap = min(cap, lease.started_at + ahead + longest + visibility / 2)
    return cap
