"""Checks of single values that the user gave; each raises ``ConfigError``. Pure; runs before any process starts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.pipeline.callables import is_async

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?)b|b)?\s*", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def whole(field: str, value: object, *, least: int, most: int | None = None, also: str = "", cure: str = "") -> int:
    """Return ``value`` as an int; ``also`` names what else the field takes."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if number >= least and (most is None or number <= most):
            return number
    span = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    raise ConfigError(field, value, f"{span}{also}", cure)


def seconds(field: str, value: object, *, zero: bool, also: str = "", cure: str = "") -> float:
    """Return ``value`` as a finite number of seconds above 0, or from 0 where ``zero`` is allowed."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and (number > 0 or (zero and number == 0)):
            return number
    raise ConfigError(field, value, f"a number of seconds {'from' if zero else 'above'} 0{also}", cure)


def sync_callable(field: str, value: object, *, also: str = " or None") -> Callable[..., Any]:
    """Return ``value`` if it can be called and does its work when it is."""
    if not callable(value):
        raise ConfigError(field, value, f"a callable{also}", "Give the function itself, without calling it")
    if is_async(value):
        raise ConfigError(
            field,
            value,
            f"a plain callable{also}: a coroutine function's call would do nothing",
            "Write a plain function that runs it: asyncio.run(...)",
        )
    return value


def items(field: str, value: object) -> tuple[Any, ...]:
    """Return a tuple or list as a tuple."""
    if isinstance(value, (tuple, list)):
        return tuple(value)
    keyword = field.rpartition(".")[2]
    cure = "" if value is None else f"Write {keyword}=({value!r:.80},)"
    raise ConfigError(field, value, "a tuple or list", cure or f"Leave it out for none: {keyword}=()")


def parse_size(field: str, value: object) -> int:
    """Return a number of bytes: an int, or text such as "512MB" (10**6) or "2GiB" (2**30)."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is not None:
            number, unit, binary = match.groups()
            size = int(Fraction(number) * (1024 if binary else 1000) ** _POWERS.get((unit or "").lower(), 0))
            if size > 0:
                return size
    elif isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0:
        return int(value)
    raise ConfigError(
        field, value, 'bytes as an int above 0, or text like "512MB" or "1.5 GiB"', "MB is 10**6 bytes, MiB 2**20"
    )
