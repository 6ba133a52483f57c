"""The retry policy: a message whose function raised is retried or dead-lettered. Pure (worker)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqspipes_mp.errors import ConfigError, Reject, Retry
from sqspipes_mp.messages.attempts import is_last, pause


@dataclass(frozen=True, slots=True)
class Decision:
    """The fate of a message that failed."""

    #: "retry": visible again in ``delay`` seconds; "dead".
    action: str
    delay: float = 0.0
    #: Whether the run ends with the error.
    report: bool = False
    #: Whether the attempt counts.
    charge: bool = True
    #: Whether it counts though ``Retry(charge=False)`` asked for none.
    stuck: bool = False


def decide(
    error: BaseException,
    *,
    attempt: int,
    receives: int,
    max_attempts: int,
    on_error: Any,
    group: str | None,
    jitter: Callable[[float, float], float],
    may_go_on: bool = True,
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
        may_go_on: whether ``Retry(charge=False)`` may be one.
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
    free = isinstance(policy, Retry) and not policy.charge
    if free and may_go_on:
        return Decision("retry", pause(attempt, group, jitter, policy.delay), charge=False), error
    if isinstance(policy, Retry) or policy == "retry":
        if last:
            return Decision("dead", stuck=free), error
        asked = policy.delay if isinstance(policy, Retry) else None
        return Decision("retry", pause(attempt, group, jitter, asked), stuck=free), error
    if policy != "raise":
        wrong = ConfigError(
            "on_error(exception, attempt)", policy, '"raise", "retry", "reject", Retry(...) or Reject(...)'
        )
        wrong.__context__ = error
        error = wrong
    return Decision("dead" if last else "retry", 0.0, report=True), error
