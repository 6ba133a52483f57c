"""Which attempt is a message's last, and how long it waits for the next. Pure but for the jitter (worker, keeper)."""

from __future__ import annotations

from collections.abc import Callable

from sqspipes_mp.messages.backoff import backoff

#: Deliveries per allowed attempt after which an own failure is the last one: attempts are lost with their run.
RECEIVES_PER_ATTEMPT = 10
#: In sqspipes's one group for everything a retry holds up the whole stage, so it is short there, seconds.
ONE_GROUP, ONE_GROUP_BACKOFF = "-", 1.0


def is_last(attempt: int, receives: int, max_attempts: int, *, held: bool = False) -> bool:
    """Tell whether failed attempt number ``attempt`` was the last.

    ``receives``: deliveries of the message so far, with releases; 0 where the broker keeps the attempts itself, or does
    not count deliveries. ``held``: it failed for SQS's 12 hours, so as many deliveries as attempts are enough: each
    takes half a day, and a deployment forgets the charges.
    """
    most = max_attempts if held else RECEIVES_PER_ATTEMPT * max_attempts
    return attempt >= max_attempts or receives >= most


def pause(
    attempt: int, group: str | None, jitter: Callable[[float, float], float], asked: float | None = None
) -> float:
    """Return seconds until a message of ``group`` comes again; ``asked``: instead of the backoff."""
    delay = backoff(attempt, jitter) if asked is None else asked
    return min(delay, ONE_GROUP_BACKOFF) if group == ONE_GROUP else delay
