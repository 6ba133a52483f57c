"""One child process: how it is started, watched, killed and buried. The order of the lines in ``start`` matters."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

from sqspipes_mp.ipc.birth import BLOCKED, Birth
from sqspipes_mp.ipc.channel import ParentChannel

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
    #: Unlike its pid never another's: what the caller's acknowledgements are addressed to.
    number: int = field(default_factory=itertools.count(1).__next__)

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
    # Held back until the child has its own handlers, or one sent in between would be swallowed by ours. Not from a
    # forkserver, which would inherit that when this starts it, and never hear of its children's deaths.
    held_back = BLOCKED if context.get_start_method() != "forkserver" else ()
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        with sharing_pages():
            process.start()
    except BaseException as error:
        ours.close()
        if forked:
            _close_pipes_of(error)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        # Kept open here, the end of file that tells of the child's death would never come.
        theirs.close()
    pid = process.pid
    assert pid is not None
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    watch, own = _watch(process, pid)
    return Child(process, pid, ParentChannel(ours), watch, own, now)


class _Freezes:
    """How many forks are under way in this process, whose threads may run an engine each."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.under_way = 0
        self.by_others = False


_freezes = _Freezes()
# A lock that another thread held at the fork would never be released in the child.
os.register_at_fork(after_in_child=_freezes.reset)


@contextlib.contextmanager
def sharing_pages() -> Iterator[None]:
    """Freeze what exists, so that the child's collector leaves its pages shared; the last one out thaws it here.

    Where others have frozen something already, nothing is done: it could not be thawed without theirs.
    """
    with _freezes.lock:
        if not _freezes.under_way:
            _freezes.by_others = _frozen_by_others()
        _freezes.under_way += 1
        if not _freezes.by_others:
            gc.freeze()
    try:
        yield
    finally:
        with _freezes.lock:
            _freezes.under_way -= 1
            if not (_freezes.under_way or _freezes.by_others):
                gc.unfreeze()


def _frozen_by_others() -> bool:
    """Tell whether someone called ``gc.freeze``: a count alone may be what Python 3.12's collector found immortal."""
    return gc.get_freeze_count() > 0 and not any(each is sys.modules for each in gc.get_objects())


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
