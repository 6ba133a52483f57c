"""The dead letter of a message whose worker was killed while it ran (keeper)."""

from __future__ import annotations

import logging
import signal
import socket
import time
from dataclasses import asdict

from sqspipes_mp.brokers.base import DeadLetter
from sqspipes_mp.control import describe_death
from sqspipes_mp.errors import DecodeError
from sqspipes_mp.failure import Failure, failure_text
from sqspipes_mp.message import decode
from sqspipes_mp.pipeline import Stage
from sqspipes_mp.region import Cause, Lease

log = logging.getLogger("sqspipes_mp.keeper")

_REASON = {
    Cause.TIMEOUT: ("TaskTimeout", "the call outlived the task's timeout"),
    Cause.MEMORY: ("WorkerLost", "the worker was over its memory limit"),
}


def killed_letter(
    stage: Stage, lease: Lease, body: str, cause: Cause, exitcode: int, pid: int, stack: str
) -> DeadLetter:
    """Return the letter for a message that took its worker with it for the last allowed time."""
    error, why = _REASON.get(cause, ("WorkerLost", f"the worker died while it ran: {describe_death(exitcode)}"))
    failure = Failure(
        error=error,
        text=why,
        stage=stage.name,
        attempts=lease.charges + 1,
        signal=signal.Signals(-exitcode).name if exitcode < 0 else None,
        stack=stack,
        host=socket.gethostname(),
        pid=pid,
        first_seen=lease.sent_at,
        failed_at=time.time(),
        source=lease.handle.queue,
    )
    try:
        hop = decode(body, lease.handle.message_id).parent
    except DecodeError:
        hop = lease.handle.message_id
    assert stage.dead is not None
    log.warning("%s: message %s is dead-lettered: %s", stage.name, lease.handle.message_id, why)
    text = failure_text(asdict(failure), len(body.encode("utf-8", "surrogatepass")))
    return DeadLetter(lease.handle, stage.dead, body, hop, text, lease.group)
