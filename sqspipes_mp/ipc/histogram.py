"""A histogram of run times: one addition per call, percentiles rounded up. Pure (any process).

Four buckets per doubling, from a microsecond to most of a day.
"""

from __future__ import annotations

from collections.abc import Sequence

_PER_DOUBLING_BITS = 2
_LEAST_BITS = 10
#: Buckets, a word each on the scoreboard.
BUCKETS = 144


def bucket(nanoseconds: int) -> int:
    """Return the index of a run time's bucket."""
    bits = nanoseconds.bit_length()
    if bits <= _LEAST_BITS:
        return 0
    quarter = (nanoseconds >> (bits - 1 - _PER_DOUBLING_BITS)) & 3
    return min(((bits - _LEAST_BITS - 1) << _PER_DOUBLING_BITS) + quarter, BUCKETS - 1)


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
    doubling, quarter = divmod(index, 4)
    return float(2 ** (doubling + _LEAST_BITS)) * (1 + (quarter + 1) / 4) / 1e9
