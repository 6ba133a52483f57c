"""The number of messages to ask for: enough to keep the function fed, bounded by time. Pure (worker)."""

from __future__ import annotations

import math

#: Mean run time from which no message is held while one runs, seconds: a receive costs little beside it.
LONG = 1.0
#: Messages held unstarted, or on their way, at most.
_MOST = 300
#: Bytes of the replies that may be under way at once, and the bytes of an unknown one.
_MOST_BYTES, _ONE_REPLY = 64 << 20, 64 << 10


def depth(mean: float | None, round_trip: float, limit: int | None, at_once: int = 1) -> int:
    """Return how many messages should be held or on their way; the arguments are those of ``ask``."""
    return wanted(mean, round_trip, at_once) if limit is None else limit


def another(*, under_way: int, mean: float | None, backlog: bool, reply: int | None) -> bool:
    """Tell whether a further receive may be sent while ``under_way`` others are.

    Args:
        under_way: receives under way.
        mean: seconds per call, None before the first.
        backlog: the newest reply was full: more messages wait.
        reply: mean bytes of a reply, None before the first.
    """
    if not under_way:
        return True
    if mean is None or mean >= LONG or not backlog:
        return False
    return (under_way + 1) * (_ONE_REPLY if reply is None else reply) <= _MOST_BYTES


def ask(
    *,
    waiting: int,
    idle: int,
    mean: float | None,
    round_trip: float,
    limit: int | None,
    room: int,
    batch: int,
    ahead: float,
    at_once: int = 1,
) -> int:
    """Return how many messages to ask for now; 0 = none.

    Args:
        waiting: messages held and not started, and those asked for by receives under way.
        idle: messages that could begin now (1 for a main thread that waits for one).
        mean: seconds per call, None before the first.
        round_trip: seconds per receive.
        limit: the task's ``prefetch`` (messages held beside the running one), None = by time.
        room: leases that still fit.
        batch: most messages per receive.
        ahead: seconds of work that one receive may bring.
        at_once: messages that run at the same time (threads, or the values of one call).
    """
    held = depth(mean, round_trip, limit, at_once)
    if waiting >= max(held, idle):
        return 0
    if mean is None:
        return min(max(1, idle - waiting), batch, room)
    each = mean / at_once
    by_time = batch if each * batch <= ahead else int(ahead / each)
    by_time = max(0 if mean >= LONG else by_time, idle - waiting)
    count = by_time if limit is None else held + idle - waiting
    return max(0, min(max(count, 1), batch, room))


def wanted(mean: float | None, round_trip: float, at_once: int = 1) -> int:
    """Return how many messages should wait: two receive round trips' worth of work."""
    if mean is None or mean >= LONG:
        return 0
    if mean / at_once * _MOST <= 2 * round_trip:
        return _MOST
    return math.ceil(2 * round_trip * at_once / mean)
