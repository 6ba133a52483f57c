"""The first lines of every child process, and how it learns that its parent is gone (keeper, worker, supervisor)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.ipc.channel import EXIT_ORPHAN
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.stack_dump import StackFile
from sqspipes_mp.pipeline.plan import RunPlan, Seat
from sqspipes_mp.pipeline.stages import Stage

_PR_SET_PDEATHSIG = 1
_OOM_SCORE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """What a child is born with.

    ``sock``: its end of the control socket. ``close_fds``: descriptors of the parent that a forked child inherited
    and must not keep, or neither siblings nor parent would see ends of file. ``parent``: the pid that started it;
    ``die_with``: whether the kernel may kill it when that parent's thread ends.
    """

    sock: socket.socket
    close_fds: tuple[int, ...]
    parent: int
    die_with: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One child's orders. ``slot``, ``seat``, ``region`` and ``stack`` are a worker's; the keeper has none of them."""

    plan: RunPlan
    broker: Broker
    board: Scoreboard
    birth: Birth
    slot: int = -1
    seat: Seat | None = None
    region: int = -1
    stack: StackFile | None = None

    @property
    def stage(self) -> Stage:
        assert self.seat is not None
        return self.plan.pipeline.stages[self.seat.stage]


def begin(birth: Birth) -> None:
    """Make this process a proper child: no inherited wake-ups, signals or descriptors, and no life of its own."""
    # The inherited wake-up descriptor is the parent's: a signal to this child would show up there.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM):
        # A handler that does nothing, not SIG_IGN: programs the user's function starts would inherit that.
        signal.signal(number, _ignore)
    _mind_forks()
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    for fd in birth.close_fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    if birth.die_with:
        die_with_parent(birth.parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)


#: Signals held back across the fork, so that none is lost to a handler inherited from the parent.
BLOCKED = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2})


def volunteer() -> None:
    """Have the kernel pick this process, a worker, before its parent and the keeper when memory runs out.

    Raising the score needs no privilege. The keeper stays at its parent's: it is small, and all leases hang on it.
    """
    with contextlib.suppress(OSError, ValueError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + _OOM_SCORE)))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the parent's thread ends (Linux; elsewhere the control socket tells)."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # The parent may have died before the call above.
    if os.getppid() != parent:
        os._exit(EXIT_ORPHAN)


def orphaned() -> None:
    """End this process at once: its parent is gone, and what it holds returns to its queue by itself."""
    os._exit(EXIT_ORPHAN)


#: The mask of each thread that is forking just now.
_forking = threading.local()


@functools.cache
def _mind_forks() -> None:
    """Register what follows, once in a process and those it forks, which inherit it."""
    os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_hear_signals_again)


def _hold_signals() -> None:
    """Before the user's function forks: one that comes early would be swallowed by the handler it inherits."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _hear_signals_again() -> None:
    """In what the user's function forks: multiprocessing ends its own children with SIGTERM, and waits for them."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _ignore:
            signal.signal(number, usual)
    _release_signals()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: orders come by the control socket."""
