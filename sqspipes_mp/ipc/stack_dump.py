"""Where a worker's last stack is written: by itself on a fatal signal, or when the supervisor asks before a kill."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import tempfile
from multiprocessing import reduction
from typing import Any

#: Asks a worker for its stack; answered even while C code holds the GIL.
DUMP = signal.SIGUSR1
#: Read of a dump at most: faulthandler stops at 100 frames per thread and 100 threads.
_MOST = 1 << 20
#: The frame that calls the user's function; everything below it is the engine's.
_OUR_FRAME = f"{os.sep}sqspipes_mp{os.sep}worker{os.sep}run{os.sep}function.py"


class StackFile:
    """An anonymous file that outlives its worker; made and read by the supervisor, written by the worker."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is not None:
            self._fd = fd
        elif hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("sqspipes_mp-stack")
        else:
            with tempfile.TemporaryFile() as file:
                self._fd = os.dup(file.fileno())

    def __reduce__(self) -> tuple[Any, ...]:
        # Only while multiprocessing starts a child (forkserver, spawn): the descriptor travels with it.
        return _attach, (reduction.DupFd(self._fd),)

    def fileno(self) -> int:
        return self._fd

    def arm(self) -> None:
        """In the worker: have fatal signals, and ``DUMP``, write the stacks of all threads here."""
        faulthandler.enable(self._fd, all_threads=True)
        faulthandler.register(DUMP, file=self._fd, all_threads=True)

    @property
    def begun(self) -> bool:
        """Whether anything was written yet."""
        return os.fstat(self._fd).st_size > 0

    def read(self) -> str:
        """Return the dump, reduced to what the user's code was doing; empty if there is none."""
        return users_part(os.pread(self._fd, _MOST, 0).decode("utf-8", "replace"))

    def clear(self) -> None:
        """Forget what was written: its worker lives on."""
        os.ftruncate(self._fd, 0)
        # The worker's descriptor is a copy of this one, so it writes at the beginning again.
        os.lseek(self._fd, 0, os.SEEK_SET)

    def close(self) -> None:
        os.close(self._fd)


def users_part(dump: str) -> str:
    """Keep of faulthandler's dump the error and the frames of the threads that run the user's function, above ours."""
    head, *threads = re.split(r"^(?=Current thread |Thread )", dump, flags=re.MULTILINE)
    kept = [before for before, ours, _ in (thread.partition(_OUR_FRAME) for thread in threads) if ours]
    if not kept:
        return dump.strip()
    return "\n".join([head.strip(), *(text.rpartition("\n")[0] for text in kept)]).strip()


def _attach(handle: Any) -> StackFile:
    return StackFile(handle.detach())
