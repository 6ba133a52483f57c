"""Checks of the user's values, one by one; each raises ``ConfigError``. Pure; runs before any process starts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, TypeGuard

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.pipeline.callables import is_async

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?)b|b)?\s*", re.IGNORECASE)
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|sec|m|min|h|d)?\s*", re.IGNORECASE)
_LENGTHS = {"m": 60, "min": 60, "h": 3_600, "d": 86_400}
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def is_whole(value: object) -> TypeGuard[int]:
    """Tell whether ``value`` is a whole number. A bool is none, though Python's are ints."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(
    field: str, value: object, *, least: int, most: int | None = None, also: str = "", cure: str = ""
) -> int:
    """Return ``value`` as an int from ``least`` to ``most``; ``also``: other values that the field takes."""
    if is_whole(value) and value >= least and (most is None or value <= most):
        return int(value)
    span = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    raise ConfigError(field, value, f"{span}{also}", cure)


def seconds(
    field: str,
    value: object,
    *,
    least: float = 0.0,
    above: bool = False,
    most: float = math.inf,
    also: str = "",
    cure: str = "",
) -> float:
    """Return ``value`` as a finite number of seconds from ``least`` (``above``: more than that) to ``most``."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and least <= number <= most and not (above and number == least):
            return number
    if isinstance(value, str) and not cure and (text := _DURATION.fullmatch(value)) is not None:
        cure = f"Write {float(text[1]) * _LENGTHS.get((text[2] or '').lower(), 1):.15g}"
    span = f"{'above' if above else 'from'} {least:g}" + ("" if most == math.inf else f" to {most:g}")
    raise ConfigError(field, value, f"a number of seconds {span}{also}", cure)


def flag(field: str, value: object) -> bool:
    """Return ``value`` where it is True or False."""
    if isinstance(value, bool):
        return value
    raise ConfigError(field, value, "True or False")


def sync_callable(field: str, value: object, *, also: str = " or None") -> Callable[..., Any]:
    """Return ``value`` where it is a callable whose call does its work: no coroutine function."""
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
    elif is_whole(value) and value > 0:
        return int(value)
    raise ConfigError(
        field, value, 'bytes as an int above 0, or text like "512MB" or "1.5 GiB"', "MB is 10**6 bytes, MiB 2**20"
    )
