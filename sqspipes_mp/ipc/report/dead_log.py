"""What error reporters should see: dead letters, lost workers and late calls, at ERROR (worker, keeper, supervisor)."""

from __future__ import annotations

import logging

#: The logger's name.
DEAD = "sqspipes_mp.dead"

_log = logging.getLogger(DEAD)


def tell_dead(
    text: str,
    *args: object,
    error: BaseException,
    stage: str,
    ident: str | None,
    attempt: int | None,
    untold: bool = False,
) -> None:
    """Log a line with ``error`` as its exception and the fields ``stage``, ``id``, ``attempt`` and ``reason``.

    ``ident``, ``attempt``: of the message that is charged, None where none is; ``untold``: no dead letter says the
    error.
    """
    fields = {"stage": stage, "id": ident, "attempt": attempt, "reason": type(error).__name__, "untold": untold}
    _log.error(text, *args, exc_info=(type(error), error, error.__traceback__), extra=fields)
