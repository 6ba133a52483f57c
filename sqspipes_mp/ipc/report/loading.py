"""Bytes to an exception with its chain (parent; ``packing`` tries each exception out in the worker).

tblib makes the frames: a ``RecursionError`` with a thousand of them comes back within 3 ms.
"""

import pickle
import sys
import traceback
from collections.abc import Callable
from io import BytesIO
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import tblib

from sqspipes_mp.errors import RemoteError
from sqspipes_mp.ipc.report.exception_state import put, put_notes

#: File, function, module, line, repetitions.
Frame = tuple[str, str, str, int, int]


class Node(NamedTuple):
    """One exception of a chain, without the contents that its class must load."""

    type_name: str
    message: str
    notes: list[str]
    #: Number of the node that is its ``__cause__``.
    cause: int | None
    #: Number of the node that is its ``__context__``.
    context: int | None
    suppress_context: bool
    #: Its traceback, outermost first.
    frames: list[Frame]


class Unpickler(pickle.Unpickler):
    """Finds classes in loaded modules only: importing one may take seconds, start threads, or do anything.

    ``other`` returns the exception of a number.
    """

    def __init__(self, file: BytesIO, other: Callable[[int], BaseException]) -> None:
        super().__init__(file)
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


def load(packed: bytes) -> BaseException:
    """Return the exception that ``packing.pack`` packed. Raises any exception where it cannot be itself."""
    return _Loader(packed).load()


class _Loader:
    """Rebuilds exceptions, each on its own; a ``RemoteError`` stands in for one that cannot be itself."""

    def __init__(self, packed: bytes) -> None:
        #: By number; None while an exception is being loaded.
        self._loaded: dict[int, BaseException | None] = {}
        self._nodes: list[tuple[Node, bytes]] = []
        file = BytesIO(packed)
        stream = Unpickler(file, self._other)
        while file.tell() < len(packed):
            self._nodes.append((stream.load(), stream.load()))

    def load(self) -> BaseException:
        self._loaded[0] = None
        root = self._loaded[0] = self._unpickle(0)
        for number, (node, _) in enumerate(self._nodes):
            exc = self._other(number)
            put(exc, "__cause__", self._link(node.cause))
            put(exc, "__context__", self._link(node.context))
            # After the cause, whose setter sets it.
            put(exc, "__suppress_context__", node.suppress_context)
        return root

    def _link(self, number: int | None) -> BaseException | None:
        return None if number is None or number >= len(self._nodes) else self._other(number)

    def _other(self, number: int) -> BaseException:
        """Return any exception but the root, or its stand-in."""
        if number not in self._loaded and number < len(self._nodes):
            self._loaded[number] = None
            try:
                self._loaded[number] = self._unpickle(number)
            except KeyboardInterrupt:
                raise
            except BaseException:
                # As in ``report.rebuild``.
                self._loaded[number] = self._stand_in(number)
        found = self._loaded.get(number)
        # None: an attribute that refers back to its holder, or an exception that did not fit.
        return RemoteError("exception", "left out of the report", "") if found is None else found

    def _unpickle(self, number: int) -> BaseException:
        node, pickled = self._nodes[number]
        exc = Unpickler(BytesIO(pickled), self._other).load()
        if not issubclass(type(exc), BaseException):
            raise TypeError(type(exc))
        put(exc, "__traceback__", _traceback(node.frames))
        put_notes(exc, node.notes)
        found: BaseException = exc
        return found

    def _stand_in(self, number: int) -> RemoteError:
        node, _ = self._nodes[number]
        frames = traceback.format_tb(_traceback(node.frames))
        text = "".join((*frames, f"{node.type_name}: {node.message}\n"))
        error = RemoteError(node.type_name, node.message, text)
        for note in node.notes:
            error.add_note(note)
        return error


def _traceback(frames: list[Frame]) -> TracebackType | None:
    entry = None
    for file, function, module, line, count in reversed(frames):
        code = SimpleNamespace(co_filename=file, co_name=function)
        frame = SimpleNamespace(f_globals={"__name__": module, "__file__": file}, f_code=code, f_lineno=line)
        for _ in range(count):
            entry = SimpleNamespace(tb_frame=frame, tb_lineno=line, tb_next=entry)
    made: TracebackType | None = tblib.Traceback(entry).as_traceback() if entry else None
    return made
