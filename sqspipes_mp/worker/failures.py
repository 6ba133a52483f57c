"""What is written beside a dead-lettered message, for people (worker)."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict

from sqspipes_mp.failure import Failure, failure_text
from sqspipes_mp.report_text import message_of, traceback_text
from sqspipes_mp.worker.station import Delivery


def failure_of(error: BaseException, delivery: Delivery, stage: str) -> str | None:
    """Return the text of the failure attribute for a message that ``error`` ended; None if it cannot fit."""
    received = delivery.received
    failure = Failure(
        error=type(error).__qualname__,
        text=message_of(error),
        traceback=traceback_text(error),
        stage=stage,
        attempts=delivery.attempt,
        host=socket.gethostname(),
        pid=os.getpid(),
        first_seen=received.sent_at,
        failed_at=time.time(),
        source=received.handle.queue,
    )
    return failure_text(asdict(failure), len(received.body.encode("utf-8", "surrogatepass")))
