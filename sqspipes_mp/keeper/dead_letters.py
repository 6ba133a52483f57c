"""The dead letter of a message whose worker died while it ran (keeper)."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict

from sqspipes_mp.brokers.base import DeadLetter
from sqspipes_mp.errors import CANCELLED, HELD, LATE, Cancelled, DecodeError, TaskTimeout, WorkerLost
from sqspipes_mp.ipc.channel import describe_death
from sqspipes_mp.ipc.leases import Cause, Lease, LeaseState
from sqspipes_mp.ipc.report.dead_log import tell_dead
from sqspipes_mp.messages.attributes import Attribute
from sqspipes_mp.messages.envelope import decode, envelope
from sqspipes_mp.messages.failure import NO_ROOM, Failure, failure_text
from sqspipes_mp.messages.ids import mark, token
from sqspipes_mp.messages.told import short_id
from sqspipes_mp.pipeline.stages import Stage
from sqspipes_mp.pipeline.value_ends import end_of_body

_REASON = {
    Cause.CANCEL: ("Cancelled", CANCELLED),
    Cause.TIMEOUT: ("TaskTimeout", LATE),
    Cause.HOLD: ("TaskTimeout", HELD),
    Cause.MEMORY: ("WorkerLost", "the worker was over its memory limit"),
    Cause.FULL: (
        "WorkerLost",
        "the container was nearly out of memory, most of which the worker had taken since it began",
    ),
}


def killed_letter(
    stage: Stage,
    lease: Lease,
    body: str,
    cause: Cause,
    exitcode: int,
    pid: int,
    stack: str,
    attributes: Sequence[Attribute] = (),
) -> DeadLetter:
    """Return the dead letter of a message whose last allowed attempt has ended with its worker's death.

    Args:
        stage: the worker's.
        lease: the message's.
        body: the message's.
        cause: of the attempt's failure.
        exitcode: the worker's; negative: a signal.
        pid: the worker's.
        stack: of the call; empty where it is not known.
        attributes: the message's.
    """
    error, why = _reason(lease, cause, exitcode)
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
    hop = _ids(stage, lease, body)[1]
    assert stage.dead is not None
    text = failure_text(asdict(failure), len(body.encode("utf-8", "surrogatepass")), attributes)
    unsaid = "" if text else f"{NO_ROOM}\n{stack}".rstrip()
    lost = {"TaskTimeout": TaskTimeout, "Cancelled": Cancelled}.get(error, WorkerLost)
    tell_dead(
        "%s: message %s is dead-lettered: %s%s", stage.name, short_id(hop), why, unsaid,
        error=lost(stage.name, pid, why), stage=stage.name, ident=short_id(hop), attempt=lease.charges + 1,
    )  # fmt: skip
    end = None if isinstance(stage.task.input, str) else end_of_body(body, lease.handle.message_id)
    return DeadLetter(lease.handle, stage.dead, body, hop, text, lease.group, tuple(attributes), end)


def killed_header(stage: Stage, lease: Lease, body: str, cause: Cause, exitcode: int, pid: int) -> dict[str, object]:
    """Return the header that tells the caller of ``map`` of the dead letter; arguments as of ``killed_letter``."""
    root, hop = _ids(stage, lease, body)
    error, why = _reason(lease, cause, exitcode)
    told = {"error": error, "why": why, "stage": stage.name, "worker": pid}
    return {"token": token(root), "hop": mark(hop), **told}


def _reason(lease: Lease, cause: Cause, exitcode: int) -> tuple[str, str]:
    if cause in _REASON:
        return _REASON[cause]
    if lease.state in {LeaseState.FAILED, LeaseState.CHARGING}:
        return "WorkerLost", "its call raised, and the worker was gone before it could write down what"
    return "WorkerLost", f"the worker died while it ran: {describe_death(exitcode)}"


def _ids(stage: Stage, lease: Lease, body: str) -> tuple[str, str]:
    task = stage.task
    if isinstance(task.input, str) and task.decode is not envelope:
        # The body is opaque, and the user's decode may run for ever, or be the reason of the death.
        return lease.handle.message_id, lease.handle.message_id
    try:
        message = decode(body, lease.handle.message_id)
    except DecodeError:
        return lease.handle.message_id, lease.handle.message_id
    return message.id, message.parent
