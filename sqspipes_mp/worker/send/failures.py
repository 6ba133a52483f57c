"""A message that failed: its decision, its log lines, its dead letter, and what follows it in its group (worker).

The function raised, the call was late, ``decode`` refused the body, or a queue refused an output: there is one way.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import asdict

from sqspipes_mp.brokers.base import DeadLetter
from sqspipes_mp.errors import Cancelled, Reject, TaskTimeout, Verdict
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import LeaseState
from sqspipes_mp.ipc.report.dead_log import tell_dead
from sqspipes_mp.ipc.report.exception_text import line_of, message_of, traceback_text
from sqspipes_mp.ipc.report.report import pack_exception
from sqspipes_mp.ipc.statistics import CANCELLED, DEAD, FAILED, FAILED_LATE, LEASES_LOST, REJECTED, RETRIED, SlotField
from sqspipes_mp.messages.attempts import is_last, pause
from sqspipes_mp.messages.failure import NO_ROOM, Failure, failure_text
from sqspipes_mp.messages.ids import mark, token
from sqspipes_mp.messages.plain import one_line
from sqspipes_mp.messages.told import short_id, tell
from sqspipes_mp.pipeline.value_ends import end_of
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.fifo_order import GroupOrder
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.send.continuing import is_fifo, refusal, sent_anew
from sqspipes_mp.worker.send.outgoing import Done, Item, Letter, Release
from sqspipes_mp.worker.send.policy import Decision, decide

log = logging.getLogger("sqspipes_mp.worker")

#: Deliveries from which a message that comes again uncharged is sent anew.
RENEWED_AT = 20
#: Takes an item on its way: ``Outbox.put``, or, in a carrier, the carrying itself.
Carry = Callable[[Item], None]


class Failures:
    """Decides about failed and lost messages. Threads that run messages call it, and carriers."""

    def __init__(self, context: WorkerContext, ready: Ready, order: GroupOrder) -> None:
        self._context = context
        self._ready = ready
        self._order = order
        #: Released at the worker's end, once no worker of this engine would receive them again.
        self.left: list[Release] = []

    def failed(self, delivery: Delivery, error: BaseException, carry: Carry, flush: Callable[[], None]) -> None:
        """See to a message whose call raised.

        ``flush`` returns once a dead letter given to ``carry`` is written: the report may be this worker's end.
        """
        if isinstance(error, Reject):
            self._context.count(REJECTED, 1)
        decision, error = decide_on(error, delivery, self._context)
        self._settle(delivery, error, decision, carry, flush)
        self.hand_back(self._order.take_waiting(delivery), carry)

    def late(self, delivery: Delivery, why: str, carry: Carry, flush: Callable[[], None], *, held: bool) -> None:
        """See to a message whose call came back too late, as the keeper does with one that was killed for it.

        ``held``: late for the longest that SQS lets a message be in flight.
        """
        context = self._context
        error = TaskTimeout(context.stage.name, os.getpid(), why)
        context.count(FAILED_LATE, 1)
        self._settle(delivery, error, decide_on_late(delivery, context, held=held), carry, flush)
        self.hand_back(self._order.take_waiting(delivery), carry)

    def cancelled(self, delivery: Delivery, carry: Carry) -> None:
        """Dead-letter a message that came again after its running call was cancelled, with its worker's death."""
        error = Cancelled(self._context.stage.name, os.getpid())
        self.dead_letter(delivery, error, carry, counter=CANCELLED)

    def refused(self, done: Done, error: BaseException, carry: Carry) -> None:
        """See to a call whose output a queue refuses for good, in the carrier that carries its items at once."""
        delivery = done.delivery
        if delivery is None:
            self._source_refused(error)
            return
        decision, error = decide_on(error, delivery, self._context)
        self._settle(delivery, error, decision, carry, lambda: None)
        self.hand_back(self._order.block(delivery), carry)

    def lost(self, delivery: Delivery, carry: Carry) -> None:
        """Let go of a message that is another worker's, and of those that wait behind it in its group."""
        self._count_lost(delivery)
        self._context.close_lease(delivery.lease)
        self.hand_back(self._order.take_waiting(delivery), carry)

    def _count_lost(self, delivery: Delivery) -> None:
        """Count a lost lease, unless the keeper has found it lost, and counted it."""
        if self._context.leases.held_until(delivery.lease, delivery.until):
            self._context.count(LEASES_LOST, 1)

    def lost_in_outbox(self, delivery: Delivery, carry: Carry) -> None:
        """Let go of a message that was lost after its call, and of what this worker has of its group behind it."""
        if self._order.blocks(delivery):
            # Its own lease may still hold: released, it is to be had by others at once.
            self.hand_back([delivery], carry)
            return
        log.warning(
            "%s: the lease of message %s was lost while it ran; whoever has it now completes it",
            self._context.stage.name, delivery.received.handle.message_id,
        )  # fmt: skip
        self._count_lost(delivery)
        self._context.close_lease(delivery.lease)
        self.hand_back(self._order.block(delivery), carry)

    def hand_back(self, deliveries: list[Delivery], carry: Carry) -> None:
        """Release messages that are not to blame for anything: now, or at the end of a run that ends."""
        for delivery in deliveries:
            self._context.leases.set_state(delivery.lease, LeaseState.DONE)
        if deliveries:
            self._release(Release(tuple(deliveries), 0.0), carry)

    def _release(self, item: Release, carry: Carry, *, later: bool = False) -> None:
        # Once the run ends, another worker of this engine would receive it before that one stops, too.
        if later or self._context.full_stop.is_set():
            self.left.append(item)
        else:
            carry(item)

    def _settle(
        self,
        delivery: Delivery,
        error: BaseException,
        decision: Decision,
        carry: Carry,
        flush: Callable[[], None],
    ) -> None:
        context = self._context
        context.check_process()
        context.count(FAILED, 1)
        # The call is over: a worker that dies from here on has this failure charged, and no crash.
        context.leases.set_state(delivery.lease, LeaseState.FAILED if decision.charge else LeaseState.DONE)
        if not decision.charge:
            self._again(delivery, error, decision.delay, carry)
        elif decision.action == "dead":
            self.dead_letter(delivery, error, carry)
            if decision.report and not context.full_stop.is_set():
                # Without grace the report is this worker's end, and the letter would not say why.
                flush()
        else:
            if not decision.report:
                log_retry(error, delivery, context, decision.delay)
            self._release(Release((delivery,), decision.delay, charge=True), carry, later=decision.report)
        if decision.report:
            context.end_run(error, tell(delivery.message))
            self._ready.poke()

    def _again(self, delivery: Delivery, error: BaseException, delay: float, carry: Carry) -> None:
        """Have a message come again without a charge."""
        context = self._context
        log_retry(error, delivery, context, delay)
        context.count(RETRIED, 1)
        if delivery.received.receives < RENEWED_AT:
            self._release(Release((delivery,), delay), carry)
        else:
            # Each delivery counts towards SQS's limit and ours, a new message's from 1 again.
            carry(sent_anew(delivery, context, delay))

    def dead_letter(self, delivery: Delivery, error: BaseException, carry: Carry, counter: SlotField = DEAD) -> None:
        """Dead-letter a message with ``error`` as its reason, and count it."""
        context = self._context
        letter = letter_of(error, delivery, context)
        if context.counted:
            report = pack_exception(error, stage=context.stage.name, pid=os.getpid(), message_id=tell(delivery.message))
            header: dict[str, object] = {"token": token(delivery.message.id), "hop": mark(delivery.message.parent)}
            context.say(Kind.DEAD_LETTERED, header, report.to_bytes())
        carry(Letter(delivery, letter, counter))

    def _source_refused(self, error: BaseException) -> None:
        """A source has no message to try again: a generator ends with the error, a function as its policy says."""
        context = self._context
        context.count(FAILED, 1)
        if context.stage.task.is_generator or context.on_error == "raise" or callable(context.on_error):
            context.end_run(error)
            self._ready.poke()
        else:
            log.warning("%s: an output was left out: %s", context.stage.name, line_of(error, 300))


def decide_on(error: BaseException, delivery: Delivery, context: WorkerContext) -> tuple[Decision, BaseException]:
    """Return what becomes of a message that failed with ``error``, by its stage's policy, and the error to report."""
    task = context.stage.task
    stuck = refusal(delivery, context) if delivery.received.receives >= RENEWED_AT else None
    decision, error = decide(
        error,
        attempt=delivery.attempt,
        receives=_receives(delivery, context),
        max_attempts=task.max_attempts,
        on_error=context.on_error,
        group=delivery.received.group if is_fifo(delivery) else None,
        jitter=random.uniform,
        may_go_on=stuck is None,
    )
    if decision.stuck:
        log.warning(
            "%s: message %s has come %d times, and Retry(charge=False) is charged from now on: %s",
            context.stage.name, short_id(delivery.message.parent), delivery.received.receives, stuck,
        )  # fmt: skip
    return decision, error


def decide_on_late(delivery: Delivery, context: WorkerContext, *, held: bool) -> Decision:
    """Return what becomes of a message whose call was late: charged in every mode, no policy of the user's is asked.

    ``held``: it was late for SQS's 12 hours.
    """
    if is_last(delivery.attempt, _receives(delivery, context), context.stage.task.max_attempts, held=held):
        return Decision("dead")
    group = delivery.received.group if is_fifo(delivery) else None
    return Decision("retry", pause(delivery.attempt, group, random.uniform))


def _receives(delivery: Delivery, context: WorkerContext) -> int:
    """Return the deliveries of a message so far; 0 where the broker keeps the attempts itself."""
    # Receives count releases, too: the last resort where nothing counts attempts for good.
    return 0 if context.connection.keeps_charges else delivery.received.receives


def letter_of(error: BaseException, delivery: Delivery, context: WorkerContext) -> DeadLetter:
    """Return the dead letter of a message that ``error`` ended, and log why."""
    received = delivery.received
    stage = context.stage
    assert stage.dead is not None
    failure = failure_of(error, delivery, stage.name, _stack_of(error, context))
    ident = short_id(delivery.message.parent)
    tell_dead(
        "%s: message %s is dead-lettered after attempt %d: %s: %s%s",
        stage.name, tell(delivery.message), delivery.attempt, type(error).__name__, line_of(error),
        "" if failure else NO_ROOM,
        error=error, stage=stage.name, ident=ident, attempt=delivery.attempt, untold=failure is None,
    )  # fmt: skip
    return DeadLetter(
        handle=received.handle,
        queue=stage.dead,
        body=received.body,
        hop=delivery.message.parent,
        failure=failure,
        group=received.group,
        attributes=received.attributes,
        end=end_of(delivery.message),
    )


def log_retry(error: BaseException, delivery: Delivery, context: WorkerContext, delay: float) -> None:
    """Log that a message failed and comes again."""
    stage, ident = context.stage, short_id(delivery.message.parent)
    text = "%s: message %s failed (%s: %s), attempt %d of %d; visible again in %.1f s"
    args = (
        stage.name, tell(delivery.message), type(error).__name__, one_line(_told(error), 200),
        delivery.attempt, stage.task.max_attempts, delay,
    )  # fmt: skip
    if isinstance(error, TaskTimeout):
        tell_dead(text, *args, error=error, stage=stage.name, ident=ident, attempt=delivery.attempt)
    else:
        log.info(text, *args, extra={"stage": stage.name, "id": ident, "attempt": delivery.attempt})


def _told(error: BaseException) -> str:
    """Return an error's text; of ``raise Retry(...) from error`` with the error's."""
    cause = error.__cause__ if isinstance(error, Verdict) else None
    said = message_of(error)
    return said if cause is None else f"{said}, from {type(cause).__name__}: {message_of(cause)}"


def _stack_of(error: BaseException, context: WorkerContext) -> str:
    """Return what a late call was doing when the supervisor asked for it; empty where it was not asked."""
    ours = isinstance(error, TaskTimeout) and error.__traceback__ is None
    stack = context.assignment.stack
    return stack.read() if ours and stack is not None else ""


def failure_of(error: BaseException, delivery: Delivery, stage: str, stack: str = "") -> str | None:
    """Return the text of the failure attribute for a message that ``error`` ended; None if it cannot fit."""
    received = delivery.received
    failure = Failure(
        error=type(error).__qualname__,
        text=_told(error),
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
