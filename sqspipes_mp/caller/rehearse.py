"""``engine.call``: one value through all functions, with no broker and no process, for tests (caller)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any
from uuid import uuid4

from sqspipes_mp.messages.envelope import Message, decode
from sqspipes_mp.pipeline.current import CurrentMessage, processing
from sqspipes_mp.pipeline.function import DROPPED, Products, built, results_of
from sqspipes_mp.pipeline.plan import Settings
from sqspipes_mp.pipeline.stages import Pipeline, Stage
from sqspipes_mp.pipeline.task import TaskCallback


def rehearse(pipeline: Pipeline, settings: Settings, value: Any) -> list[Any]:
    """Send ``value`` through every stage; return the last one's values.

    The first function gets the value as it is (a source: as its only argument), the others what JSON makes of it.
    Outputs are dropped as in a run, callbacks run, exceptions come as they are.
    """
    ident = uuid4().hex
    messages = [Message(value, {}, ident, ident, 0)]
    values: list[Any] = []
    for stage in pipeline.stages:
        values = []
        following: list[Message] = []
        products = Products.of(pipeline, settings, stage, 0 if stage.is_source else None)
        for message, results in _results(stage, messages):
            for index, result in enumerate(results):
                product = products.make(result, message, message.parent, index)
                if product.value is not DROPPED:
                    values.append(product.value)
                if product.output is not None:
                    following.append(decode(product.output.body, ident))
                if product.callback is not None:
                    _run(product.callback)
        messages = following
    return values


def _results(stage: Stage, messages: list[Message]) -> Iterable[tuple[Message, list[Any]]]:
    task = stage.task
    args = () if stage.is_source else task.args
    with built(task) as method:
        for message in messages:
            with processing(_current(stage, message)) if task.batch is None else nullcontext():
                if task.batch is None:
                    result = method(message.value, *args)
                else:
                    (result,) = results_of(task.name, 1, method([message.value], *args))
                    if isinstance(result, BaseException):
                        raise result
                yield message, list(result) if task.is_generator else [result]


def _current(stage: Stage, message: Message) -> CurrentMessage:
    return CurrentMessage(
        id=message.id,
        stage=stage.name,
        hop=message.parent,
        attempt=1,
        priority=message.priority,
        group=None,
        sent_at=time.time(),
        deadline=None,
        meta=message.meta,
    )


def _run(callback: TaskCallback) -> None:
    callback.callback(*callback.callback_args)
