"""Waiting for a change of a file without polling (any process that receives).

``Bell`` hears through Linux's inotify when someone closes a writable descriptor of the file, which writers do after
each commit that matters to others. ``Waiter`` adds the connection's interrupt and lends bells to waiting threads.
``Rhythm`` keeps wake-ups that were for others from becoming a load.
"""

import contextlib
import ctypes
import math
import os
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sqspipes_mp.errors import BrokerError
from sqspipes_mp.host import forks

_CLOSE_WRITE = 0x0000_0008
_DELETE_SELF = 0x0000_0400
_libc = ctypes.CDLL(None, use_errno=True)
_LONGEST_POLL = 3_600.0


class Bell:
    """An inotify instance on one file. Raises ``OSError`` where there is none, or none is left."""

    def __init__(self, path: str) -> None:
        if not hasattr(_libc, "inotify_init1"):
            raise OSError("no inotify on this system")
        self.fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        try:
            if _libc.inotify_add_watch(self.fd, os.fsencode(path), _CLOSE_WRITE | _DELETE_SELF) < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch")
            # Some file systems (network, user space) accept a watch and never report to it.
            os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
            if not self.clear():
                raise OSError("inotify is silent on this file system")
        except BaseException:
            os.close(self.fd)
            raise

    def clear(self) -> bool:
        """Forget what was heard; tells whether there was anything."""
        try:
            return bool(os.read(self.fd, 65_536))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Stop listening."""
        os.close(self.fd)


@dataclass(slots=True)
class Rhythm:
    """The gap to leave between two looks: none after a quiet time, growing while wake-ups bring nothing.

    All in seconds; pure.
    """

    shortest: float
    longest: float
    gap: float = 0.0

    def fruitless(self, slept: float) -> None:
        """Note that a look found nothing, and how long the wait before it was."""
        if slept > 10 * self.longest:
            self.gap = 0.0
        else:
            self.gap = min(self.longest, max(self.shortest, 2 * self.gap))


class Ear:
    """What one thread waits with: a bell where there is one, and the connection's interrupt."""

    def __init__(self, path: str, interrupt: int) -> None:
        self._path = path
        self._interrupt = interrupt
        self.bell: Bell | None = None
        #: Which opening of the file the bell belongs to.
        self.opened = 0
        self._pace = Rhythm(0.001, 0.025)
        self._deaf_pace = Rhythm(0.010, 0.050)

    def fresh(self) -> "Ear":
        """Return this ear for another wait, with the pace of a quiet time."""
        self._pace.gap = self._deaf_pace.gap = 0.0
        return self

    def listen(self, opened: int) -> None:
        """Hear, from now on, what happens to the file as opened; forget what was heard before."""
        if self.opened != opened:
            self.close()
            with contextlib.suppress(OSError):
                self.bell = Bell(self._path)
            self.opened = opened
        elif self.bell is not None:
            self.bell.clear()

    def wait(self, seconds: float) -> None:
        """Sleep until the bell rings, the interrupt or the time; at least for the gap the pace asks for."""
        if self.bell is None:
            # Looks at growing intervals: they cost as little as asking SQLite whether anything changed.
            self._deaf_pace.fruitless(0.0)
            _poll((self._interrupt,), min(seconds, self._deaf_pace.gap))
            return
        begun = time.monotonic()
        if self._pace.gap and _poll((self._interrupt,), min(seconds, self._pace.gap)):
            return
        _poll((self._interrupt, self.bell.fd), seconds - (time.monotonic() - begun))
        self._pace.fruitless(time.monotonic() - begun)

    def close(self) -> None:
        """Stop hearing."""
        if self.bell is not None:
            self.bell.close()
            self.bell = None


def _poll(fds: tuple[int, ...], seconds: float) -> bool:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(math.ceil(max(0.0, min(seconds, _LONGEST_POLL)) * 1000)))


class Waiter:
    """What the threads of one connection wait with: one interrupt for all, and an ear for each on one file."""

    def __init__(self, path: str) -> None:
        self._path = path
        # Reentrant: a signal handler may interrupt what its own thread is doing here.
        self._lock = threading.RLock()
        self._held = False
        #: Kept, since the kernel takes long to destroy an inotify instance.
        self._idle: list[Ear] = []
        self._lent: set[Ear] = set()
        self._closing = False
        self._pipe = os.pipe()
        self.interrupted = False
        forks.protect(self)

    def interrupt(self) -> None:
        """Wake every ear, now and in future."""
        with self._lock:
            # In this order: who wakes and finds it unset would look again and again until it is.
            first, self.interrupted = not self.interrupted, True
            if first and not self._closing:
                os.write(self._pipe[1], b"!")

    @contextlib.contextmanager
    def ear(self) -> Iterator[Ear]:
        """Lend an ear to the calling thread. Raises ``BrokerError`` after ``close``."""
        with self._lock:
            if self._closing:
                raise BrokerError(f"the connection to {self._path.removesuffix('-wal')} is closed")
            ear = self._idle.pop().fresh() if self._idle else Ear(self._path, self._pipe[0])
            self._lent.add(ear)
        try:
            yield ear
        finally:
            with self._lock:
                self._idle.append(ear)
                self._lent.discard(ear)
                if self._closing and not self._lent:
                    self._close_all()

    def close(self) -> None:
        """Wake every ear; close all descriptors, once the last ear is back."""
        self.interrupt()
        with self._lock:
            if not self._closing:
                self._closing = True
                if not self._lent:
                    self._close_all()

    def hold(self, patience: float) -> None:
        """Before a fork."""
        self._held = self._lock.acquire(timeout=patience)

    def resume(self, *, child: bool) -> None:
        """After a fork: a child gets descriptors of its own, and none of its parent's sleepers."""
        if child and not (self._closing and not self._lent):
            self._idle += self._lent
            self._lent = set()
            self._close_all()
            if not self._closing:
                self._pipe = os.pipe()
                if self.interrupted:
                    os.write(self._pipe[1], b"!")
        if self._held:
            self._lock.release()
        elif child:
            self._lock = threading.RLock()

    def _close_all(self) -> None:
        while self._idle:
            self._idle.pop().close()
        for fd in self._pipe:
            os.close(fd)
