"""Messages that go on in their own queue: continuations, and messages sent anew (worker).

Both have a hop id of their own, the chain of their predecessor, its root id, its group or tenant and its level. They
are accepted before their predecessor is deleted, as every output is, and only while its lease is held.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from sqspipes_mp.brokers.base import Completion, Output
from sqspipes_mp.errors import OutputError
from sqspipes_mp.ipc.statistics import PAUSE_TOLD, SHARED_TOLD, StageField
from sqspipes_mp.messages.chain import QUICK, UNPAUSED, Chain, continued, due_of
from sqspipes_mp.messages.envelope import load
from sqspipes_mp.messages.ids import mark, token
from sqspipes_mp.pipeline.outputs import Products, no_continuation, same_value
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.send.outgoing import Done

log = logging.getLogger("sqspipes_mp.worker")


def refusal(delivery: Delivery, context: WorkerContext) -> str | None:
    """Return why a message cannot go on in its own queue, with the cure; None: it can."""
    group = delivery.received.group
    if group is not None and is_fifo(delivery) and group != first_hop(delivery):
        return f"its FIFO group {group[:40]!r} promises an order, and later messages of the group would come first"
    return no_continuation(context.stage)


def is_fifo(delivery: Delivery) -> bool:
    """Tell whether a message came from a FIFO queue."""
    return delivery.received.handle.queue.endswith(".fifo")


def first_hop(delivery: Delivery) -> str:
    """Return the hop id of the first message of a message's chain, from which its outputs' ids derive."""
    return delivery.message.parent if delivery.chain is None else delivery.chain.first


def continuation(delivery: Delivery, context: WorkerContext, products: Products, state: Any, yielded: int) -> Output:
    """Return the message that goes on with ``state`` in place of a message.

    ``yielded``: outputs that the chain's calls have yielded so far, this one's included. Raises ``OutputError``,
    ``MessageTooLarge``, and ``Unchanged``.
    """
    message, name = delivery.message, context.stage.name
    if (why := refusal(delivery, context)) is not None:
        raise OutputError(f"stage {name!r}: Continue(...) is not possible here; {why}")
    before = delivery.chain or Chain(message.parent, 0, 0, 0)
    now = time.time()
    quick = 0
    if not context.ending.asks() and now - delivery.received.sent_at - before.pause < QUICK:
        quick = before.quick + 1
    chain = Chain(before.first, yielded, before.count + 1, quick)
    due = now + chain.pause if chain.pause and is_fifo(delivery) else None
    hop, meta = continued(message, name, chain, due=due)
    # The call may have changed the value in place, and the body has it as it came.
    given = same_value(load(delivery.received.body, "the body is not JSON")["value"])
    body = products.continuation(state, meta, given)
    _tell_shared(context)
    if chain.pause:
        _tell_once(
            context, PAUSE_TOLD,
            "%s: more than %d continuations of a value in a minute; they are held back for up to 30 s each. Do work of "
            "%g s or more in a call, and return Continue(state) once current_message().stopping is True",
            UNPAUSED, QUICK,
        )  # fmt: skip
    return Output(delivery.received.handle.queue, body, hop, delivery.received.group, chain.pause)


def sent_anew(delivery: Delivery, context: WorkerContext, delay: float) -> Done:
    """Return a message's place in the outbox that sends it anew, with the same value, for ``delay`` seconds from now.

    Its deliveries and attempts count from 1 again.
    """
    message = delivery.message
    chain = delivery.chain or Chain(message.parent, 0, 0, 0)
    hop, meta = continued(message, context.stage.name, chain, due=time.time() + delay if delay else None)
    envelope = load(delivery.received.body, "the body is not JSON")
    _tell_shared(context)
    done = _moved(delivery, json.dumps({**envelope, "meta": meta}, separators=(",", ":")), hop, delay)
    if context.counted:
        done.step = (token(message.id), mark(message.parent), [mark(hop)], delivery.received.receives)
    return done


def put_off(delivery: Delivery, delay: float) -> Done:
    """Return a message's place in the outbox that sends it anew as it is, for ``delay`` seconds from now."""
    return _moved(delivery, delivery.received.body, delivery.message.parent, delay)


def early(delivery: Delivery, context: WorkerContext) -> float:
    """Return the seconds for which a message must not run yet; 0: it may run."""
    stage = context.stage
    due = due_of(delivery.message, delivery.chain, is_fed=stage.is_first and not isinstance(stage.task.input, str))
    return 0.0 if due is None else max(0.0, due - time.time())


def _moved(delivery: Delivery, body: str, hop: str, delay: float) -> Done:
    received = delivery.received
    output = Output(received.handle.queue, body, hop, received.group, delay, attributes=received.attributes)
    return Done(Completion(received.handle, (output,), group=received.group), delivery, continues=True, anew=True)


def _tell_shared(context: WorkerContext) -> None:
    """Say once in a run what other programs on the stage's queue make of a continuation."""
    if context.connection.keeps_charges:
        # Only this version opens the file.
        return
    _tell_once(
        context, SHARED_TOLD,
        "%s: messages go on in their own queue from here (Continue, Retry(charge=False)); workers of sqspipes, or of "
        "sqspipes_mp 0.1, on the same queue would take a state for a value: run this stage with this version alone",
    )  # fmt: skip


def _tell_once(context: WorkerContext, field: StageField, text: str, *details: object) -> None:
    if not context.board.stage(context.stage.index, field):
        context.board.set_stage(context.stage.index, field, 1)
        log.warning(text, context.stage.name, *details)
