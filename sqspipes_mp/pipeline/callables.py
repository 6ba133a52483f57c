"""Kinds of callables that a task's method can be, and the task's name. Pure; any process."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sqspipes_mp.errors import ConfigError

#: Characters of names: those that SQS allows in a queue's (Amazon SQS API Reference, CreateQueue).
NAME = re.compile(r"[A-Za-z0-9_-]+")


def is_class(method: object) -> bool:
    """Tell whether a worker must build the method before a call."""
    return inspect.isclass(method)


def is_generator(method: object) -> bool:
    """Tell whether each call yields several outputs (generator functions, also partial, or as ``__call__``)."""
    return inspect.isgeneratorfunction(method) or inspect.isgeneratorfunction(_call_of(method))


def is_async(method: object) -> bool:
    """Tell whether a call would only return a coroutine or an async generator."""
    return any(
        check(candidate)
        for check in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        for candidate in (method, _call_of(method))
    )


def task_name(method: object, name: object) -> str:
    """Return a task's name: the given one, else its method's. Raises ``ConfigError``."""
    if name is None:
        if not callable(method):
            raise ConfigError(
                "Task(method)",
                method,
                "a function or a class",
                "Give the function itself, without calling it: f, not f()",
            )
        name = _name_of(method)
        if name is None:
            raise ConfigError(
                "Task(method)",
                method,
                "something with a name, or to be given one (lambdas, partials and callable objects have none)",
                "Name it: Task(..., name='resize')",
            )
        cure = "Give it another: Task(..., name='resize')"
    else:
        cure = "For example name='resize'"
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.startswith("-"):
        raise ConfigError(
            "Task(name)", name, "letters, digits, '_' and '-' (queues are named after it), not beginning with '-'", cure
        )
    return name


def check_method(name: str, method: object) -> None:
    """Raise ``ConfigError`` for a method that a worker could not call."""
    field = f"Task({name!r}).method"
    if not callable(method):
        raise ConfigError(
            field, method, "a function or a class", "Give the function itself, without calling it: f, not f()"
        )
    if is_async(method):
        raise ConfigError(
            field,
            method,
            "a plain function: workers run no event loop",
            "Wrap it: def f(value): return asyncio.run(g(value)); threads=N runs N calls at once",
        )
    if isinstance(method, type) and not _has_call(method):
        raise ConfigError(
            field,
            method,
            "a class with __call__(self, value): it is built once per worker and called per message",
            f"Define __call__, or wrap it in a function: def to_{name}(value): return {method.__name__}(value)",
        )


def misfit(
    method: object, args: Sequence[Any], keywords: Mapping[str, Any] | None = None, *, partly: bool = False
) -> str | None:
    """Return why a method cannot be called so; None where it can, or where it has no signature.

    ``partly``: a call has further arguments.
    """
    called: Any = method
    try:
        if isinstance(method, type):
            # Calls go to an instance, which only a worker builds.
            call = next(vars(cls)["__call__"] for cls in method.__mro__ if "__call__" in vars(cls))
            called = call.__get__(object(), method) if hasattr(call, "__get__") else call
        # Not the wrapped function's signature: its decorator may add arguments.
        signature = inspect.signature(called, follow_wrapped=False)
    except Exception:
        # Built-ins have none. A fault of the user's descriptors shows in the worker.
        return None
    try:
        (signature.bind_partial if partly else signature.bind)(*args, **(keywords or {}))
    except TypeError as error:
        return str(error)
    return None


def _has_call(cls: type) -> bool:
    """Tell whether the instances of a class are callable."""
    return _call_of(cls) is not None


def _name_of(method: object) -> str | None:
    """Return a method's own name; None for lambdas, partials and objects without one."""
    name = getattr(method, "__name__", None)
    return name if isinstance(name, str) and name != "<lambda>" else None


def _call_of(method: object) -> Any:
    """Return the ``__call__`` of a callable, of a partial's function, or of a class's instances; None without one."""
    while isinstance(method, functools.partial):
        method = method.func
    for cls in (method if isinstance(method, type) else type(method)).__mro__:
        if "__call__" in vars(cls):
            call = vars(cls)["__call__"]
            return getattr(call, "__func__", call)
    return None
