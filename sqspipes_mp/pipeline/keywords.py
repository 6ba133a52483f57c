"""Keyword arguments that a public method does not have (the caller's process)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def suggesting(method: F) -> F:
    """Have the ``TypeError`` of an unknown keyword argument name the nearest known one; types stay as they are."""
    known = [name for name in inspect.signature(method).parameters if name != "self"]

    @wraps(method)
    def checked(*args: Any, **keywords: Any) -> Any:
        for name in keywords.keys() - known:
            for near in get_close_matches(name, known, 1):
                called = f"{method.__qualname__}() got an unexpected keyword argument {name!r}"
                raise TypeError(f"{called}. Did you mean {near!r}?")
        return method(*args, **keywords)

    return cast("F", checked)
