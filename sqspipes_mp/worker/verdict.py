"""What happens to a message whose function raised. Pure but for the jitter, which is passed in (worker)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqspipes_mp.backoff import backoff
from sqspipes_mp.errors import ConfigError, Reject, Retry

#: In sqspipes's one group for everything a retry holds up the whole stage, so it is short there, seconds.
ONE_GROUP, ONE_GROUP_BACKOFF = "-", 1.0
#: Deliveries per allowed attempt after which a failure is the last one: attempts are lost with their host.
RECEIVES_PER_ATTEMPT = 10


@dataclass(frozen=True, slots=True)
class Decision:
    """``action``: "retry" (visible again in ``delay`` seconds) or "dead". ``report``: the run ends with the error."""

    action: str
    delay: float = 0.0
    report: bool = False


def decide(
    error: BaseException,
    *,
    attempt: int,
    receives: int,
    max_attempts: int,
    on_error: Any,
    group: str | None,
    jitter: Callable[[float, float], float],
) -> tuple[Decision, BaseException]:
    """Return the decision and the error to report, which is another one where ``on_error`` itself is at fault.

    Args:
        error: what the function raised.
        attempt: number of this attempt, from 1.
        receives: deliveries of this message so far.
        max_attempts: attempts allowed.
        on_error: "raise", "retry", "reject", or a callable(exception, attempt) -> one of these or a ``Retry``.
        group: the message's FIFO group.
        jitter: ``random.uniform``.
    """
    last = attempt >= max_attempts or receives >= RECEIVES_PER_ATTEMPT * max_attempts
    policy: Any = error
    if not isinstance(error, (Retry, Reject)):
        policy = on_error
        if callable(on_error):
            try:
                policy = on_error(error, attempt)
            except BaseException as fault:
                # The user's callable may raise anything; it must not cost the message or the worker.
                fault.__context__ = error
                policy, error = "raise", fault
    if isinstance(policy, Reject) or policy == "reject":
        return Decision("dead"), error
    if isinstance(policy, Retry) or policy == "retry":
        if last:
            return Decision("dead"), error
        delay = policy.delay if isinstance(policy, Retry) else None
        delay = backoff(attempt, jitter) if delay is None else delay
        return Decision("retry", min(delay, ONE_GROUP_BACKOFF) if group == ONE_GROUP else delay), error
    if policy != "raise":
        wrong = ConfigError(
            "on_error(exception, attempt)", policy, '"raise", "retry", "reject", Retry(...) or Reject(...)'
        )
        wrong.__context__ = error
        error = wrong
    return Decision("dead" if last else "retry", 0.0, report=True), error
