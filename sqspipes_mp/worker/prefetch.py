"""How many messages to ask for: enough to keep the function fed, bounded by time and not by count. Pure (worker)."""

from __future__ import annotations

import math

#: Work one receive may bring in at most, in seconds: full batches of 10 for tasks up to 50 ms.
_HOARD = 0.5
#: From this mean run time on, nothing is held while something runs: a receive costs little beside it.
_LONG = 1.0
#: Messages held unstarted at most, whatever the times say.
_MOST = 60


def ask(
    *, waiting: int, idle: bool, mean: float | None, round_trip: float, limit: int | None, room: int, batch: int
) -> int:
    """Return how many messages to ask for now; 0 = none.

    Args:
        waiting: messages held and not started.
        idle: whether the main thread waits for one.
        mean: seconds per call, None before the first.
        round_trip: seconds per receive.
        limit: the task's ``prefetch`` (messages held beside the running one), None = by time.
        room: leases that still fit.
        batch: most messages per receive.
    """
    depth = wanted(mean, round_trip) if limit is None else limit
    if waiting >= max(depth, 1 if idle else 0):
        return 0
    if mean is None:
        return min(1, room)
    by_time = batch if mean * batch <= _HOARD else int(_HOARD / mean)
    count = by_time if limit is None else depth + idle - waiting
    return max(0, min(max(count, 1), batch, room))


def wanted(mean: float | None, round_trip: float) -> int:
    """Return how many messages should wait: two receive round trips' worth of work."""
    if mean is None or mean >= _LONG:
        return 0
    if mean * _MOST <= 2 * round_trip:
        return _MOST
    return math.ceil(2 * round_trip / mean)
