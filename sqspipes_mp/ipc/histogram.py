"""A histogram of run times: one addition per call, percentiles rounded up. Pure (any process).

Four buckets per doubling, from a microsecond to most of a day.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial

#: Buckets, a word each on the scoreboard.
BUCKETS = 144
#: The least run time of each bucket after the first, nanoseconds.
_BOUNDS = [(4 + index % 4) << (8 + index // 4) for index in range(1, BUCKETS)]

#: Returns the index of a run time's bucket (nanoseconds). It is C code, since each call is counted.
bucket: Callable[[int], int] = partial(bisect_right, _BOUNDS)


def percentile(counts: Sequence[int], share: float) -> float | None:
    """Return the seconds within which ``share`` (0 to 1) of the calls ended, at most a quarter more; None: no call."""
    total = sum(counts)
    if not total:
        return None
    wanted = max(1.0, share * total)
    seen = 0
    for index, count in enumerate(counts):
        seen += count
        if seen >= wanted:
            return _upper(index)
    return _upper(BUCKETS - 1)


def duration(seconds: float | None) -> str:
    """Return a run time in seconds as text of three digits; None: a dash."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e6:.3g} us"


def _upper(index: int) -> float:
    """Return the seconds at which a bucket ends, so that a percentile is never too low."""
    return ((4 + (index + 1) % 4) << (8 + (index + 1) // 4)) / 1e9
