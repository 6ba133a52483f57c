"""What is written beside a dead-lettered message, for people (worker)."""

from __future__ import annotations

import os
import socket
import time
import traceback
from dataclasses import asdict

from sqspipes_mp.failure import Failure, failure_text
from sqspipes_mp.worker.station import Delivery


def failure_of(error: BaseException, delivery: Delivery, stage: str) -> str | None:
    """Return the text of the failure attribute for a message that ``error`` ended; None if it cannot fit."""
    received = delivery.received
    failure = Failure(
        error=type(error).__qualname__,
        text=text_of(error),
        traceback=_traceback(error),
        stage=stage,
        attempts=delivery.attempt,
        host=socket.gethostname(),
        pid=os.getpid(),
        first_seen=received.sent_at,
        failed_at=time.time(),
        source=received.handle.queue,
    )
    return failure_text(asdict(failure), len(received.body.encode("utf-8", "surrogatepass")))


def text_of(error: BaseException) -> str:
    """Return ``str(error)``, whatever the user's class does."""
    try:
        return str(error)
    except Exception as fault:
        # __str__ is the user's.
        return f"<str() of it failed: {type(fault).__name__}>"


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.TracebackException.from_exception(error, limit=-30, compact=True).format())
    except Exception:
        # Formatting calls the user's __str__ and __notes__.
        return ""
