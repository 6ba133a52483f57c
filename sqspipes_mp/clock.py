"""The clock of leases: it goes on while the machine sleeps, as the queue service's does (worker, keeper). Pure."""

from __future__ import annotations

import time

#: Linux's CLOCK_MONOTONIC, which ``time.monotonic`` reads, stands still in sleep; macOS's goes on (clock_gettime).
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def lease_now() -> float:
    """Return the seconds that leases are counted in: of no use beside ``time.monotonic``, which times calls."""
    return time.clock_gettime(_CLOCK)
