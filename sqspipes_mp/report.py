"""An exception as bytes, and back (packed in a worker or the keeper, rebuilt in the parent).

Every exception of a chain or group travels on its own, so that one that cannot does not take the others with it::

    root ── cause ──► node 1          node = its pickle, without traceback and links
      └── context ──► node 2                 + type, message, notes as text
                                             + traceback and links as plain numbers

A pickle refers to other exceptions (members of a group, attributes) by node number. Nothing is registered with
``copyreg``, so the process of the user stays as it was. Trust: only bytes from the private socket of an own child.
"""

import json
import pickle
import re
import struct
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, groupby
from types import FrameType, GetSetDescriptorType, MemberDescriptorType, SimpleNamespace, TracebackType
from typing import Any

import tblib

from sqspipes_mp.errors import RemoteError

#: Characters of the formatted traceback; more is cut from its middle.
MAX_TEXT = 65_536
#: Bytes of all pickles and links of one report.
MAX_PICKLED = 262_144
#: Characters of the message, of one note; notes; exceptions of a chain; entries of one traceback.
MAX_MESSAGE, MAX_NOTE, MAX_NOTES, MAX_NODES, MAX_FRAMES = 16_384, 4_096, 32, 1_000, 200
_LENGTH = struct.Struct("!I")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_RAW = vars(BaseException)
_OWN_FRAMES = "sqspipes_mp."


@dataclass(frozen=True, slots=True)
class Report:
    """An exception on its way up.

    ``text`` is the whole formatted traceback (causes and notes included, cut to MAX_TEXT), ``pickled`` what
    ``rebuild`` makes the exception of (None: it cannot travel), ``notes`` its notes and ours.
    """

    type_name: str
    message: str
    text: str
    pickled: bytes | None
    notes: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Encode for the blob of a frame: JSON, then the pickles."""
        head = _json([self.type_name, self.message, self.text, self.pickled is not None, self.notes])
        return _LENGTH.pack(len(head)) + head + (self.pickled or b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> "Report":
        """Decode; bytes that are no report become a report that says so."""
        try:
            (length,) = _LENGTH.unpack_from(data)
            name, message, text, pickled, notes = _parse(data[_LENGTH.size : _LENGTH.size + length])
            body = data[_LENGTH.size + length :] if pickled else None
            return cls(str(name), str(message), str(text), body, tuple(str(note) for note in notes))
        except Exception as error:
            why = f"{len(data)} bytes that are no report ({type(error).__name__}: {error})"
            return cls("unreadable report", why, f"{why}: {data[:200]!r}", None)


def pack_exception(
    exc: BaseException, *, stage: str, pid: int, message_id: str | None, note: str | None = None
) -> Report:
    """Describe ``exc`` for the parent; never raises, and leaves ``exc`` as it was.

    ``note``: one more note for it, before the one naming stage, worker and message.
    """
    where = f"in stage {stage!r}, worker {pid}" + (f", message {message_id}" if message_id else "")
    ours = (note, where) if note else (where,)
    # BaseException throughout: code of the user runs here (__str__, __reduce__), and it may well call sys.exit().
    try:
        name, message = _type_name(type(exc)), _cut(_message(exc), MAX_MESSAGE)
        text = _text(exc, name, message)
    except BaseException as error:
        name, message = "exception", f"could not be described ({type(error).__name__})"
        return Report(name, message, f"{name}: {message}", None, ours)
    try:
        pickled, notes = _Packer(exc).pack()
        return Report(name, message, text, pickled, (*notes, *ours))
    except BaseException as error:
        left = f"the exception itself stayed in the worker ({type(error).__name__} while packing it)"
        return Report(name, message, text, None, (left, *ours))


def rebuild(report: Report) -> BaseException:
    """Return the exception as itself, or ``RemoteError`` with the whole text; never raises, never imports a module."""
    error: BaseException | None = None
    # BaseException: unpickling runs code of the user, and a report must never take the parent down.
    try:
        if report.pickled is not None:
            error = _Loader(report.pickled).load()
            _put_notes(error, report.notes)
    except BaseException:
        error = None
    if error is None:
        error = RemoteError(report.type_name, report.message, report.text)
        _put_notes(error, report.notes)
    return error


# --- in the child: exception -> bytes ---


class _Packer:
    """Numbers the exceptions reachable from one, nearest first, and packs each on its own."""

    def __init__(self, root: BaseException) -> None:
        self.found: list[BaseException] = []
        self._numbers: dict[int, int] = {}
        self._codes: dict[tuple[str, str, str], int] = {}
        self.number(root)

    def number(self, exc: BaseException) -> int:
        # By identity: exceptions may be unhashable, and the same one may be reached twice.
        number = self._numbers.setdefault(id(exc), len(self.found))
        if number == len(self.found):
            self.found.append(exc)
        return number

    def pack(self) -> tuple[bytes | None, list[str]]:
        codes: list[tuple[str, str, str]] = []
        nodes: list[dict[str, Any]] = []
        blobs: list[bytes] = []
        root_notes: list[str] = []
        left = MAX_PICKLED
        # It grows while it is walked.
        for exc in self.found:
            blob, node, notes = self._node(exc, left)
            root_notes = root_notes if nodes else notes
            new = list(self._codes)[len(codes) :]
            cost = len(_json(node)) + len(_json(new))
            if cost + len(blob) > left:
                node["size"], blob = 0, b""
            if not nodes and not blob:
                return None, notes
            if cost > left or len(nodes) == MAX_NODES:
                rest = len(self.found) - len(nodes)
                root_notes.append(f"{rest} or more exceptions of its chain did not fit into the report")
                break
            left -= cost + len(blob)
            codes += new
            nodes.append(node)
            blobs.append(blob)
        doc = _json({"codes": codes, "nodes": nodes})
        return b"".join((_LENGTH.pack(len(doc)), doc, *blobs)), root_notes

    def _node(self, exc: BaseException, room: int) -> tuple[bytes, dict[str, Any], list[str]]:
        blob, dropped = _pickle(exc, self, room)
        frames, lost = self._frames(_get(exc, "__traceback__"))
        notes = _notes(exc) + dropped
        if lost:
            notes.append(f"{lost} frames in the middle of its traceback were left out")
        node = {
            "type": _type_name(type(exc)),
            "message": _cut(_message(exc), MAX_NOTE),
            "notes": notes,
            "cause": self._link(_get(exc, "__cause__")),
            "context": self._link(_get(exc, "__context__")),
            "suppress": bool(_get(exc, "__suppress_context__")),
            "frames": frames,
            "size": len(blob),
        }
        return blob, node, notes

    def _link(self, exc: BaseException | None) -> int | None:
        return None if exc is None else self.number(exc)

    def _frames(self, tb: TracebackType | None) -> tuple[list[tuple[int, int, int]], int]:
        """Return (code, line, repetitions) outermost first, and how many frames were left out."""
        plain: list[tuple[int, int]] = []
        for frame, line in _walk(_without_own(tb)):
            module = frame.f_globals.get("__name__")
            key = (frame.f_code.co_filename, frame.f_code.co_name, module if isinstance(module, str) else "?")
            plain.append((self._codes.setdefault(key, len(self._codes)), line))
        # A RecursionError is one line a thousand times over.
        runs = [(code, line, sum(1 for _ in run)) for (code, line), run in groupby(plain)]
        if len(runs) > MAX_FRAMES:
            runs = runs[: MAX_FRAMES // 2] + runs[-MAX_FRAMES // 2 :]
        kept = [(code, line, min(count, 1_000)) for code, line, count in runs]
        return kept, len(plain) - sum(count for _, _, count in kept)


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
    def __init__(self, file: BytesIO, root: BaseException, state: Any, packer: _Packer) -> None:
        super().__init__(file, protocol=5)
        self._root = root
        self._state = state
        self._packer = packer

    def persistent_id(self, obj: Any) -> int | None:
        if issubclass(type(obj), BaseException) and obj is not self._root:
            return self._packer.number(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if obj is not self._root or self._state is None:
            return NotImplemented
        group = (_get(obj, "message"), _get(obj, "exceptions")) if issubclass(type(obj), BaseExceptionGroup) else ()
        return _blank, (type(obj), *group), self._state, None, None, _fill


def _pickle(exc: BaseException, packer: _Packer, room: int) -> tuple[bytes, list[str]]:
    """Return the pickle of this exception alone (empty: it cannot travel) and notes on what had to stay behind."""
    if _reduces_itself(type(exc)):
        blob, copy = _attempt(exc, None, packer, room)
        if copy is None or type(copy) is type(exc):
            return blob, []
        return blob, [f"in the worker its type was {_type_name(type(exc))}"]
    attributes = {key: value for key, value in _get(exc, "__dict__").items() if key != "__notes__"}
    fields = _fields(exc)
    args = _get(exc, "args")
    blob, _ = _attempt(exc, (args, attributes, fields), packer, room)
    if blob:
        return blob, []
    dropped: list[str] = []
    for values in (attributes, fields):
        for key, value in list(values.items()):
            if not _travels(exc, value, packer, room):
                del values[key]
                dropped.append(f"its attribute {key!r} ({_type_name(type(value))}) stayed in the worker")
    if not dropped:
        return b"", []
    blob, _ = _attempt(exc, (args, attributes, fields), packer, room)
    return blob, dropped if blob else []


def _attempt(exc: BaseException, state: Any, packer: _Packer, room: int) -> tuple[bytes, BaseException | None]:
    """Pickle, and load as the parent will: what fails to load is known only then."""
    try:
        file = _Bounded(room)
        _Pickler(file, exc, state, packer).dump(exc)
        blob = file.getvalue()
        copy = _Unpickler(blob, packer.found.__getitem__).load()
        return (blob, copy) if _same(exc, copy) else (b"", None)
    except BaseException:
        return b"", None


def _travels(exc: BaseException, value: Any, packer: _Packer, room: int) -> bool:
    try:
        file = _Bounded(room)
        _Pickler(file, exc, ((), {"value": value}, {}), packer).dump(exc)
        _Unpickler(file.getvalue(), packer.found.__getitem__).load()
    except BaseException:
        return False
    return True


def _same(exc: BaseException, copy: Any) -> bool:
    kind = type(copy)
    # A class may say itself that it comes back as its base (botocore's modeled errors as ClientError).
    base = _reduces_itself(type(exc)) and issubclass(type(exc), kind) and kind not in (BaseException, Exception, object)
    if kind is not type(exc) and not base:
        return False
    old, new = _get(exc, "args"), _get(copy, "args")
    plain = (str, bytes, int, float, bool, type(None))
    if len(old) != len(new):
        return False
    # repr: nan equals nothing.
    if any(type(a) in plain and (type(a) is not type(b) or repr(a) != repr(b)) for a, b in zip(old, new, strict=False)):
        return False
    before, after = _message(exc), _message(copy)
    if before == after:
        return True
    # Addresses differ, and a set may print in another order.
    return sorted(_ADDRESS.sub("0x", before)) == sorted(_ADDRESS.sub("0x", after))


def _reduces_itself(cls: type) -> bool:
    """Whether a class brings its own reduction; the builtin ones lose what C code keeps, or call __init__ again."""
    for name in ("__reduce_ex__", "__reduce__"):
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if owner.__module__ != "builtins":
            return True
    return False


def _descriptors(cls: type) -> dict[str, Any]:
    """Find what instances keep outside ``__dict__``: fields of C code and ``__slots__``."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base in (BaseExceptionGroup, BaseException, object):
            continue
        for name, value in vars(base).items():
            in_c = base.__module__ == "builtins" and isinstance(value, GetSetDescriptorType)
            if in_c or isinstance(value, MemberDescriptorType):
                found.setdefault(name, value)
    if issubclass(cls, AttributeError):
        # Whatever the attribute was missing on: of any type and size, and Python's own pickling drops it, too.
        found.pop("obj", None)
    return found


def _fields(exc: BaseException) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, descriptor in _descriptors(type(exc)).items():
        try:
            values[name] = descriptor.__get__(exc)
        except Exception:  # noqa: S112  (unset: AttributeError; TypeError in Unicode errors)
            continue
    return values


def _without_own(tb: TracebackType | None) -> TracebackType | None:
    """Skip the engine's own frames, as long as the traceback goes on into other code."""
    inner = tb
    while inner is not None and str(inner.tb_frame.f_globals.get("__name__")).startswith(_OWN_FRAMES):
        inner = inner.tb_next
    return inner or tb


def _text(exc: BaseException, name: str, message: str) -> str:
    tb, lost = _both_ends(_without_own(_get(exc, "__traceback__")))
    start = (f"({lost} frames in the middle of the last traceback are not shown)\n",) if lost else ()
    try:
        lines = traceback.TracebackException(type(exc), exc, tb, limit=-50, compact=True).format()
        return _join(chain(start, lines))
    except BaseException:
        # Odd attributes (a __getattr__ that raises, a SyntaxError without numbers) stop the standard formatter.
        plain = (f'  File "{f.f_code.co_filename}", line {n}, in {f.f_code.co_name}\n' for f, n in _walk(tb))
        return _join((*start, *plain, f"{name}: {message}\n"))


def _walk(tb: TracebackType | None) -> Iterable[tuple[FrameType, int]]:
    while tb is not None:
        yield tb.tb_frame, _line(tb)
        tb = tb.tb_next


def _both_ends(tb: TracebackType | None) -> tuple[TracebackType | None, int]:
    """Shorten to 50 frames: who started a recursion matters as much as where it ended; formatting 1,000 is slow."""
    entries = []
    inner = tb
    while inner is not None:
        entries.append(inner)
        inner = inner.tb_next
    if len(entries) <= 50:
        return tb, 0
    for entry in reversed(entries[:25] + entries[-25:]):
        inner = TracebackType(inner, entry.tb_frame, entry.tb_lasti, _line(entry))
    return inner, len(entries) - 50


def _line(tb: TracebackType) -> int:
    # None for instructions that belong to no line.
    return tb.tb_lineno or tb.tb_frame.f_code.co_firstlineno


def _join(chunks: Iterable[str]) -> str:
    """Join up to MAX_TEXT characters, both ends kept, without ever holding more."""
    head: list[str] = []
    tail: deque[str] = deque()
    room, held, lost = MAX_TEXT // 2, 0, 0
    for whole in chunks:
        chunk = _cut(whole, MAX_TEXT // 4)
        if not tail and len(chunk) <= room:
            head.append(chunk)
            room -= len(chunk)
            continue
        tail.append(chunk)
        held += len(chunk)
        while held > MAX_TEXT // 2 - 100:
            held -= len(tail[0])
            lost += len(tail.popleft())
    gap = [f"\n... {lost} characters left out ...\n\n"] if lost else []
    return "".join((*head, *gap, *tail))


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2 - 40
    return f"{text[:half]} ... (cut: {len(text)} characters in all) ... {text[-half:]}"


def _message(exc: BaseException) -> str:
    try:
        return str(exc)
    except BaseException as error:
        return f"<str() raised {type(error).__name__}>"


def _type_name(cls: type) -> str:
    module, name = cls.__module__, cls.__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def _notes(exc: BaseException) -> list[str]:
    notes = _get(exc, "__dict__").get("__notes__", ())
    entries = notes if isinstance(notes, (list, tuple)) else [notes]
    return [_cut(note if isinstance(note, str) else _repr(note), MAX_NOTE) for note in entries[:MAX_NOTES]]


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except BaseException as error:
        return f"<repr() raised {type(error).__name__}>"


# --- both sides ---


def _get(exc: BaseException, name: str) -> Any:
    # Past any __getattr__, __getattribute__ or property of the user's class.
    raw = _RAW.get(name) or vars(BaseExceptionGroup)[name]
    return raw.__get__(exc)


def _put_notes(exc: BaseException, notes: Iterable[str]) -> None:
    # Not add_note(): a frozen dataclass refuses it.
    if listed := list(notes):
        _get(exc, "__dict__")["__notes__"] = listed


def _blank(cls: type[BaseException], *group: Any) -> BaseException:
    """Make an instance without running its ``__init__``, which may want arguments or do things."""
    base: type = cls
    while base.__module__ != "builtins":
        base = base.__base__ or BaseException
    make: Callable[..., BaseException] = base.__new__
    return make(cls, *group)


def _fill(exc: BaseException, state: tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]) -> None:
    args, attributes, fields = state
    _RAW["args"].__set__(exc, args)
    _get(exc, "__dict__").update(attributes)
    for name, descriptor in _descriptors(type(exc)).items():
        # Setting None where C code has nothing changes the text of an OSError.
        if name in fields and not _holds(descriptor, exc, fields[name]):
            descriptor.__set__(exc, fields[name])


def _holds(descriptor: Any, exc: BaseException, value: Any) -> bool:
    try:
        return descriptor.__get__(exc) is value
    except Exception:
        # Unset: AttributeError; TypeError in Unicode errors.
        return False


class _Unpickler(pickle.Unpickler):
    """Finds classes in loaded modules only: importing one may take seconds, start threads, or do anything."""

    def __init__(self, blob: bytes, other: Callable[[int], BaseException]) -> None:
        super().__init__(BytesIO(blob))
        self._other = other

    def find_class(self, module: str, name: str) -> Any:
        # A child that was not forked calls __main__ __mp_main__; multiprocessing keeps that name for it here, too.
        found = sys.modules[module]
        first, *rest = name.split(".")
        # Past a module's __getattr__, which may import.
        value = object.__getattribute__(found, "__dict__")[first]
        for part in rest:
            value = getattr(value, part)
        return value

    def persistent_load(self, pid: Any) -> BaseException:
        return self._other(pid)


# --- in the parent: bytes -> exception ---


class _Loader:
    """Rebuilds the exceptions of one report, each on its own; a ``RemoteError`` stands in for what cannot be."""

    def __init__(self, pickled: bytes) -> None:
        (length,) = _LENGTH.unpack_from(pickled)
        start = _LENGTH.size + length
        doc = _parse(pickled[_LENGTH.size : start])
        self._nodes: list[dict[str, Any]] = doc["nodes"]
        self._codes: list[list[str]] = doc["codes"]
        self._blobs: list[bytes] = []
        for node in self._nodes:
            self._blobs.append(pickled[start : start + node["size"]])
            start += node["size"]
        self._loaded: dict[int, BaseException] = {}

        self._loading: set[int] = set()
        self._tracebacks = _tracebacks(self._codes, [node["frames"] for node in self._nodes])

    def load(self) -> BaseException:
        """Return the root. Raises whatever keeps it from being itself."""
        self._loading.add(0)
        root = self._loaded[0] = self._unpickle(0)
        for number, node in enumerate(self._nodes):
            exc = self.other(number)
            _RAW["__cause__"].__set__(exc, self._link(node["cause"]))
            _RAW["__context__"].__set__(exc, self._link(node["context"]))
            # After the cause, whose setter sets it.
            _RAW["__suppress_context__"].__set__(exc, node["suppress"])
            _put_notes(exc, node["notes"])
        return root

    def other(self, number: int) -> BaseException:
        """Return any exception but the root; never raises for one that cannot be itself."""
        if number in self._loaded:
            return self._loaded[number]
        if number in self._loading or number >= len(self._nodes):
            # An attribute that refers back to what holds it, or what did not fit.
            return RemoteError("exception", "left out of the report", "")
        self._loading.add(number)
        try:
            exc = self._unpickle(number)
        except BaseException:
            exc = self._stand_in(number)
        self._loaded[number] = exc
        return exc

    def _unpickle(self, number: int) -> BaseException:
        exc = _Unpickler(self._blobs[number], self.other).load()
        if not issubclass(type(exc), BaseException):
            raise TypeError(type(exc))
        _RAW["__traceback__"].__set__(exc, self._tracebacks[number])
        found: BaseException = exc
        return found

    def _stand_in(self, number: int) -> RemoteError:
        node = self._nodes[number]
        last = f"{node['type']}: {node['message']}\n"
        return RemoteError(
            node["type"], node["message"], "".join((*traceback.format_tb(self._tracebacks[number]), last))
        )

    def _link(self, number: int | None) -> BaseException | None:
        return None if number is None or number >= len(self._nodes) else self.other(number)


def _tracebacks(codes: list[list[str]], frames: list[list[tuple[int, int, int]]]) -> list[TracebackType | None]:
    """Make real tracebacks, all sharing one frame per code object."""
    lines = {code: line for entries in frames for code, line, _ in entries}
    top: Any = None
    for number in reversed(range(len(codes))):
        filename, name, module = codes[number]
        line = lines.get(number, 1)
        code = SimpleNamespace(co_filename=filename, co_name=name)
        frame = SimpleNamespace(f_globals={"__name__": module, "__file__": filename}, f_code=code, f_lineno=line)
        top = SimpleNamespace(tb_frame=frame, tb_lineno=line, tb_next=top)
    real: list[Any] = []
    tb = tblib.Traceback(top).as_traceback() if top else None
    while tb is not None:
        real.append(tb.tb_frame)
        tb = tb.tb_next
    result: list[TracebackType | None] = []
    for entries in frames:
        made: TracebackType | None = None
        for number, line, count in reversed(entries):
            for _ in range(count):
                # -1: the positions in tblib's code are those of its own stub and would print carets at random.
                made = TracebackType(made, real[number], -1, line)
        result.append(made)
    return result


# --- JSON ---


def _json(value: Any) -> bytes:
    # ASCII: names of files may hold lone surrogates, which UTF-8 refuses.
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _parse(data: bytes) -> Any:
    return json.loads(data)
