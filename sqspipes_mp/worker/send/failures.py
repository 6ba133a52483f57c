"""A failed message's decision, its log line and its dead letter (worker)."""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from dataclasses import asdict

from sqspipes_mp.brokers.base import DeadLetter
from sqspipes_mp.errors import TaskTimeout
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.report.report import pack_exception
from sqspipes_mp.ipc.report.words import message_of, short_id, traceback_text
from sqspipes_mp.messages.attempts import is_last, pause
from sqspipes_mp.messages.failure import NO_ROOM, Failure, failure_text
from sqspipes_mp.messages.ids import mark, token
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.send.policy import Decision, decide

log = logging.getLogger("sqspipes_mp.worker")


def decide_on(error: BaseException, delivery: Delivery, station: WorkerContext) -> tuple[Decision, BaseException]:
    """Return what becomes of a message that failed with ``error``, by its stage's policy, and the error to report."""
    task = station.stage.task
    return decide(
        error,
        attempt=delivery.attempt,
        receives=_receives(delivery, station),
        max_attempts=task.max_attempts,
        on_error=station.on_error,
        group=delivery.received.group,
        jitter=random.uniform,
    )


def decide_on_late(delivery: Delivery, station: WorkerContext, *, held: bool) -> Decision:
    """Return what becomes of a message whose call was late: charged in every mode, no policy of the user's is asked.

    ``held``: it was late for SQS's 12 hours.
    """
    if is_last(delivery.attempt, _receives(delivery, station), station.stage.task.max_attempts, held=held):
        return Decision("dead")
    return Decision("retry", pause(delivery.attempt, delivery.received.group, random.uniform))


def _receives(delivery: Delivery, station: WorkerContext) -> int:
    """Return the deliveries of a message so far; 0 where the broker keeps the attempts itself."""
    # Receives count releases, too: the last resort where nothing counts attempts for good.
    return 0 if station.connection.keeps_charges else delivery.received.receives


def letter_of(error: BaseException, delivery: Delivery, station: WorkerContext) -> DeadLetter:
    """Return the dead letter of a message that ``error`` ended, and log why."""
    received = delivery.received
    stage = station.stage
    assert stage.dead is not None
    failure = failure_of(error, delivery, stage.name, _stack_of(error, station))
    log.warning(
        "%s: message %s is dead-lettered after attempt %d: %s: %.200s%s",
        stage.name, short_id(delivery.message.parent), delivery.attempt, type(error).__name__, message_of(error),
        "" if failure else NO_ROOM,
        # Nothing else will tell.
        exc_info=None if failure else error,
    )  # fmt: skip
    return DeadLetter(
        handle=received.handle,
        queue=stage.dead,
        body=received.body,
        hop=delivery.message.parent,
        failure=failure,
        group=received.group,
        attributes=received.attributes,
    )


def tell_buried(error: BaseException, delivery: Delivery, station: WorkerContext) -> None:
    """Tell the caller of ``map`` that a message is about to be dead-lettered."""
    if station.orders.plan.counted:
        ident = short_id(delivery.message.parent)
        report = pack_exception(error, stage=station.stage.name, pid=os.getpid(), message_id=ident)
        header = {"token": token(delivery.message.id), "hop": mark(delivery.message.parent)}
        station.say(Kind.DEAD_LETTERED, header, report.to_bytes())


def log_retry(error: BaseException, delivery: Delivery, station: WorkerContext, delay: float) -> None:
    """Log that a message failed and comes again."""
    log.info(
        "%s: message %s failed (%s: %.200s), attempt %d of %d; visible again in %.1f s",
        station.stage.name, short_id(delivery.message.parent), type(error).__name__, message_of(error),
        delivery.attempt, station.stage.task.max_attempts, delay,
    )  # fmt: skip


def _stack_of(error: BaseException, station: WorkerContext) -> str:
    """Return what a late call was doing when the supervisor asked for it; empty where it was not asked."""
    ours = isinstance(error, TaskTimeout) and error.__traceback__ is None
    stack = station.orders.stack
    return stack.read() if ours and stack is not None else ""


def failure_of(error: BaseException, delivery: Delivery, stage: str, stack: str = "") -> str | None:
    """Return the text of the failure attribute for a message that ``error`` ended; None if it cannot fit."""
    received = delivery.received
    failure = Failure(
        error=type(error).__qualname__,
        text=message_of(error),
        traceback=traceback_text(error),
        stage=stage,
        attempts=delivery.attempt,
        stack=stack,
        host=socket.gethostname(),
        pid=os.getpid(),
        first_seen=received.sent_at,
        failed_at=time.time(),
        source=received.handle.queue,
    )
    body_bytes = len(received.body.encode("utf-8", "surrogatepass"))
    return failure_text(asdict(failure), body_bytes, received.attributes)
