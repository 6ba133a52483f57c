"""The wait of a receive for a change of the file, without polling (any process that receives).

A writer closes a writable descriptor of the -wal file after each commit that gives receivers a message (see ``file``).
``Bell`` gets that event through Linux's inotify. ``Ear`` is one thread's wait: a bell, where the system has inotify,
and the connection's interrupt. ``Waiter`` lends ears to the threads of a connection. ``Rhythm`` spaces the wake-ups of
a receiver when other receivers take the messages.
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
from sqspipes_mp.host import fork_guard as forks

#: inotify(7): IN_CLOSE_WRITE and IN_DELETE_SELF.
_CLOSE_WRITE = 0x0000_0008
_DELETE_SELF = 0x0000_0400
_libc = ctypes.CDLL(None, use_errno=True)
#: Longest poll, seconds: poll(2) takes its time in an int of milliseconds.
_LONGEST_POLL = 3_600.0


class Bell:
    """An inotify instance on one file. Raises ``OSError`` where the system has no inotify, or no instance left."""

    def __init__(self, path: str) -> None:
        if not hasattr(_libc, "inotify_init1"):
            raise OSError("no inotify on this system")
        self.fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        try:
            if _libc.inotify_add_watch(self.fd, os.fsencode(path), _CLOSE_WRITE | _DELETE_SELF) < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch")
            # Some file systems (network, user space) accept a watch and never report an event.
            os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
            if not self.clear():
                raise OSError("inotify is silent on this file system")
        except BaseException:
            os.close(self.fd)
            raise

    def clear(self) -> bool:
        """Discard the events so far; tells whether there were any."""
        try:
            return bool(os.read(self.fd, 65_536))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Close the inotify instance."""
        os.close(self.fd)


@dataclass(slots=True)
class Rhythm:
    """The gap between two tries of a receive: it grows while wake-ups bring no message. Pure."""

    #: First gap, seconds.
    shortest: float
    #: Longest gap, seconds; a wait of ten times as long sets the gap back to 0.
    longest: float
    #: Seconds to leave before the next try.
    gap: float = 0.0

    def fruitless(self, slept: float) -> None:
        """Count a try that found no message, after a wait of ``slept`` seconds."""
        if slept > 10 * self.longest:
            self.gap = 0.0
        else:
            self.gap = min(self.longest, max(self.shortest, 2 * self.gap))


class Ear:
    """One thread's wait: for the bell, where there is one, the connection's interrupt and the time.

    ``interrupt``: a descriptor that becomes readable when the connection's receives are to end.
    """

    def __init__(self, path: str, interrupt: int) -> None:
        self._path = path
        self._interrupt = interrupt
        self.bell: Bell | None = None
        #: Number of the opening (``File.opened``) whose -wal file the bell watches; 0: none yet.
        self.opened = 0
        self._pace = Rhythm(0.001, 0.025)
        self._deaf_pace = Rhythm(0.010, 0.050)

    def reset(self) -> "Ear":
        """Set the gaps back to 0 for another receive; returns the ear."""
        self._pace.gap = self._deaf_pace.gap = 0.0
        return self

    def listen(self, opened: int) -> None:
        """Watch the -wal file of opening number ``opened`` from now on; discard earlier events."""
        if self.opened != opened:
            self.close()
            with contextlib.suppress(OSError):
                self.bell = Bell(self._path)
            self.opened = opened
        elif self.bell is not None:
            self.bell.clear()

    def wait(self, seconds: float) -> None:
        """Wait until the bell rings, the interrupt comes or ``seconds`` are over; at least for the gap."""
        if self.bell is None:
            # Without inotify the receive tries at growing intervals; a try costs little more than asking for changes.
            self._deaf_pace.fruitless(0.0)
            _poll((self._interrupt,), min(seconds, self._deaf_pace.gap))
            return
        begun = time.monotonic()
        if self._pace.gap and _poll((self._interrupt,), min(seconds, self._pace.gap)):
            return
        _poll((self._interrupt, self.bell.fd), seconds - (time.monotonic() - begun))
        self._pace.fruitless(time.monotonic() - begun)

    def close(self) -> None:
        """Close the bell."""
        if self.bell is not None:
            self.bell.close()
            self.bell = None


def _poll(fds: tuple[int, ...], seconds: float) -> bool:
    """Wait until a descriptor is readable or the time is over; tell whether one is."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(math.ceil(max(0.0, min(seconds, _LONGEST_POLL)) * 1000)))


class Waiter:
    """The waits of one connection: one interrupt for all of its threads, and an ear for each."""

    def __init__(self, path: str) -> None:
        self._path = path
        # Reentrant: a signal handler may call ``interrupt`` while its own thread holds the lock.
        self._lock = threading.RLock()
        self._held = False
        #: Ears to lend again: the kernel takes long to destroy an inotify instance.
        self._idle: list[Ear] = []
        self._lent: set[Ear] = set()
        self._closing = False
        self._pipe = os.pipe()
        self.interrupted = False
        forks.protect(self)

    def interrupt(self) -> None:
        """Wake every ear, now and from now on."""
        with self._lock:
            # The flag is set before the write: a thread that woke and found it unset would wake again and again.
            first, self.interrupted = not self.interrupted, True
            if first and not self._closing:
                os.write(self._pipe[1], b"!")

    @contextlib.contextmanager
    def ear(self) -> Iterator[Ear]:
        """Lend an ear to the calling thread for the block. Raises ``BrokerError`` after ``close``."""
        with self._lock:
            if self._closing:
                raise BrokerError(f"the connection to {self._path.removesuffix('-wal')} is closed")
            ear = self._idle.pop().reset() if self._idle else Ear(self._path, self._pipe[0])
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
        """Wake every ear; close all descriptors once the last ear is back."""
        self.interrupt()
        with self._lock:
            if not self._closing:
                self._closing = True
                if not self._lent:
                    self._close_all()

    def hold(self, patience: float) -> None:
        """Before a fork: keep other threads from lending or returning ears, if possible within ``patience`` seconds."""
        self._held = self._lock.acquire(timeout=patience)

    def resume(self, *, child: bool) -> None:
        """After a fork: the child gets an interrupt of its own, and closes the ears of its parent's threads."""
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
