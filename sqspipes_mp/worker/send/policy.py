"""The retry policy: a message whose function raised is retried or dead-lettered. Pure (worker)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqspipes_mp.errors import ConfigError, Reject, Retry
from sqspipes_mp.messages.attempts import is_last, pause


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
        receives: deliveries of this message so far; 0 where the broker keeps the attempts itself.
        max_attempts: attempts allowed.
        on_error: "raise", "retry", "reject", or a callable(exception, attempt) -> one of these or a ``Retry``.
        group: the message's FIFO group.
        jitter: ``random.uniform``.
    """
    last = is_last(attempt, receives, max_attempts)
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
        asked = policy.delay if isinstance(policy, Retry) else None
        return Decision("retry", pause(attempt, group, jitter, asked)), error
    if policy != "raise":
        wrong = ConfigError(
            "on_error(exception, attempt)", policy, '"raise", "retry", "reject", Retry(...) or Reject(...)'
        )
        wrong.__context__ = error
        error = wrong
    return Decision("dead" if last else "retry", 0.0, report=True), error
