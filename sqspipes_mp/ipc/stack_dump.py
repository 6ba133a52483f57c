"""A worker's stack before its end: written on a fatal signal, or when the supervisor asks before a kill."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import tempfile
from multiprocessing import reduction
from typing import Any

#: The signal that asks a worker for its stack; faulthandler answers even while C code holds the GIL.
DUMP = signal.SIGUSR1
#: Most bytes read of a dump; faulthandler stops at 100 frames per thread and 100 threads.
_MOST = 1 << 20
#: The file of the frame that calls the user's function; the frames below it are the engine's.
_OUR_FRAME = f"{os.sep}sqspipes_mp{os.sep}worker{os.sep}run{os.sep}function.py"
#: The last line of a dump: faulthandler writes the main thread last, and our first frame there or, of too many frames,
#: an ellipsis.
_LAST_LINE = re.compile(r'^  (File ".*sqspipes_mp.worker.main\.py", line \d+ in worker_main|\.\.\.)$', re.MULTILINE)


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
        # Only multiprocessing pickles a file, to start a child by forkserver or spawn; the descriptor goes along.
        return _attach, (reduction.DupFd(self._fd),)

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._fd

    def arm(self) -> None:
        """Have fatal signals, and ``DUMP``, write the stacks of all threads of this process here (worker)."""
        faulthandler.enable(self._fd, all_threads=True)
        faulthandler.register(DUMP, file=self._fd, all_threads=True)

    @property
    def whole(self) -> bool:
        """Whether the worker has written its stack to the end; a dump arrives frame by frame."""
        return bool(_LAST_LINE.search(self._dump()))

    def read(self) -> str:
        """Return the frames of the user's code; empty where no stack was written."""
        return users_part(self._dump())

    def read_all(self) -> str:
        """Read the frames of all threads; empty where no stack was written."""
        return self._dump().strip()

    def clear(self) -> None:
        """Drop the stack of a worker that lives on."""
        os.ftruncate(self._fd, 0)
        # The worker's descriptor shares this one's offset, so its next dump begins the file.
        os.lseek(self._fd, 0, os.SEEK_SET)

    def close(self) -> None:
        """Close the file in this process."""
        os.close(self._fd)

    def _dump(self) -> str:
        return os.pread(self._fd, _MOST, 0).decode("utf-8", "replace")


def users_part(dump: str) -> str:
    """Reduce faulthandler's dump to its error and the frames of the user's function; without any, return all of it."""
    head, *threads = re.split(r"^(?=Current thread |Thread )", dump, flags=re.MULTILINE)
    kept = [before for before, ours, _ in (thread.partition(_OUR_FRAME) for thread in threads) if ours]
    if not kept:
        return dump.strip()
    return "\n".join([head.strip(), *(text.rpartition("\n")[0] for text in kept)]).strip()


def _attach(handle: Any) -> StackFile:
    return StackFile(handle.detach())
