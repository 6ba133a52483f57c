"""The user's declaration, ``Task``, and the two objects that a task may return instead of a value.

Pure; built in the caller, read in every process. ``Task`` is checked by its constructor, and never changes.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, cast, get_args
from urllib.parse import unquote

from sqspipes_mp.errors import ConfigError, Reject, Retry
from sqspipes_mp.pipeline.callables import check_method, is_class, is_generator, misfit, task_name
from sqspipes_mp.pipeline.checks import items, parse_size, seconds, sync_callable, whole_number
from sqspipes_mp.pipeline.foreign_bodies import Decode
from sqspipes_mp.pipeline.keywords import suggesting

#: Fate of a message whose function raised: it ends the run, is tried again later, or is dead-lettered.
Policy: TypeAlias = Literal["raise", "retry", "reject"]
OnError: TypeAlias = Policy | Callable[[Exception, int], Policy | Retry | Reject]
#: A task by its name or its index from 0.
TaskRef: TypeAlias = str | int
Workers: TypeAlias = int | Literal["auto"]
#: Environment variables of a worker, or callable(the worker's number in its stage, from 0).
Env: TypeAlias = Mapping[str, str] | Callable[[int], Mapping[str, str]]
#: The id of a value, chosen by the user.
Key: TypeAlias = str | int

_FOREIGN = re.compile(
    r"[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo|https?://[^/\s]+/\S+|arn:[^:\s]+:sqs:[^:\s]+:[^:\s]+:\S+"
)

#: Most calls that one worker runs at once, and most values of one call. Messages that are done and not deleted need
#: leases too (``ipc.leases``).
MOST_AT_ONCE = 128


@dataclass(frozen=True, slots=True, init=False)
class Task:
    """A stage as the user declares it.

    Args:
        method: a function, or a class (built once in each worker with ``init_args``, called per message, closed on a
            clean exit). A generator function gives several outputs per call. Coroutine functions are refused.
        name: letters, digits, ``_`` and ``-``; default: the function's own. Part of the queue names.
        workers: processes, from 1, or "auto": the CPUs this process may use.
        threads: calls running at once in each worker, 1 to 128; for I/O-bound tasks, whose code must be thread-safe (a
            class has one instance per worker). A timeout kills the worker; the other calls go back uncharged.
        priorities: levels of the output queues, 1 to 16 (0 is the lowest level).
        interval: seconds between calls of the stage in this engine, shared by its workers: a number, or a callable
            that returns one. Allowed for any task.
        args: further positional arguments, after the value (a source: all of them).
        kwargs: keyword arguments of each call.
        env: environment variables of each worker, set before ``setup`` and ``init``: {name: text}, or callable(index)
            that returns such, the index being the worker's number in the stage, from 0 (one GPU for each worker, say).
        input: first task only. None: it is a source. True: fed by ``put`` and ``map``. Text: a queue of others, by
            name, URL or ARN.
        decode: callable(body: str) -> value, for a queue of others, or callable(body, attributes) with both required;
            None from it deletes the message. Default: the value is the body's JSON. ``envelope`` reads messages of
            sqspipes and of other pipelines.
        init, exit: called in each worker before its first message, and after its last on a clean exit.
        timeout: seconds a call may take before its worker is killed; default: no limit.
        max_attempts: number of failed calls after which a message is dead-lettered, from 1.
        on_error: "raise", "retry", "reject", or callable(exception, attempt) -> one of these or ``Retry(delay)``;
            default: the engine's.
        max_tasks_per_worker: messages after which a worker is replaced; default: never.
        max_memory: bytes, or "2GiB": private memory over which a worker is replaced; default: no limit.
        prefetch: messages a worker holds ready; default: as many as two receives take.
        max_waiting: sources only: it rests while more messages than this can be received from the queues that it sends
            to (counted each second on SQLite, every 10 s on SQS, so it may go beyond); default: no limit.
        group: callable(value) -> FIFO group of a message that this task receives; FIFO engines only.
        tenant: callable(value) -> the tenant of a message that this task receives, None for none; standard queues only.
            Tenants take turns, so that none with many messages starves the others (SQS: fair queues).
        batch: most values of one call, 1 to 128: the method gets a list and returns a list of as many results; an
            exception instance as a result fails that message alone. Default: one value per call, no list.
        batch_wait: seconds to wait for a batch to fill, less than half of the engine's visibility timeout.
        init_args: positional arguments of a class's constructor.

    Raises:
        ConfigError: naming field, value, what is allowed, and the cure.
    """

    method: Callable[..., Any]
    name: str
    workers: Workers
    threads: int
    priorities: int
    interval: float | Callable[[], float]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] | None = dataclasses.field(hash=False)
    env: Env | None = dataclasses.field(hash=False)
    input: str | Literal[True] | None
    decode: Decode | None
    init: Callable[[], object] | None
    exit: Callable[[], object] | None
    timeout: float | None
    max_attempts: int
    on_error: OnError | None
    max_tasks_per_worker: int | None
    max_memory: int | None
    prefetch: int | None
    max_waiting: int | None
    group: Callable[[Any], str] | None
    tenant: Callable[[Any], object] | None
    batch: int | None
    batch_wait: float
    init_args: tuple[Any, ...]

    @suggesting
    def __init__(
        self,
        method: Callable[..., Any],
        *,
        name: str | None = None,
        workers: Workers = 1,
        threads: int = 1,
        priorities: int = 1,
        interval: float | Callable[[], float] = 0.0,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        env: Env | None = None,
        input: str | Literal[True] | None = None,
        decode: Decode | None = None,
        init: Callable[[], object] | None = None,
        exit: Callable[[], object] | None = None,
        timeout: float | None = None,
        max_attempts: int = 5,
        on_error: OnError | None = None,
        max_tasks_per_worker: int | None = None,
        max_memory: int | str | None = None,
        prefetch: int | None = None,
        max_waiting: int | None = None,
        group: Callable[[Any], str] | None = None,
        tenant: Callable[[Any], object] | None = None,
        batch: int | None = None,
        batch_wait: float = 0.5,
        init_args: Sequence[Any] = (),
    ) -> None:
        name = task_name(method, name)
        check_method(name, method)

        def field(keyword: str) -> str:
            return f"Task({name!r}).{keyword}"

        def optional(keyword: str, value: object, least: int, most: int | None = None) -> int | None:
            return (
                None if value is None else whole_number(field(keyword), value, least=least, most=most, also=" or None")
            )

        def hook(keyword: str, value: object) -> Callable[..., Any] | None:
            return None if value is None else sync_callable(field(keyword), value)

        values = {
            "method": method,
            "name": name,
            "workers": check_workers(field("workers"), workers),
            "threads": whole_number(
                field("threads"), threads, least=1, most=MOST_AT_ONCE, cure="More calls at once need more workers="
            ),
            "priorities": whole_number(
                field("priorities"), priorities, least=1, most=16, cure="1 is one queue, no levels"
            ),
            "interval": _interval(field("interval"), interval),
            "args": items(field("args"), args),
            "kwargs": None if kwargs is None else _keywords(field("kwargs"), kwargs, method),
            "env": None if env is None else _env(field("env"), env),
            "input": _input(field("input"), input),
            "decode": hook("decode", decode),
            "init": hook("init", init),
            "exit": hook("exit", exit),
            "timeout": None if timeout is None else seconds(field("timeout"), timeout, above=True, also=" or None"),
            "max_attempts": whole_number(field("max_attempts"), max_attempts, least=1, cure="1 gives no second try"),
            "on_error": None if on_error is None else check_on_error(field("on_error"), on_error),
            "max_tasks_per_worker": optional("max_tasks_per_worker", max_tasks_per_worker, 1),
            "max_memory": None if max_memory is None else parse_size(field("max_memory"), max_memory),
            "prefetch": optional("prefetch", prefetch, 0),
            "max_waiting": optional("max_waiting", max_waiting, 0),
            "group": hook("group", group),
            "tenant": hook("tenant", tenant),
            "batch": optional("batch", batch, 1, MOST_AT_ONCE),
            "batch_wait": seconds(field("batch_wait"), batch_wait),
            "init_args": items(field("init_args"), init_args),
        }
        for keyword, value in values.items():
            object.__setattr__(self, keyword, value)
        if self.decode is not None and not isinstance(self.input, str):
            raise ConfigError(
                field("decode"),
                decode,
                "None without input=NAME",
                "Only bodies of others need decoding; name the queue",
            )
        if self.batch is not None and self.is_generator:
            raise ConfigError(
                field("batch"),
                batch,
                "None for a generator function: a batch gives one result per value",
                "Return a list instead of yielding, or drop batch",
            )
        if self.batch is not None and self.threads > 1:
            raise ConfigError(
                field("batch"), batch, "None with threads=: one call at a time takes a batch", "Use workers= instead"
            )
        if self.init_args and not self.is_class:
            raise ConfigError(
                field("init_args"),
                init_args,
                "empty unless the method is a class",
                "Give a function args=(...) instead",
            )

    @classmethod
    def from_any(cls, item: object, position: int) -> Self:
        """Return the task of entry ``position`` of a task list: a Task, a dict of its arguments, or a callable."""
        if isinstance(item, cls):
            return item
        if isinstance(item, Mapping):
            return cls._from_mapping(item, f"tasks[{position}]")
        if callable(item):
            return cls(item)
        raise ConfigError(
            f"tasks[{position}]", item, "a Task, a dict or a callable", "Write Task(function, workers=...)"
        )

    @classmethod
    def _from_mapping(cls, item: Mapping[Any, Any], field: str) -> Self:
        known = tuple(inspect.signature(cls).parameters)
        for key in item:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1, 0.5)
                cure = f"Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{field}'s key", key, f"one of {', '.join(known)}", cure)
        if "method" not in item:
            raise ConfigError(field, item, "a dict with a 'method'", "Add 'method': the function to run")
        return cls(**item)

    @property
    def is_class(self) -> bool:
        """Whether each worker builds the method first."""
        return is_class(self.method)

    @property
    def is_generator(self) -> bool:
        """Whether each call yields several outputs."""
        return is_generator(self.method)


def interval_seconds(task: Task) -> float:
    """Return the seconds until the stage's next call. Raises ``ConfigError`` for a callable's bad result."""
    if not callable(task.interval):
        return task.interval
    return seconds(f"Task({task.name!r}).interval()", task.interval(), cure="Return one, 0 for no pause")


def environment(task: Task, index: int) -> Mapping[str, str]:
    """Return the environment variables of the stage's worker ``index``. Raises ``ConfigError`` for a bad result."""
    if not callable(task.env):
        return task.env or {}
    return _variables(f"Task({task.name!r}).env()", task.env(index))


def check_workers(field: str, value: object) -> Workers:
    """Return a number of workers, or "auto"."""
    if value == "auto" and isinstance(value, str):
        return "auto"
    return whole_number(field, value, least=1, also=' or "auto"', cure='"auto" is one per CPU this process may use')


def check_on_error(field: str, value: object) -> OnError:
    """Return a policy for a task's exceptions."""
    if isinstance(value, str) and value in get_args(Policy):
        return cast(Policy, value)
    if isinstance(value, str) or not callable(value):
        allowed = '"raise", "retry", "reject" or a callable(exception, attempt)'
        cure = '"raise" stops the engine, "retry" tries again later, "reject" puts the message aside'
        raise ConfigError(field, value, allowed, cure)
    return sync_callable(field, value)


def _keywords(field: str, value: object, method: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(field, value, "a dict {name: value} or None", "The names are the function's parameters")
    if (problem := misfit(method, (), value, partly=True)) is not None:
        raise ConfigError(field, value, f"what the function takes ({problem})")
    return dict(value)


def _env(field: str, value: object) -> Env:
    return sync_callable(field, value) if callable(value) else _variables(field, value)


def _variables(field: str, value: object) -> Mapping[str, str]:
    """Return environment variables."""
    if isinstance(value, Mapping):
        whole = all(isinstance(name, str) and isinstance(text, str) for name, text in value.items())
        if whole and not any(not name or "=" in name or "\0" in name + text for name, text in value.items()):
            return dict(value)
    allowed = "a dict {name: text} of environment variables"
    raise ConfigError(field, value, allowed, 'Write texts, without NUL: {"OMP_NUM_THREADS": "1"}')


def _interval(field: str, value: object) -> float | Callable[[], float]:
    if callable(value):
        return sync_callable(field, value, also="")
    return seconds(field, value, also=", or a callable that returns one")


def _input(field: str, value: object) -> str | Literal[True] | None:
    if value is None or value is True:
        return value
    if isinstance(value, str) and _FOREIGN.fullmatch(value):
        return _address(value)
    raise ConfigError(
        field,
        value,
        "None (a source), True (fed by put and map), or the name, URL or ARN of an existing queue",
        "Leave it out for a source" if value is False or value == "" else "",
    )


def _address(queue: str) -> str:
    """Return the name, URL or ARN of a queue; of a URL of the console, as a browser shows it, the queue's own."""
    _, console, rest = queue.partition("#/queues/")
    if console:
        queue = unquote(rest.partition("/")[0])
    return queue.rstrip("/") if "://" in queue else queue


class EmptyTaskOutput:
    """Return this (the class or an instance) from a task to send nothing on, whatever ``ignore_none`` says."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class TaskCallback:
    """Return this from a task to send ``result`` on, and to have ``callback(*callback_args)`` called after that.

    The callback runs in the worker's main thread, between messages, once the result was accepted downstream.
    """

    result: Any
    callback: Callable[..., Any]
    callback_args: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        sync_callable("TaskCallback.callback", self.callback, also="")
        # sqspipes's default is None.
        given = () if self.callback_args is None else self.callback_args
        object.__setattr__(self, "callback_args", items("TaskCallback.callback_args", given))


@dataclass(frozen=True, slots=True)
class Continue:
    """Return this from a task whose work is not done: ``state`` comes to the task again, as the same value's message.

    ``state`` (JSON) is sent to the task's own input queue, and then the message is deleted. Returned and never raised
    or yielded; a generator function returns it after its yields, a batch function as one of its results. Not in a
    source, on a queue of others, or where ``group=`` promises an order: there it is an ``OutputError``.
    """

    state: Any


#: An entry of a task list: a task, its keyword arguments in sqspipes's dict, or just its function.
TaskLike: TypeAlias = Task | Mapping[str, Any] | Callable[..., Any]
