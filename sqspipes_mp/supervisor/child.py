"""One child process: started, watched, killed and reaped. The order of the lines in ``start`` matters."""

from __future__ import annotations

import atexit
import contextlib
import errno
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
from multiprocessing import popen_fork, util
from multiprocessing.context import ForkProcess
from multiprocessing.process import BaseProcess, current_process
from pathlib import Path
from typing import Any

from sqspipes_mp.ipc.birth import BLOCKED, Birth
from sqspipes_mp.ipc.channel import EXIT_UNKNOWN, ParentChannel
from sqspipes_mp.supervisor.fresh import OwnForkServer, ServedProcess

#: Errors of a start that may pass: too many processes, no memory, too many files.
PASSING = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
#: Seconds that the reaping of a dead child may take; a forkserver tells of a death by pipe.
_REAP = 5.0
#: Whether a forked child of multiprocessing runs its own atexit handlers.
_CLEARS_ATEXIT = sys.version_info >= (3, 13)


@dataclass(slots=True)
class Child:
    """A child process."""

    process: BaseProcess
    pid: int
    channel: ParentChannel
    #: A descriptor that becomes readable when the child dies, even with grandchildren alive.
    watch: int
    #: Whether ``watch`` is the supervisor's to close.
    own_watch: bool
    #: The address of the caller's acknowledgements; unlike a pid it is never given to a second child.
    number: int = field(default_factory=itertools.count(1).__next__)

    def kill(self) -> None:
        """SIGKILL the child and all processes of its group."""
        self.kill_group()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def kill_group(self) -> None:
        """SIGKILL the child's process group; before the reaping, after which another process may get its number."""
        self.signal_group(signal.SIGKILL)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the child's process group, where it has one of its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)

    def reap(self) -> int:
        """Reap the child, which is dead or about to be, and return its exit code (negative: a signal)."""
        self.kill_group()
        code = self.process.exitcode
        if code is None:
            # The child is no zombie yet, or its forkserver has not told yet. Before ``join``, which listens to a pipe
            # that a grandchild keeps open.
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
        return EXIT_UNKNOWN if code is None else code

    def close(self) -> None:
        """Close the descriptors of the child's that this process has."""
        self.channel.close()
        if self.own_watch:
            os.close(self.watch)


#: Returns the function, with its arguments, that a child with this ``Birth`` runs.
Target = Callable[[Birth], tuple[Callable[..., None], tuple[Any, ...]]]


def start(
    context: Any,
    target: Target,
    *,
    name: str,
    inherited: Collection[int],
) -> Child:
    """Fork or spawn a child. Raises ``OSError`` where the system lets no process start.

    Args:
        context: a multiprocessing context.
        target: called with the child's ``Birth``; returns the function and arguments that the child runs.
        name: the process's name.
        inherited: descriptors of this process that a forked child has to close.
    """
    ours, theirs = socket.socketpair()
    forked = context.get_start_method() == "fork"
    birth = Birth(
        sock=theirs,
        close_fds=(*inherited, ours.fileno()) if forked else (),
        parent=os.getpid(),
        # The kernel kills on the death of the forking *thread*; a forkserver's children have the forkserver as parent.
        die_with=forked and threading.current_thread() is threading.main_thread(),
    )
    function, args = target(birth)
    served = isinstance(context, OwnForkServer)
    make = _ForkProcess if forked else ServedProcess if served else context.Process
    process: BaseProcess = make(target=function, args=args, name=name)
    # Else a child of a daemonic process would be daemonic, and the user's function could start no process.
    process.daemon = False
    # Signals are held back until the child has its own handlers; the handlers of this process would swallow one that
    # comes in between. Not for a forkserver: it would inherit the mask, and never hear of its children's deaths.
    held_back = BLOCKED if context.get_start_method() != "forkserver" else ()
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        serving = context.starting() if served else contextlib.nullcontext()
        with _sound_streams(), _allowed_to_start(), sharing_pages(), serving:
            process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        # With this end open here, the end of file that tells of the child's death would never come.
        theirs.close()
    pid = process.pid
    assert pid is not None
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    watch, own = _watch(process, pid)
    return Child(process, pid, ParentChannel(ours), watch, own)


@contextlib.contextmanager
def _sound_streams() -> Iterator[None]:
    """Put a null device in place of a standard stream that takes no output (``| head``, a full disk), within the block.

    multiprocessing flushes both streams before a start and at a child's end, and would start nothing. A child that is
    forked in the block keeps the null device.
    """
    broken: dict[str, Any] = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            # multiprocessing itself takes None and a closed stream.
            with contextlib.suppress(AttributeError, ValueError):
                stream.flush()
        except OSError:
            broken[name] = stream
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  (the child's)
    try:
        yield
    finally:
        for name, stream in broken.items():
            getattr(sys, name).close()
            setattr(sys, name, stream)


@contextlib.contextmanager
def _allowed_to_start() -> Iterator[None]:
    """Let a daemonic process (a worker of ``multiprocessing.Pool``, of Celery's prefork) start children in the block.

    multiprocessing forbids it, since it ends such a process with SIGTERM, which would leave children behind. Ours end
    with their parent, however that ends.
    """
    config: dict[str, Any] = getattr(current_process(), "_config", {})
    if not config.get("daemon"):
        yield
        return
    with _freezes.starting:
        config["daemon"] = False
        try:
            yield
        finally:
            config["daemon"] = True


class _Freezes:
    """The forks that are under way in this process, whose threads may run an engine each."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        #: Held by the thread for whose start a daemonic process is none.
        self.starting = threading.Lock()
        self.under_way = 0
        self.by_others = False


_freezes = _Freezes()
# A lock that another thread held at the fork would never be released in the child.
os.register_at_fork(after_in_child=_freezes.reset)


@contextlib.contextmanager
def sharing_pages() -> Iterator[None]:
    """Freeze the garbage collector's objects, so that a child forked in the block keeps their pages shared.

    The last of several threads in such a block thaws them. Where others have frozen objects already, nothing is frozen:
    thawing would thaw those too.
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
    """Tell whether ``gc.freeze`` was called elsewhere; a count alone may be of objects immortal since Python 3.12."""
    return gc.get_freeze_count() > 0 and not any(each is sys.modules for each in gc.get_objects())


class _Popen(popen_fork.Popen):
    """A fork as multiprocessing makes it, but that its pipes are closed where the kernel refuses the fork.

    multiprocessing leaves four descriptors open then, for each time that a start is tried again.
    """

    def _launch(self, process: Any) -> None:
        code = 1
        with contextlib.ExitStack() as pipes:
            parent_reads, child_writes = _pipe(pipes)
            child_reads, parent_writes = _pipe(pipes)
            self.pid = os.fork()
            pipes.pop_all()
        if self.pid:
            os.close(child_writes)
            os.close(child_reads)
            self.finalizer = util.Finalize(self, _close, (parent_reads, parent_writes))
            self.sentinel = parent_reads
            return
        try:
            if _CLEARS_ATEXIT:
                atexit._clear()
                atexit.register(util._exit_function)  # type: ignore[attr-defined]
            os.close(parent_reads)
            os.close(parent_writes)
            code = process._bootstrap(parent_sentinel=child_reads)
        finally:
            if _CLEARS_ATEXIT:
                atexit._run_exitfuncs()
            os._exit(code)


def _pipe(closed: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe that ``closed`` closes."""
    reads, writes = os.pipe()
    closed.callback(os.close, reads)
    closed.callback(os.close, writes)
    return reads, writes


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


class _ForkProcess(ForkProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> popen_fork.Popen:  # noqa: N802  (multiprocessing's name)
        return _Popen(process)


def _watch(process: BaseProcess, pid: int) -> tuple[int, bool]:
    """Return a descriptor that becomes readable on death: the sentinel stays silent while a grandchild lives."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid), True
    return process.sentinel, False
