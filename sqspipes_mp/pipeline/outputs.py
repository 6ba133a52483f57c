"""Builds a task's function, and makes messages of its outputs. Pure but for the user's callables.

Workers, ``engine.call`` and ``TaskClient.submit`` all call a function and send its outputs by this module's rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

from sqspipes_mp.brokers.base import Output
from sqspipes_mp.errors import OutputError, Retry, WrongShape
from sqspipes_mp.messages.envelope import Encoder, Message, clamp_priority, load, outgoing_meta
from sqspipes_mp.messages.ids import group_name, hop_id
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.pipeline.stages import Stage
from sqspipes_mp.pipeline.task import Continue, EmptyTaskOutput, Task, TaskCallback

#: The value of a product that is no output.
DROPPED = object()
#: Types of the values that are not sent as they are.
_SPECIAL = (TaskCallback, EmptyTaskOutput, Continue)


class Built:
    """A task's function, ready to be called: ``init`` has run, and a class has its instance."""

    def __init__(self, task: Task, args: Sequence[Any], after: Callable[[], object] = lambda: None) -> None:
        """Run ``init`` and build a class.

        Args:
            task: the task.
            args: the positional arguments after the value (a source: all).
            after: called after each of the user's hooks.
        """
        if task.init is not None:
            task.init()
            after()
        self._task = task
        self._args = args
        self._after = after
        self._built = task.method(*task.init_args) if task.is_class else task.method
        self.method = partial(self._built, **task.kwargs) if task.kwargs else self._built
        after()

    def outputs(self, *values: Any) -> Iterable[Any]:
        """Call the function once. Returns its outputs: a generator function's as they are made, else the one."""
        result = self.method(*values, *self._args)
        if self._task.batch is not None:
            result = results_of(self._task.name, 1, result)[0]
            if isinstance(result, BaseException):
                raise result
        outputs: Iterable[Any] = result if self._task.is_generator else [result]
        return outputs

    def close(self) -> None:
        """Run the ``close`` of a class's instance and the task's ``exit``, which a fault of the first does not stop."""
        close = getattr(self._built, "close", None) if self._task.is_class else None
        try:
            if callable(close):
                close()
        finally:
            self._after()
            if self._task.exit is not None:
                self._task.exit()
                self._after()


def results_of(stage: str, count: int, results: object) -> list[Any]:
    """Return a batch's results. Raises ``WrongShape`` for anything but a list of ``count``."""
    if isinstance(results, list) and len(results) == count:
        return results
    given = f"a list of {len(results)}" if isinstance(results, list) else f"a {type(results).__name__}"
    raise WrongShape(
        f"stage {stage!r}: a batch of {count} values gave {given}, not a list of {count}. With Task(batch=) return a "
        f"list with one result per value, in the same order: None where there is none, an exception where one failed"
    )


class Product(NamedTuple):
    """One output of a call, as it goes on."""

    #: The function's value; ``DROPPED`` for an ``EmptyTaskOutput``.
    value: Any
    #: The message to send; None where nothing is sent.
    output: Output | None
    #: The callback to run after that.
    callback: TaskCallback | None
    #: The output's number in its call, or in its chain of continuations.
    number: int


class Unchanged(Exception):
    """A call returned ``Continue`` with the very state that it was given."""

    def verdict(self) -> Retry:
        """Return the error of a call that may not do so: it is tried again, and charged."""
        error = Retry()
        text = (
            "Continue(state) with the state that the call was given: nothing would ever change. Do a part of the work "
            "before you look at current_message().stopping, and return a state that tells of it"
        )
        error.args = (text,)
        return error


def same_value(value: Any) -> str | None:
    """Return a JSON value as text, the same for equal values; None for a value that is none."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None


def no_continuation(stage: Stage) -> str | None:
    """Return why no message of a stage can go on in its own queue, with the cure; None: one can."""
    if isinstance(stage.task.input, str):
        return "its queue is others': put a stage before it that hands the value on"
    if stage.task.group is not None:
        return (
            "its FIFO groups promise an order, and later messages of a group would come first: leave group= out, or "
            "put a stage without it behind this one for the long work"
        )
    return None


class Products:
    """Makes products of one stage's outputs in one run; safe to share between threads."""

    def __init__(self, plan: RunPlan, stage: Stage) -> None:
        self._stage = stage
        self._name = stage.name
        self._fifo = plan.pipeline.fifo
        self._grouped = self._fifo or stage.next_tenant is not None
        self._ignore_none = plan.settings.ignore_none
        self._priority = plan.priority
        self._encoder = Encoder(stage.name, plan.settings.json_default)

    def make(self, value: Any, message: Message | None, parent: str, index: int) -> Product:
        """Make the product of one output.

        Args:
            value: the output.
            message: the call's input; None for a source.
            parent: the id that hop ids of the call's outputs derive from.
            index: the output's number in its call, or in its chain of continuations, from 0.

        Raises:
            OutputError, MessageTooLarge: the value cannot be sent.
            Exception: the user's ``priority``, ``group`` or ``json_default`` raised it.
        """
        callback = None
        if value is EmptyTaskOutput or isinstance(value, _SPECIAL):
            if isinstance(value, TaskCallback):
                callback, value = value, value.result
            if isinstance(value, Continue):
                self._refuse()
            if value is EmptyTaskOutput or isinstance(value, EmptyTaskOutput):
                return Product(DROPPED, None, callback, index)
        if not self._stage.outputs or (value is None and self._ignore_none):
            return Product(value, None, callback, index)
        return Product(value, self._output(value, message, parent, index), callback, index)

    def continuation(self, state: Any, meta: Mapping[str, Any], given: str | None) -> str:
        """Return the body of a continuation.

        ``given``: the ``same_value`` of the value that the call was given. Raises ``OutputError``,
        ``MessageTooLarge``, and ``Unchanged``.
        """
        if (why := no_continuation(self._stage)) is not None:
            raise OutputError(f"stage {self._name!r}: Continue(...) is not possible here; {why}")
        body = self._encoder.encode(state, meta)
        if same_value(load(body, "the body is not JSON")["value"]) == given:
            raise Unchanged
        return body

    def _refuse(self) -> NoReturn:
        cure = "a source has no message that could go on: let a stage behind it do the long work"
        if not self._stage.is_source:
            cure = "return Continue itself, alone; a generator function returns it after its yields"
        raise OutputError(f"stage {self._name!r}: Continue(...) is no output; {cure}")

    def kept(self, result: Any) -> str:
        """Return a result of the last stage in JSON, to be kept. Raises ``OutputError``."""
        return self._encoder.text(result)

    def _output(self, value: Any, message: Message | None, parent: str, index: int) -> Output:
        stage = self._stage
        if callable(self._priority):
            wanted = self._priority(value)
        else:
            wanted = self._priority if message is None else message.priority
        level = clamp_priority(wanted, len(stage.outputs))
        hop = hop_id(parent, self._name, index)
        body = self._encoder.encode(value, outgoing_meta(message, message.id if message else hop, level, hop))
        return Output(stage.outputs[level], body, hop, self._group(value, hop) if self._grouped else None)

    def _group(self, value: Any, hop: str) -> str | None:
        """Return the FIFO group of an output, or its tenant."""
        if self._fifo:
            return hop if self._stage.next_group is None else group_name(self._stage.next_group(value))
        assert self._stage.next_tenant is not None
        tenant = self._stage.next_tenant(value)
        return None if tenant is None else group_name(tenant)
