"""File descriptors: a reserve for a process whose user code leaks them, and the figures of a run's need (any process).

A task that leaks descriptors leaves none to the queue service's connection either, which waits for one for ever. A
worker therefore keeps a few back from the user's code, as long as it lives by a lower limit; it is replaced once it has
needed them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable

#: Descriptors that a worker keeps back; no more than a part of its limit.
_RESERVE, _PART = 16, 4

#: Called when the reserve is first needed.
_when_short: Callable[[], None] | None = None
_kept = 0


def keep(when_short: Callable[[], None]) -> None:
    """Keep some of this process's descriptors back; ``when_short`` is called once they are needed, by any thread."""
    global _when_short, _kept
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    kept = min(_RESERVE, soft // _PART)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - kept, hard))
        _when_short, _kept = when_short, kept


def none_left() -> bool:
    """Tell whether this process has no descriptor left."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EMFILE
    return False


def relieve() -> bool:
    """Give the reserve to a connection that found no descriptor; tell whether there was one."""
    global _when_short
    when_short, _when_short = _when_short, None
    if when_short is None:
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft + _kept, hard))
    when_short()
    return True


def left() -> tuple[int, int] | None:
    """Return how many descriptors this process has open, and how many it may have; None: no limit, or unknown."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return None
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(folder)), soft  # noqa: PTH208  (names alone)
    return None
