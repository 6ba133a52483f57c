"""The explanation why a value cannot become JSON: the place, the reason, the cure. Pure (workers, after a failure).

``scalar`` runs without a failure, for each object that ``json`` does not know.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from sqspipes_mp.messages.shorten import cut_middle

#: Most values visited in search of the place: a fraction of a second.
_BUDGET = 200_000
#: Most characters of the place.
_PATH_LENGTH = 160
_ABSENT = object()


def scalar(value: Any) -> bool | int | float | str | None:
    """Return the Python number, bool or str of a numpy scalar or 0-d array; None for anything else.

    Module and shape of the value tell, so that numpy is never imported. None also for values that ``item()`` would
    change silently: masked values (to 0.0), dates (to an int at some resolutions), longdouble (to itself), arrays of
    one element.
    """
    if type(value).__module__ != "numpy" or getattr(value, "shape", None) != ():
        return None
    if str(getattr(value, "dtype", "")).startswith(("datetime", "timedelta")):
        return None
    item = value.item()
    return item if type(item) in (bool, int, float, str) else None


def describe(value: object) -> str:
    """Return a value's type with its article: "a list", "a numpy.ndarray", "None"."""
    kind = type(value)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def explain(roots: dict[str, Any], error: BaseException, refused: object = _ABSENT) -> str:
    """Return the place in ``roots`` where the encoder failed with ``error``, the reason and the cure.

    ``roots``: the encoded values, by the name that a place begins with. ``refused``: the object without a JSON form,
    where that was the failure: the encoder does not know it, and ``json_default`` did not help.
    """
    because = "" if error.__cause__ is None else f" (json_default: {_brief(error.__cause__)})"
    for steps, problem in _problems(roots, refused):
        return f"{_path(steps)} {problem}{because}"
    if refused is not _ABSENT:
        return f"{_no_form(refused, 'something in it is')}{because}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply. Return something flatter, or one str made by a json.dumps of your own"
    return _brief(error)


def _problems(roots: dict[str, Any], refused: object) -> Iterator[tuple[list[object], str]]:
    """Walk the containers as json does, without recursion; yield the path to each problem, and the problem."""
    walks: list[Iterator[tuple[object, object]]] = [iter(roots.items())]
    steps: list[object] = [None]
    ids = [id(roots)]
    open_ids = set(ids)  # A list alone would make deep values quadratic.
    for _ in range(_BUDGET):
        entry = next(walks[-1], None)
        if entry is None:
            walks.pop()
            steps.pop()
            open_ids.discard(ids.pop())
            if not walks:
                return
            continue
        steps[-1], child = entry
        if id(child) in open_ids:
            yield steps, "contains itself. Return a copy without the cycle"
            continue
        if (problem := _leaf_problem(child, refused)) is not None:
            yield steps, problem
        elif isinstance(child, (dict, list, tuple)):
            walks.append(_entries(child))
            steps.append(None)
            ids.append(id(child))
            open_ids.add(id(child))


def _entries(container: dict[object, object] | list[object] | tuple[object, ...]) -> Iterator[tuple[object, object]]:
    # The builtin's own iteration, on a copy, as json does: a subclass or another thread may do anything.
    if isinstance(container, dict):
        return iter(dict.copy(container).items())
    items: Iterable[object] = list.copy(container) if isinstance(container, list) else tuple.__iter__(container)
    return iter(enumerate(items))


def _leaf_problem(value: object, refused: object) -> str | None:
    """Return the problem of a value that is no container, or of a dict's keys; None without one."""
    if value is refused:
        return _no_form(value, "is")
    if isinstance(value, dict):
        return _key_problem(dict.copy(value))
    if isinstance(value, (list, tuple, str)) or value is None:
        return None
    number = value if isinstance(value, (int, float)) else scalar(value)
    if isinstance(number, float) and not math.isfinite(number):
        return f"is {number}, which JSON has no form for. Return None or a str in its place"
    if isinstance(number, int) and number.bit_length() > 3 * sys.get_int_max_str_digits() > 0:
        return f"is an int of {number.bit_length():,} bits, too long for JSON. Return hex(it)"
    return None


def _key_problem(mapping: dict[object, object]) -> str | None:
    for key in mapping:
        if not isinstance(key, (str, int, float, type(None))):
            return f"has a key that is {describe(key)}, {_brief(key)}; JSON's keys are text. Make it a str first"
        if isinstance(key, float) and not math.isfinite(key):
            return f"has the key {key}, which JSON has no form for. Make it a str first"
    return None


def _no_form(value: Any, where: str) -> str:
    return f"{where} {describe(value)}, which JSON has no form for. {_cure(value)}"


def _cure(value: Any) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "Return base64.b64encode(it).decode(), or store it in S3 or a file and return its path"
    if isinstance(value, (set, frozenset)):
        return "Return sorted(it) or list(it)"
    if hasattr(type(value), "__await__"):
        return "Run it inside the task: asyncio.run(it)"
    if hasattr(type(value), "__next__"):
        return "Return list(it), or yield in the task itself so that each item is one output"
    if hasattr(type(value), "tolist") and getattr(value, "shape", None) != ():
        return "Return it.tolist(), or store it in S3 or a file and return its path"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "Return dataclasses.asdict(it)"
    if callable(getattr(type(value), "isoformat", None)):
        return "Return it.isoformat(), or give Engine(json_default=str)"
    if isinstance(value, BaseException):
        return "Raise it, or return str(it)"
    return "Return a dict or a str made of it, or give Engine(json_default=...) a function that does"


def _path(steps: list[object]) -> str:
    return cut_middle(f"{steps[0]}{''.join(f'[{_brief(step, 60)}]' for step in steps[1:])}", _PATH_LENGTH, "...")


def _brief(value: object, length: int = 100) -> str:
    """Return the repr of a value, cut to ``length`` characters; never raises."""
    try:
        text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else repr(value)
    except Exception:  # The user's own __repr__ or __str__.
        return f"<{type(value).__name__}>"
    return text if len(text) <= length else f"{text[:length]}..."
