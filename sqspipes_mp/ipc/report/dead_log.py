"""What error reporters should see: dead letters, lost workers and late calls, at ERROR (worker, keeper, supervisor)."""

from __future__ import annotations

import logging
import os

from sqspipes_mp.errors import WorkerLost
from sqspipes_mp.ipc.report.exception_text import frames_of

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
    """Log a line with ``error`` as its exception and the fields ``stage``, ``id``, ``attempt``, ``reason``, ``worker``.

    ``ident``, ``attempt``: of the message that is charged, None where none is; ``untold``: no dead letter says the
    error.
    """
    # The worker that was lost, or that logs this.
    worker = error.pid if isinstance(error, WorkerLost) else os.getpid()
    fields: dict[str, object] = {"stage": stage, "id": ident, "attempt": attempt, "worker": worker}
    fields |= {"reason": type(error).__name__, "untold": untold}
    _log.error(text, *args, exc_info=(type(error), error, frames_of(error)), extra=fields)
