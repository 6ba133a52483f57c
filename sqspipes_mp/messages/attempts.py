"""Attempts of a message: which one is its last, and the backoff before the next. Pure (any process)."""

from __future__ import annotations

from collections.abc import Callable

#: Longest backoff of a message, seconds.
MOST_BACKOFF = 900.0
#: Deliveries per allowed attempt after which a failed attempt is the last one. Charges are lost with their run; the
#: queue service's count of deliveries is not.
RECEIVES_PER_ATTEMPT = 10
#: sqspipes sends all messages of a stage in this one FIFO group, where a hidden message holds up the whole stage.
ONE_GROUP = "-"
#: Longest pause before the next attempt in ``ONE_GROUP``, seconds.
ONE_GROUP_BACKOFF = 1.0


def is_last(attempt: int, receives: int, max_attempts: int, *, held: bool = False) -> bool:
    """Tell whether failed attempt number ``attempt`` was the last.

    ``receives``: deliveries of the message so far, releases included; 0 where the broker keeps the charges itself, or
    does not count deliveries. ``held``: the attempt ended at SQS's 12 hours of one delivery. Then ``max_attempts``
    deliveries are enough: each takes half a day, and charges seldom survive as long.
    """
    most = max_attempts if held else RECEIVES_PER_ATTEMPT * max_attempts
    return attempt >= max_attempts or receives >= most


def pause(
    attempt: int, group: str | None, jitter: Callable[[float, float], float], asked: float | None = None
) -> float:
    """Return the seconds until a message of ``group`` can be received for its next attempt.

    ``asked``: seconds that the task asked for in place of the backoff.
    """
    delay = backoff(attempt, jitter) if asked is None else asked
    return min(delay, ONE_GROUP_BACKOFF) if group == ONE_GROUP else delay


def backoff(attempt: int, jitter: Callable[[float, float], float]) -> float:
    """Return the seconds to wait after failed attempt number ``attempt``: 0 to 2**attempt, at most 900, full jitter.

    ``jitter(low, high)`` draws a number between the two: ``random.uniform``.
    """
    return jitter(0.0, exponential(1.0, attempt, MOST_BACKOFF))


def exponential(first: float, doublings: int, longest: float) -> float:
    """Return ``first`` doubled ``doublings`` times, at most ``longest``: the growth of every backoff."""
    # 2.0 to a power above 1023 is no float.
    return min(longest, first * 2.0 ** min(doublings, 64))
