"""One exception as a pickle, without the others it refers to (worker and keeper).

A pickle holds no traceback and no links, and refers to other exceptions (members of a group, attributes) by number.
Nothing is registered with ``copyreg``, so the process of the user stays as it was.
"""

import pickle
import re
from io import BytesIO
from typing import Any

from sqspipes_mp.ipc.report.loading import Unpickler
from sqspipes_mp.ipc.report.raw import State, blank, fill, get, take
from sqspipes_mp.ipc.report.words import message_of, type_name

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_PLAIN = (str, bytes, int, float, bool, type(None))


class Numbers:
    """Numbers the exceptions reachable from one, in the order they are met."""

    def __init__(self, root: BaseException) -> None:
        self.met: list[BaseException] = []
        self._numbers: dict[int, int] = {}
        self.of(root)

    def of(self, exc: BaseException) -> int:
        # By identity: exceptions may be unhashable, and the same one may be reached twice.
        number = self._numbers.setdefault(id(exc), len(self.met))
        if number == len(self.met):
            self.met.append(exc)
        return number


def pickle_alone(exc: BaseException, numbers: Numbers, room: int) -> tuple[bytes, list[str]]:
    """Return at most ``room`` bytes (none: it cannot travel) and notes on what had to stay behind."""
    if _reduces_itself(type(exc)):
        blob, copy = _round_trip(exc, None, numbers, room)
        if not _same(exc, copy):
            return b"", []
        return blob, [] if type(copy) is type(exc) else [f"in the worker its type was {type_name(type(exc))}"]
    state = take(exc)
    blob, copy = _round_trip(exc, state, numbers, room)
    if _same(exc, copy):
        return blob, []
    dropped = _drop(exc, state, numbers, room)
    if not dropped:
        return b"", []
    blob, copy = _round_trip(exc, state, numbers, room)
    return (blob, dropped) if _same(exc, copy) else (b"", [])


def _drop(exc: BaseException, state: State, numbers: Numbers, room: int) -> list[str]:
    """Remove from ``state`` what cannot travel; return notes on it."""
    dropped: list[str] = []
    _, *parts = state
    for values in parts:
        for key, value in list(values.items()):
            blob, _ = _round_trip(exc, ((), {"value": value}, {}), numbers, room)
            if not blob:
                del values[key]
                dropped.append(f"its attribute {key!r} ({type_name(type(value))}) stayed in the worker")
    return dropped


def _round_trip(exc: BaseException, state: State | None, numbers: Numbers, room: int) -> tuple[bytes, Any]:
    """Pickle, and load as the parent will: what fails to load is known only then. ``state`` None: its own reduction."""
    file = _Bounded(room)
    # BaseException: code of the user runs here (__reduce__, __setstate__), and may call sys.exit().
    try:
        _Pickler(file, exc, state, numbers).dump(exc)
        blob = file.getvalue()
        return blob, Unpickler(blob, numbers.met.__getitem__).load()
    except BaseException:
        return b"", None


def _same(exc: BaseException, copy: Any) -> bool:
    kind = type(copy)
    # A class may say itself that it comes back as its base (botocore's modeled errors as ClientError).
    as_base = (
        kind in type(exc).__mro__ and kind not in (BaseException, Exception, object) and _reduces_itself(type(exc))
    )
    if kind is not type(exc) and not as_base:
        return False
    old, new = get(exc, "args"), get(copy, "args")
    if len(old) != len(new):
        return False
    # repr: nan equals nothing.
    if any(type(a) in _PLAIN and (type(a) is not type(b) or repr(a) != repr(b)) for a, b in zip(old, new, strict=True)):
        return False
    before, after = message_of(exc), message_of(copy)
    # Addresses differ, and a set may print in another order.
    return before == after or sorted(_ADDRESS.sub("0x", before)) == sorted(_ADDRESS.sub("0x", after))


def _reduces_itself(cls: type) -> bool:
    """Whether a class brings its own reduction; the builtin ones lose what C code keeps, or call __init__ again."""
    for name in ("__reduce_ex__", "__reduce__"):
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if owner.__module__ != "builtins":
            return True
    return False


class _TooLarge(Exception):
    """A pickle is over its limit."""


class _Bounded(BytesIO):
    """Refuses to grow beyond a limit, so that a huge attribute is never copied."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = limit

    def write(self, data: Any) -> int:
        self._left -= memoryview(data).nbytes
        if self._left < 0:
            raise _TooLarge
        return super().write(data)


class _Pickler(pickle.Pickler):
    def __init__(self, file: BytesIO, root: BaseException, state: State | None, numbers: Numbers) -> None:
        super().__init__(file, protocol=5)
        self._root = root
        self._state = state
        self._numbers = numbers

    def persistent_id(self, obj: Any) -> int | None:
        if issubclass(type(obj), BaseException) and obj is not self._root:
            return self._numbers.of(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if obj is not self._root or self._state is None:
            return NotImplemented
        group = (get(obj, "message"), get(obj, "exceptions")) if issubclass(type(obj), BaseExceptionGroup) else ()
        return blank, (type(obj), *group), self._state, None, None, fill
