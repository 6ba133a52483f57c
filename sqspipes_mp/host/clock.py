"""The clock of leases: it goes on while the machine sleeps, as a queue service's does (any process). Pure.

On Linux ``time.monotonic`` stands still while the machine sleeps, so a laptop that wakes after five minutes would take
a lease of thirty seconds for a good one. The same goes for CPython's ``time.monotonic`` on macOS (mach_absolute_time),
where ``CLOCK_MONOTONIC`` itself goes on. How long a call runs is counted by ``time.monotonic``.
"""

from __future__ import annotations

import time

#: CLOCK_BOOTTIME is Linux's alone.
_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def lease_now_ns() -> int:
    """Return the time in nanoseconds; all processes of a machine read the same."""
    return time.clock_gettime_ns(_CLOCK)


def lease_now() -> float:
    """Return the time in seconds."""
    return time.clock_gettime(_CLOCK)


def slept(since: float, since_monotonic: float) -> float:
    """Return how many seconds the machine has slept since a moment, given on both clocks."""
    return max(0.0, (lease_now() - since) - (time.monotonic() - since_monotonic))
