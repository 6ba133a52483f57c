"""One child process: how it is started, watched, killed and buried. The order of the lines in ``start`` matters."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from sqspipes_mp.control import ParentChannel
from sqspipes_mp.lifeline import BLOCKED, Birth

#: How long a child that the kernel says is dead may take to be reaped, seconds (forkserver tells by pipe).
_REAP = 5.0


@dataclass(slots=True)
class Child:
    """A running child. ``watch``: a descriptor that becomes readable when it dies, even with grandchildren alive."""

    process: BaseProcess
    pid: int
    channel: ParentChannel
    watch: int
    own_watch: bool
    started_at: float
    ready: bool = False
    stopped: bool = False
    leaving_since: float | None = None

    def kill(self) -> None:
        """SIGKILL it and whatever it started."""
        self.kill_group()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def kill_group(self) -> None:
        """SIGKILL what is left of its process group; before the reaping, while its number cannot be another's."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)

    def bury(self) -> int:
        """Reap it, dead for certain, and close its descriptors. Returns the exit code (negative: a signal)."""
        self.kill_group()
        code = self.process.exitcode
        if code is None:
            # Not yet a zombie, or its forkserver has not told yet. Asked first, since ``join`` listens to a pipe that
            # stays open in a child of the child's.
            poll = select.poll()
            poll.register(self.watch, select.POLLIN)
            poll.poll(_REAP * 1000)
            code = self.process.exitcode
        if code is None:
            self.process.join(_REAP)
            code = self.process.exitcode
        self.close()
        with contextlib.suppress(ValueError):
            self.process.close()
        return -int(signal.SIGKILL) if code is None else code

    def close(self) -> None:
        self.channel.close()
        if self.own_watch:
            os.close(self.watch)


#: Given a child's ``Birth``, what to run in it: (function, args).
Target = Callable[[Birth], tuple[Callable[..., None], tuple[Any, ...]]]


def start(
    context: Any,
    target: Target,
    *,
    name: str,
    inherited: Collection[int],
    now: float,
) -> Child:
    """Fork (or spawn) a child.

    Args:
        context: a multiprocessing context.
        target: called with the child's ``Birth``; returns (function, args) to run in it.
        name: of the process.
        inherited: descriptors of this process that a forked child has to close.
        now: monotonic seconds.
    """
    ours, theirs = socket.socketpair()
    forked = context.get_start_method() == "fork"
    birth = Birth(
        sock=theirs,
        close_fds=(*inherited, ours.fileno()) if forked else (),
        parent=os.getpid(),
        # The kernel kills on the death of the forking *thread*, and forkserver's children are not ours.
        die_with=forked and threading.current_thread() is threading.main_thread(),
    )
    function, args = target(birth)
    process: BaseProcess = context.Process(target=function, args=args, name=name)
    frozen = gc.get_freeze_count()
    # Held back until the child has its own handlers, or one sent in between would be swallowed by ours. Not from a
    # forkserver, which would inherit that when this starts it, and never hear of its children's deaths.
    held_back = BLOCKED if context.get_start_method() != "forkserver" else ()
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        # What exists now will not be collected in the child, so its pages stay shared.
        gc.freeze()
        process.start()
    except BaseException as error:
        ours.close()
        if forked:
            _close_pipes_of(error)
        raise
    finally:
        if not frozen:
            gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        # Kept open here, the end of file that tells of the child's death would never come.
        theirs.close()
    pid = process.pid
    assert pid is not None
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    watch, own = _watch(process, pid)
    return Child(process, pid, ParentChannel(ours), watch, own, now)


def _close_pipes_of(error: BaseException) -> None:
    """Close the pipes that multiprocessing made for a fork that failed; only its frame still knows them."""
    trace = error.__traceback__
    while trace is not None:
        known = trace.tb_frame.f_locals
        if trace.tb_frame.f_code.co_name == "_launch" and getattr(known.get("self"), "pid", None) is None:
            for name in ("parent_r", "child_w", "child_r", "parent_w"):
                fd = known.get(name)
                if isinstance(fd, int):
                    os.close(fd)
        trace = trace.tb_next


def _watch(process: BaseProcess, pid: int) -> tuple[int, bool]:
    """Return a descriptor that becomes readable on death: the sentinel stays silent while a grandchild lives."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid), True
    return process.sentinel, False
