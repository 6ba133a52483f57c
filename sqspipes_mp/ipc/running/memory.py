"""Opens the statistics of a running engine for reading (any process). Light.

By ``/proc/PID/fd/N`` where the pid means the supervisor here, else by its socket, which hands out a descriptor. Either
is read-only: the kernel refuses a writable mapping of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

from sqspipes_mp.ipc.running import fixed
from sqspipes_mp.ipc.running.folders import Engine, Unanswered

_WORD = 8


class Gone(Exception):
    """The engine has ended, or its statistics cannot be had; the text says why."""


class Memory:
    """A read-only mapping of an engine's statistics."""

    def __init__(self, fd: int, run: str) -> None:
        """Map what ``fd`` refers to, which stays the caller's to close. Raises ``Gone`` where it is not the run's."""
        size = os.fstat(fd).st_size
        if size < fixed.WORDS * _WORD or not _sealed(fd):
            raise Gone("its descriptor is no statistics memory")
        self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        #: The whole memory.
        self.view = memoryview(self._map)
        words = self.fixed_words()
        ident = bytes(self.view[fixed.RUN_ID * _WORD : (fixed.RUN_ID + 2) * _WORD]).hex()
        # The pid may meanwhile be another process's, with another run.
        if (words[fixed.MAGIC], words[fixed.SIZE], ident) != (fixed.MAGIC_WORD, size, run):
            self.close()
            raise Gone("its descriptor is not this run's statistics")

    def fixed_words(self) -> list[int]:
        """Return a copy of the words for ``health.verdict``."""
        with self.view[: fixed.WORDS * _WORD].cast("Q") as words:
            return words.tolist()

    def close(self) -> None:
        """Close the mapping; views of it must be released before."""
        self.view.release()
        self._map.close()


def open_memory(engine: Engine) -> Memory:
    """Map the statistics of an engine. Raises ``Gone``."""
    fd = _descriptor(engine)
    try:
        return Memory(fd, engine.run)
    except (OSError, ValueError) as error:
        raise Gone(str(error)) from error
    finally:
        os.close(fd)


def _descriptor(engine: Engine) -> int:
    if engine.here:
        with contextlib.suppress(OSError):
            path = f"/proc/{engine.number('pid')}/fd/{engine.number('statistics')}"
            # Not what a pipe or device of another process would do to its opener.
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    from sqspipes_mp.ipc.running.asking import ask_for_statistics  # noqa: PLC0415  (sockets load slowly)

    try:
        return ask_for_statistics(engine)
    except Unanswered as error:
        raise Gone(str(error)) from error


def _sealed(fd: int) -> bool:
    """Tell whether nobody can shrink the memory, which would end this process."""
    if not hasattr(fcntl, "F_GET_SEALS"):
        # No other program gets a descriptor there: this one was inherited from the engine.
        return True
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
