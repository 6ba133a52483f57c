"""Ctrl-Z stops an iteration as a whole, and ``fg`` has it go on (caller).

The terminal stops the processes of its own group alone. The supervisor of an iteration and its workers are in other
groups, so the caller passes the signal on, and stops itself then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

#: Pids of the supervisors of this process's open iterations.
_supervisors: set[int] = set()


def follow(pid: int) -> None:
    """Have the supervisor ``pid`` stop and go on with this process. Not where SIGTSTP is ignored, or the user's."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
        signal.signal(signal.SIGTSTP, suspend)
    _supervisors.add(pid)


def leave(pid: int) -> None:
    """Forget a supervisor that has ended, or is about to be reaped."""
    _supervisors.discard(pid)
    if _supervisors or signal.getsignal(signal.SIGTSTP) is not suspend:
        return
    # Off the main thread the handler stays; without supervisors it does as the default does.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def suspend(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (a handler's)
    """Stop every supervisor and this process, which goes on here once it is continued; then continue them."""
    if threading.current_thread() is not threading.main_thread():
        return
    followers = list(_supervisors)
    _send(followers, signal.SIGTSTP)
    # By the default action, which the kernel leaves out where nobody could continue the process.
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    signal.signal(number, suspend)
    _send(followers, signal.SIGCONT)


#: A child takes the default again (``ipc.birth``).
suspend.of_the_engine = True  # type: ignore[attr-defined]


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


os.register_at_fork(after_in_child=_supervisors.clear)
