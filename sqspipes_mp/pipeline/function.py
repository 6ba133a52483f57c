"""A task's function, built; its returned values become messages in ``Products``. Pure but for the user's callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from sqspipes_mp.brokers.base import Output
from sqspipes_mp.errors import WrongShape
from sqspipes_mp.messages.envelope import Encoder, Message, clamp_priority, outgoing_meta
from sqspipes_mp.messages.ids import group_name, hop_id
from sqspipes_mp.pipeline.plan import Settings
from sqspipes_mp.pipeline.stages import Pipeline, Stage
from sqspipes_mp.pipeline.task import EmptyTaskOutput, Task, TaskCallback

DROPPED = object()


@contextmanager
def built(task: Task) -> Iterator[Callable[..., Any]]:
    """Give the block the task's function as a worker has it: after ``init``, built where it is a class."""
    if task.init is not None:
        task.init()
    method = task.method(*task.init_args) if task.is_class else task.method
    try:
        yield method
    finally:
        close = getattr(method, "close", None) if task.is_class else None
        if callable(close):
            close()
        if task.exit is not None:
            task.exit()


def results_of(stage: str, count: int, results: object) -> list[Any]:
    """Return what a batch of ``count`` values gave. Raises ``WrongShape`` unless that is a list of as many results."""
    if isinstance(results, list) and len(results) == count:
        return results
    given = f"a list of {len(results)}" if isinstance(results, list) else f"a {type(results).__name__}"
    raise WrongShape(
        f"stage {stage!r}: a batch of {count} values gave {given}, not a list of {count}. With Task(batch=) return a "
        f"list with one result per value, in the same order: None where there is none, an exception where one failed"
    )


@dataclass(frozen=True, slots=True)
class Product:
    """One value a call gave: ``value`` (``DROPPED``: none), the message to send if any, the callback if any."""

    value: Any
    output: Output | None
    callback: TaskCallback | None


class Products:
    """Turns the values of one stage into products."""

    def __init__(
        self,
        stage: Stage,
        *,
        fifo: bool,
        ignore_none: bool,
        priority: object,
        json_default: Callable[[Any], Any] | None,
    ) -> None:
        self._stage = stage
        self._fifo = fifo
        self._ignore_none = ignore_none
        self._priority = priority
        self._encoder = Encoder(stage.name, json_default)

    @classmethod
    def of(cls, pipeline: Pipeline, settings: Settings, stage: Stage, priority: object) -> Self:
        """Return those of one stage of an engine; ``priority``: of this run."""
        return cls(
            stage,
            fifo=pipeline.fifo,
            ignore_none=settings.ignore_none,
            priority=priority,
            json_default=settings.json_default,
        )

    def make(self, value: Any, message: Message | None, parent: str, index: int) -> Product:
        """Return what output number ``index`` of one call means.

        Raises:
            OutputError, MessageTooLarge: the value cannot be sent.
            Exception: what the user's ``priority``, ``group`` or ``json_default`` raised.
        """
        callback = None
        if isinstance(value, TaskCallback):
            callback, value = value, value.result
        if value is EmptyTaskOutput or isinstance(value, EmptyTaskOutput):
            return Product(DROPPED, None, callback)
        if not self._stage.outputs or (value is None and self._ignore_none):
            return Product(value, None, callback)
        return Product(value, self._output(value, message, parent, index), callback)

    def _output(self, value: Any, message: Message | None, parent: str, index: int) -> Output:
        stage = self._stage
        if callable(self._priority):
            wanted = self._priority(value)
        else:
            wanted = self._priority if message is None else message.priority
        level = clamp_priority(wanted, len(stage.outputs))
        hop = hop_id(parent, stage.name, index)
        body = self._encoder.encode(value, outgoing_meta(message, message.id if message else hop, level, hop))
        return Output(stage.outputs[level], body, hop, self._group(value, hop) if self._fifo else None)

    def _group(self, value: Any, hop: str) -> str:
        return hop if self._stage.next_group is None else group_name(self._stage.next_group(value))
