"""``engine.call``: one value through all functions, with no broker and no process, for tests (caller)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from enum import Enum
from typing import Any
from uuid import uuid4

from sqspipes_mp.caller.feed import Feeder
from sqspipes_mp.errors import ConfigError, RemoteError, Retry, Verdict
from sqspipes_mp.ipc.report.exception_text import message_of, traceback_text
from sqspipes_mp.messages.chain import Chain, continued
from sqspipes_mp.messages.envelope import Message, decode
from sqspipes_mp.pipeline.callables import misfit
from sqspipes_mp.pipeline.current import CurrentMessage, Ending, batch_message, processing
from sqspipes_mp.pipeline.outputs import DROPPED, Built, Products, Unchanged, same_value
from sqspipes_mp.pipeline.plan import RunPlan, Settings, make_plan
from sqspipes_mp.pipeline.stages import Pipeline, Stage
from sqspipes_mp.pipeline.task import Continue


class NoValue(Enum):
    """Stands for the value where ``engine.call`` was given none."""

    GIVEN = "nothing"

    def __repr__(self) -> str:
        return self.value


def rehearse(pipeline: Pipeline, settings: Settings, value: Any) -> list[Any]:
    """Send ``value`` through every stage; return the last one's outputs.

    Outputs are dropped as in a run, and callbacks run.

    Args:
        pipeline: as declared.
        settings: the engine's.
        value: the first function's input, of a source its only argument; ``NoValue.GIVEN``: a source's ``args``.

    Raises:
        ConfigError: the first function does not take that value.
        OutputError, MessageTooLarge: a value cannot be sent.
        RemoteError: a function raised ``SystemExit``.
        Exception: a function raised it. A ``Retry`` or ``Reject`` has a note on its meaning in a run.
    """
    plan, message = _begin(pipeline, settings, value)
    messages: list[Message | None] = [message]
    values: list[Any] = []
    try:
        for stage in pipeline.stages:
            values, messages = _pass(plan, stage, messages)
    except Verdict as verdict:
        verdict.add_note(_meaning(verdict))
        raise
    except SystemExit as error:
        # As in a run: a function does not end the caller.
        raise RemoteError("SystemExit", message_of(error), traceback_text(error)) from error
    return values


def _begin(pipeline: Pipeline, settings: Settings, value: Any) -> tuple[RunPlan, Message | None]:
    """Return the plan of the call and the first function's message; None for a source."""
    first = pipeline.stages[0]
    if first.is_source:
        return make_plan(pipeline, settings, args=_source_args(first, value)), None
    if value is NoValue.GIVEN:
        raise ConfigError("call(value)", value, f"given: the first task {first.name!r} receives a value")
    if first.task.input is True:
        item = Feeder(pipeline, settings, where="call").item(value)
        message = decode(item.output.body, item.id)
    else:
        # The value stands for the result of decode=, which need not be JSON.
        ident = uuid4().hex
        message = Message(value, {}, ident, ident, 0)
    return make_plan(pipeline, settings), message


def _source_args(source: Stage, value: Any) -> dict[str, tuple[Any]] | None:
    if value is NoValue.GIVEN:
        return None
    problem = misfit(source.task.method, (value,), source.task.kwargs)
    if problem is not None:
        raise ConfigError(
            "call(value)",
            value,
            f"what the source {source.name!r} takes as its only argument ({problem})",
            "Without a value, call() gives it its args=",
        )
    return {source.name: (value,)}


def _pass(plan: RunPlan, stage: Stage, messages: list[Message | None]) -> tuple[list[Any], list[Message | None]]:
    """Call a stage's function for each message. Returns its outputs, and the messages they become."""
    values: list[Any] = []
    following: list[Message | None] = []
    products = Products(plan, stage)
    with closing(Built(stage.task, plan.args[stage.index])) as function:
        for message in messages:
            parent = uuid4().hex if message is None else message.parent
            outputs = function.outputs() if message is None else _outputs(stage, function, products, message)
            for index, output in enumerate(outputs):
                product = products.make(output, message, parent, index)
                if product.value is not DROPPED:
                    values.append(product.value)
                if product.output is not None:
                    following.append(decode(product.output.body, parent))
                if product.callback is not None:
                    product.callback.callback(*product.callback.callback_args)
    return values, following


def _outputs(stage: Stage, function: Built, products: Products, message: Message) -> Iterator[Any]:
    """Yield the outputs for one message and its continuations; that message is the current one meanwhile."""
    first, count = message.parent, 0
    while True:
        given = same_value(message.value)
        with processing(current_of(stage, message, count)):
            made: Any = function.outputs([message.value] if stage.task.batch else message.value)
            if stage.task.is_generator:
                end = yield from made
            else:
                (end,) = made
                if not isinstance(end, Continue):
                    yield end
        if not isinstance(end, Continue):
            return
        count += 1
        _, meta = continued(message, stage.name, Chain(first, 0, count, 0))
        try:
            message = decode(products.continuation(end.state, meta, given), message.id)
        except Unchanged as unchanged:
            raise unchanged.verdict() from None


def current_of(stage: Stage, message: Message, count: int = 0) -> CurrentMessage:
    """Return the current message of a call that no worker makes; ``count``: the continuations so far."""
    if stage.task.batch:
        return batch_message(math.inf, math.inf, Ending())
    return CurrentMessage(
        id=message.id,
        stage=stage.name,
        hop=message.parent,
        attempt=1,
        priority=message.priority,
        group=None,
        sent_at=time.time(),
        meta=message.meta,
        continuation=count,
    )


def _meaning(verdict: Verdict) -> str:
    """Return the note on a verdict's meaning in a run."""
    if not isinstance(verdict, Retry):
        return "engine.call has no dead-letter queue: in a run the message would go there"
    when = "after the usual backoff" if verdict.delay is None else f"after {verdict.delay:g} s"
    charged = "with an attempt charged" if verdict.charge else "without a charge"
    return f"engine.call calls each function once: in a run the message would come back {when}, {charged}"
