"""Fresh processes by a forkserver of ours, and the question whether they can load the tasks (supervisor).

multiprocessing has one forkserver for a whole program. It keeps the environment of its first use, and belongs to the
user: its preloaded modules are not ours to choose.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import PathFinder
from multiprocessing import popen_forkserver, reduction, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen
from multiprocessing.forkserver import ForkServer, read_signed
from pathlib import Path
from types import FunctionType
from typing import Any

from sqspipes_mp.ipc.channel import EXIT_UNKNOWN

#: Modules that the forkserver imports once for its children.
_PRELOAD = ["sqspipes_mp.caller.mains"]
#: The server of the start that is under way in each thread.
_starting = threading.local()


class _Server(ForkServer):
    """A forkserver, which starts with its first child; its children have the environment of this moment."""

    def __init__(self) -> None:
        super().__init__()
        self.set_forkserver_preload(_PRELOAD)
        self._environment = dict(os.environ)
        self._owner = os.getpid()

    @property
    def fits(self) -> bool:
        """Tell whether the forkserver lives, and its children have the environment of now."""
        return self._environment == os.environ and self.lives

    @property
    def lives(self) -> bool:
        """Whether the server is a child of this process that has not ended; the host may have reaped it."""
        pid = getattr(self, "_forkserver_pid", None)
        if pid is None or self._owner != os.getpid():
            return False
        try:
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def end(self) -> None:
        """End the server, whose children have all ended."""
        if self.lives:
            # A process that the user's function has left behind would keep the server alive.
            os.kill(self._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
            self._stop()  # type: ignore[attr-defined]


class _Spare:
    """The server of the latest run that has ended: a start takes longer than many a run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def take(self) -> _Server:
        """Return the spare server where it fits, else a new one."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None and server.fits:
            return server
        if server is not None:
            server.end()
        return _Server()

    def put(self, server: _Server | None) -> None:
        """Keep a server in place of the one kept, which ends; one that lives no more is not kept."""
        with self._lock:
            former, self._server = self._server, server if server is not None and server.lives else None
        if former is not None:
            former.end()


_spare = _Spare()
atexit.register(_spare.put, None)


class OwnForkServer(ForkServerContext):
    """A context whose children come from a forkserver that no other context has meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._server: _Server | None = None

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Have processes that this thread starts in the block come from this context's server."""
        if self._server is None:
            self._server = _spare.take()
        _starting.server = self._server
        try:
            yield
        finally:
            del _starting.server

    def close(self) -> None:
        """Leave the server, whose children have all ended, to the next run."""
        server, self._server = self._server, None
        if server is not None:
            _spare.put(server)


class ServedProcess(ForkServerProcess):
    """A process of an ``OwnForkServer``."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  (multiprocessing's name)
        return _Popen(process_obj)


class _Popen(popen_forkserver.Popen):
    """As multiprocessing's, but for the server, and an exit status that nobody told is not invented."""

    def _launch(self, process_obj: Any) -> None:
        data = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj._name), data)
            reduction.dump(process_obj, data)
        finally:
            set_spawning_popen(None)
        self.sentinel, writes = _starting.server.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        # The child takes the end of this copy for the end of its parent.
        ends = os.dup(writes), self.sentinel
        self.finalizer = util.Finalize(self, util.close_fds, ends)  # type: ignore[attr-defined]
        with os.fdopen(writes, "wb") as file:
            file.write(data.getbuffer())
        self.pid = read_signed(self.sentinel)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            if not wait([self.sentinel], 0 if flag == os.WNOHANG else None):
                return None
            try:
                self.returncode = read_signed(self.sentinel)
            except (OSError, EOFError):
                self.returncode = EXIT_UNKNOWN
        code: int = self.returncode
        return code


def unloadable(handed_over: object) -> str | None:
    """Return the reason why a fresh process cannot load an object, by the way that pickle will take; None: it can.

    Args:
        handed_over: all that the children are given of the user's: tasks with ``args``, ``init`` and the like, broker.
    """
    names = _Names(io.BytesIO())
    try:
        names.dump(handed_over)
    except Exception as error:
        # pickle raises any exception that the user's objects raise.
        return f"{type(error).__name__}: {error}"
    for module, name in sorted(names.met):
        if (why := _why_absent(module)) is not None:
            return f"{name} is defined in {module}, which {why}; move it into a module"
    return None


class _Names(pickle.Pickler):
    """Notes each function and class that is pickled by its name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.met: set[tuple[str, str]] = set()
        self.dispatch_table = reduction.ForkingPickler(io.BytesIO()).dispatch_table

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (FunctionType, type)):
            self.met.add((str(obj.__module__), obj.__qualname__))
        return NotImplemented


def _why_absent(module: str) -> str | None:
    """Return the reason why a fresh process has no such module; None: it has."""
    if module == "__main__":
        return _why_no_main()
    if module.partition(".")[0] in sys.stdlib_module_names or module.startswith("sqspipes_mp."):
        return None
    place = None
    for depth, _ in enumerate(parts := module.split("."), 1):
        spec = _find(".".join(parts[:depth]), place)
        if spec is None:
            return "a fresh process cannot import (it is not on sys.path)"
        place = spec.submodule_search_locations
    return None


def _find(module: str, place: Any) -> Any:
    """Return a module's spec as a fresh process would find it, whatever this process has loaded by that name."""
    finders: list[Any] = [*sys.meta_path, PathFinder]
    for finder in finders:
        with contextlib.suppress(Exception):
            if (spec := finder.find_spec(module, place)) is not None:
                return spec
    return None


def _why_no_main() -> str | None:
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None or not Path(file).is_file() or Path(file).stem == "ipython":
        # A notebook, python -c, or standard input.
        return "is no file"
    name = getattr(getattr(main, "__spec__", None), "name", None) or ""
    if name == "__main__" or name.endswith(".__main__"):
        # multiprocessing.spawn imports no __main__ of a package (or of a zip file) again.
        return f"is {name}, which a fresh process does not import"
    return None
