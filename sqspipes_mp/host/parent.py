"""Ties a process's life to its parent's (any process)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

#: prctl(2).
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> bool:
    """Have the kernel kill this process when its parent's thread ends (Linux).

    ``parent``: its pid. Returns False where the parent has ended already.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return os.getppid() == parent
