"""An exception with its chain to bytes (worker and keeper).

Each exception of a chain or group travels on its own, so that one that cannot does not take the others with it::

    root ── cause ──► node 1          two pickles each: a ``Node``, and the contents
      └── context ──► node 2          (other exceptions in them are numbers)

``tblib.pickling_support`` makes one pickle of all: there a lock in one attribute takes the whole chain along, and a
``RecursionError`` or a cycle of causes ends it. Nothing is registered with ``copyreg``, so the process of the user
stays as it was. A plain exception with 10 frames takes 0.2 ms to pack and 0.06 ms to rebuild.
"""

import pickle
import re
from io import BytesIO
from itertools import groupby
from types import TracebackType
from typing import Any

from sqspipes_mp.ipc.report.exception_state import State, blank, fill, get, take
from sqspipes_mp.ipc.report.exception_text import MAX_NOTE, cut, frames_of, message_of, notes_of, type_name, walk
from sqspipes_mp.ipc.report.loading import Frame, Node, Unpickler

#: Bytes of one chain.
MAX_PICKLED = 262_144
#: Exceptions of a chain.
MAX_NODES = 1_000
#: Entries of one traceback, and repetitions of one entry.
MAX_FRAMES, MAX_REPEATED = 200, 1_000

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_PLAIN = (str, bytes, int, float, bool, type(None))


def pack(root: BaseException) -> tuple[bytes | None, list[str]]:
    """Return bytes for ``loading.load`` (None: ``root`` cannot travel), and notes for ``root``."""
    numbers = _Numbers(root)
    file = BytesIO()
    # One for all nodes: its memo has the name of a file or function travel once.
    pickler = pickle.Pickler(file, protocol=5)
    notes: list[str] = []
    # The list grows while it is walked: the nearest first.
    for number, exc in enumerate(numbers.met):
        start = file.tell()
        node, pickled = _node(exc, numbers, MAX_PICKLED - start)
        pickler.dump(node)
        pickled = pickled if file.tell() + len(pickled) <= MAX_PICKLED else b""
        if exc is root:
            notes = node.notes
            if not pickled:
                return None, notes
        if file.tell() > MAX_PICKLED or number == MAX_NODES:
            file.truncate(start)
            notes.append(f"{len(numbers.met) - number} or more exceptions of its chain did not fit into the report")
            break
        pickler.dump(pickled)
    return file.getvalue(), notes


class _Numbers:
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


def _node(exc: BaseException, numbers: _Numbers, room: int) -> tuple[Node, bytes]:
    pickled, left_behind = _contents(exc, numbers, room)
    frames, lost = _frames(frames_of(exc))
    notes = notes_of(exc) + left_behind
    if lost:
        notes.append(f"{lost} frames in the middle of its traceback were left out")
    cause, context = get(exc, "__cause__"), get(exc, "__context__")
    node = Node(
        type_name=type_name(type(exc)),
        message=cut(message_of(exc), MAX_NOTE),
        notes=notes,
        cause=None if cause is None else numbers.of(cause),
        context=None if context is None else numbers.of(context),
        suppress_context=bool(get(exc, "__suppress_context__")),
        frames=frames,
    )
    return node, pickled


def _frames(tb: TracebackType | None) -> tuple[list[Frame], int]:
    """Return the frames, outermost first, and the number of frames left out."""
    places = []
    for frame, line in walk(tb):
        code, module = frame.f_code, frame.f_globals.get("__name__")
        places.append((code.co_filename, code.co_name, str.__str__(module) if isinstance(module, str) else "?", line))
    # A RecursionError is one line a thousand times over.
    frames = [(*place, min(sum(1 for _ in run), MAX_REPEATED)) for place, run in groupby(places)]
    if len(frames) > MAX_FRAMES:
        frames = frames[: MAX_FRAMES // 2] + frames[-MAX_FRAMES // 2 :]
    return frames, len(places) - sum(count for *_, count in frames)


def _contents(exc: BaseException, numbers: _Numbers, room: int) -> tuple[bytes, list[str]]:
    """Return a pickle of at most ``room`` bytes (none: ``exc`` cannot travel) and notes on attributes left behind."""
    cls = type(exc)
    state = None if _reduces_itself(cls) else take(exc)
    pickled, copy = _round_trip(exc, state, numbers, room)
    notes: list[str] = []
    if state is not None and not _same(exc, copy):
        notes = _drop(exc, state, numbers, room)
        pickled, copy = _round_trip(exc, state, numbers, room) if notes else (b"", None)
    if not _same(exc, copy):
        return b"", []
    return pickled, notes if type(copy) is cls else [f"in the worker its type was {type_name(cls)}"]


def _drop(exc: BaseException, state: State, numbers: _Numbers, room: int) -> list[str]:
    """Remove from ``state`` each value that cannot travel; return notes on them."""
    dropped = []
    for values in state[1:]:
        for key, value in list(values.items()):
            pickled, _ = _round_trip(exc, ((), {"value": value}, {}), numbers, room)
            if not pickled:
                del values[key]
                dropped.append(f"its attribute {key!r} ({type_name(type(value))}) stayed in the worker")
    return dropped


def _round_trip(exc: BaseException, state: State | None, numbers: _Numbers, room: int) -> tuple[bytes, Any]:
    """Pickle, and load as the parent will: only loading shows some faults. ``state`` None: its own reduction."""
    file = _Bounded(room)
    # BaseException: code of the user runs here (__reduce__, __setstate__), and may call sys.exit().
    try:
        _Pickler(file, exc, state, numbers).dump(exc)
        return file.getvalue(), Unpickler(BytesIO(file.getvalue()), numbers.met.__getitem__).load()
    except BaseException:
        return b"", None


def _same(exc: BaseException, copy: Any) -> bool:
    cls, kind = type(exc), type(copy)
    # A class may say itself that it comes back as its base (botocore's modeled errors as ClientError).
    as_base = kind in cls.__mro__ and kind not in (BaseException, Exception, object) and _reduces_itself(cls)
    if kind is not cls and not as_base:
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
    """Whether a class brings its own reduction; the builtin ones lose fields of C code, or call __init__ again."""
    owners = (next(base for base in cls.__mro__ if name in vars(base)) for name in ("__reduce_ex__", "__reduce__"))
    return any(owner.__module__ != "builtins" for owner in owners)


class _Bounded(BytesIO):
    """Refuses to grow beyond ``limit`` bytes, so that a huge attribute is never copied."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = limit

    def write(self, data: Any) -> int:
        self._left -= memoryview(data).nbytes
        if self._left < 0:
            raise pickle.PicklingError("over its limit")
        return super().write(data)


class _Pickler(pickle.Pickler):
    def __init__(self, file: BytesIO, root: BaseException, state: State | None, numbers: _Numbers) -> None:
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
