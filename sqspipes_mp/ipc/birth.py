"""The start of a child: its signals, its descriptors, its end with its parent; and its ``Assignment`` (children)."""

from __future__ import annotations

import contextlib
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
from sqspipes_mp.host.parent import end_with_parent
from sqspipes_mp.ipc.channel import EXIT_ORPHAN
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.stack_dump import StackFile
from sqspipes_mp.pipeline.plan import RunPlan, Seat
from sqspipes_mp.pipeline.stages import Stage

#: Points that a worker adds to its parent's, of 1000 (proc(5), oom_score_adj).
_OOM_SCORE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """The ties between a child and its parent."""

    #: The child's end of the control socket.
    sock: socket.socket
    #: Descriptors of the parent that a forked child closes; with one of them open, siblings or parent would miss an end
    #: of file.
    close_fds: tuple[int, ...]
    #: The parent's pid.
    parent: int
    #: Whether the kernel kills the child when the parent's forking thread ends.
    die_with: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The work of one child, keeper or worker."""

    plan: RunPlan
    broker: Broker
    board: Scoreboard
    birth: Birth
    #: The worker's slot; -1: the keeper.
    slot: int = -1
    #: The worker's stage and number there; None: the keeper.
    seat: Seat | None = None
    #: The worker's lease region; -1: the keeper.
    region: int = -1
    #: The file for the worker's stack; None: the keeper.
    stack: StackFile | None = None

    @property
    def stage(self) -> Stage:
        """The worker's stage."""
        assert self.seat is not None
        return self.plan.pipeline.stages[self.seat.stage]


def begin(birth: Birth) -> None:
    """Make this process a child: free of inherited wake-ups, signals and descriptors, and tied to its parent's life."""
    # The inherited wake-up descriptor is the parent's, which would hear of this child's signals.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM):
        # A handler that does nothing, not SIG_IGN: programs that the user's function starts would inherit SIG_IGN.
        signal.signal(number, _ignore)
        # systemd, for one, signals the whole group: system calls of C code of the user's go on where they can.
        signal.siginterrupt(number, False)
    for number in (signal.SIGHUP, signal.SIGTSTP):
        if getattr(signal.getsignal(number), "of_the_engine", False):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGTTOU, signal.SIGTTIN):
        # A child is in a process group of its own, in the terminal's background: with ``stty tostop`` its first output
        # would stop it, without a word. Programs that the user's function starts write and read likewise.
        signal.signal(number, signal.SIG_IGN)
    _mind_forks()
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    for fd in birth.close_fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    if birth.die_with:
        die_with_parent(birth.parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)


#: Signals held back across the fork, so that no handler of the parent's swallows one.
BLOCKED = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2})


def volunteer() -> None:
    """Have the kernel kill this worker before its parent and the keeper when memory runs out.

    A process may raise its own score without a privilege. The keeper has its parent's score: it is small, and all
    leases depend on it.
    """
    with contextlib.suppress(OSError, ValueError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + _OOM_SCORE)))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent's thread ends (Linux); the control socket's end tells too."""
    # The parent may have died before the call.
    if sys.platform.startswith("linux") and not end_with_parent(parent):
        os._exit(EXIT_ORPHAN)


def orphaned() -> None:
    """End this process at once: its parent is gone. The messages that it holds return to their queue by themselves."""
    os._exit(EXIT_ORPHAN)


#: Each thread's signal mask before its fork.
_forking = threading.local()


@functools.cache
def _mind_forks() -> None:
    """Register the three hooks below, once for a process and the processes it forks, which inherit them."""
    os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_hear_signals_again)


def _hold_signals() -> None:
    """Hold signals back before the user's function forks: the inherited handler would swallow an early one."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _release_signals() -> None:
    """Take signals again after the fork."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _hear_signals_again() -> None:
    """Have SIGTERM end a process that the user's function forked: multiprocessing sends it, and waits."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _ignore:
            signal.signal(number, usual)
    _release_signals()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the supervisor tells a child by the control socket."""
