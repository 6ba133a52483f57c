"""The backoff of a message: the wait before its next attempt. Pure (any process)."""

from __future__ import annotations

from collections.abc import Callable

#: Longest wait for a message's next attempt, seconds.
MOST_BACKOFF = 900.0


def backoff(attempt: int, jitter: Callable[[float, float], float]) -> float:
    """Return seconds to wait after failed attempt number ``attempt``: up to 2**attempt, at most 900, full jitter.

    ``jitter`` is ``random.uniform``.
    """
    return jitter(0.0, min(MOST_BACKOFF, 2.0 ** min(attempt, 10)))
