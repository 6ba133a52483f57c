"""Bytes back into an exception and all it is chained to (parent; packing tries it out in the worker).

The only import of tblib, which makes the frames.
"""

import pickle
import sys
import traceback
from collections.abc import Callable
from io import BytesIO
from types import TracebackType
from typing import Any

import tblib

from sqspipes_mp.errors import RemoteError
from sqspipes_mp.ipc.report.bytes import split
from sqspipes_mp.ipc.report.raw import put, put_notes


class Unpickler(pickle.Unpickler):
    """Finds classes in loaded modules only: importing one may take seconds, start threads, or do anything.

    ``other`` returns the exception of a number.
    """

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


def load(pickled: bytes) -> BaseException:
    """Return the exception that ``packing.pack`` packed. Raises whatever keeps it from being itself."""
    return _Loader(pickled).load()


class _Loader:
    """Rebuilds exceptions, each on its own; a ``RemoteError`` stands in for what cannot be."""

    def __init__(self, pickled: bytes) -> None:
        doc, bodies = split(pickled)
        self._nodes: list[dict[str, Any]] = doc["nodes"]
        self._blobs: list[bytes] = []
        start = 0
        for node in self._nodes:
            end = start + node["size"]
            self._blobs.append(bodies[start:end])
            start = end
        self._tracebacks = [_traceback(doc["codes"], node["frames"]) for node in self._nodes]
        self._loaded: dict[int, BaseException] = {}
        self._loading: set[int] = set()

    def load(self) -> BaseException:
        self._loading.add(0)
        root = self._loaded[0] = self._unpickle(0)
        for number, node in enumerate(self._nodes):
            exc = self._other(number)
            put(exc, "__cause__", self._link(node["cause"]))
            put(exc, "__context__", self._link(node["context"]))
            # After the cause, whose setter sets it.
            put(exc, "__suppress_context__", node["suppress"])
            put_notes(exc, node["notes"])
        return root

    def _other(self, number: int) -> BaseException:
        """Return any exception but the root, or what stands in for it."""
        if number in self._loaded:
            return self._loaded[number]
        if number in self._loading or number >= len(self._nodes):
            # An attribute that refers back to what holds it, or what did not fit.
            return RemoteError("exception", "left out of the report", "")
        self._loading.add(number)
        try:
            exc = self._unpickle(number)
        except KeyboardInterrupt:
            raise
        except BaseException:
            # As in ``report.rebuild``.
            exc = self._stand_in(number)
        self._loaded[number] = exc
        return exc

    def _unpickle(self, number: int) -> BaseException:
        exc = Unpickler(self._blobs[number], self._other).load()
        if not issubclass(type(exc), BaseException):
            raise TypeError(type(exc))
        put(exc, "__traceback__", self._tracebacks[number])
        found: BaseException = exc
        return found

    def _stand_in(self, number: int) -> RemoteError:
        node, tb = self._nodes[number], self._tracebacks[number]
        text = "".join((*traceback.format_tb(tb), f"{node['type']}: {node['message']}\n"))
        return RemoteError(node["type"], node["message"], text)

    def _link(self, number: int | None) -> BaseException | None:
        return None if number is None or number >= len(self._nodes) else self._other(number)


def _traceback(codes: list[tuple[str, str, str]], entries: list[tuple[int, int, int]]) -> TracebackType | None:
    """Make a traceback of (number of the code, line, repetitions), outermost first."""
    made: TracebackType | None = None
    for number, line, count in reversed(entries):
        for _ in range(count):
            entry = _entry(*codes[number], line)
            entry.tb_next = made
            made = entry
    return made


def _entry(filename: str, name: str, module: str, line: int) -> TracebackType:
    code = {"co_filename": filename, "co_name": name}
    frame = {"f_globals": {"__name__": module, "__file__": filename}, "f_locals": {}, "f_code": code, "f_lineno": line}
    entry: TracebackType = tblib.Traceback.from_dict(
        {"tb_frame": frame, "tb_lineno": line, "tb_next": None}
    ).as_traceback()
    return entry
