"""The clock of leases: it goes on while the machine sleeps, as the queue service's clock does (any process). Pure.

On Linux ``time.monotonic`` stands still while the machine sleeps: a laptop that wakes after five minutes would take a
lease of thirty seconds for a current one. So does CPython's ``time.monotonic`` on macOS (mach_absolute_time), where
``CLOCK_MONOTONIC`` itself goes on. The duration of a call is counted by ``time.monotonic``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

#: Only Linux has CLOCK_BOOTTIME.
_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


#: Returns the time in seconds. It is C code: each message asks more than once.
lease_now: Callable[[], float] = partial(time.clock_gettime, _CLOCK)


def lease_now_ns() -> int:
    """Return the time in nanoseconds; all processes of a machine read the same."""
    return time.clock_gettime_ns(_CLOCK)


def slept(since: float, since_monotonic: float) -> float:
    """Return the seconds that the machine has slept since a moment.

    ``since``: the moment on the clock of leases; ``since_monotonic``: the same moment on ``time.monotonic``.
    """
    return max(0.0, (lease_now() - since) - (time.monotonic() - since_monotonic))
