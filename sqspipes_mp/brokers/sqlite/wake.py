"""The wait of a receive for a commit, without polling (any process that receives).

``Ear`` is one thread's wait: for the file's bell (``bell``), where the system has one, and the connection's interrupt.
``Waiter`` lends ears to the threads of a connection. ``Rhythm`` spaces the wake-ups of a receiver when other receivers
take the messages.
"""

import contextlib
import math
import os
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sqspipes_mp.brokers.sqlite.bell import Bell
from sqspipes_mp.errors import BrokerError
from sqspipes_mp.host import fork_guard as forks

#: Longest poll, seconds: poll(2) takes its time in an int of milliseconds.
_LONGEST_POLL = 3_600.0


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
    """One thread's wait: for the bell, where there is one, the connection's interrupt and the time."""

    def __init__(self, waiter: "Waiter") -> None:
        self._waiter = waiter
        self._pace = Rhythm(0.001, 0.025)
        self._deaf_pace = Rhythm(0.010, 0.050)
        self._heard = 0

    def listen(self) -> None:
        """Have ``wait`` end for commits from now on."""
        bell = self._waiter.bell
        self._heard = 0 if bell is None else bell.word

    def wait(self, seconds: float) -> None:
        """Wait until the bell rings, the interrupt comes or ``seconds`` are over; at least for the gap."""
        waiter = self._waiter
        if waiter.bell is None:
            # The receive tries at growing intervals; a try costs little more than asking for changes.
            self._deaf_pace.fruitless(0.0)
            waiter.sleep(min(seconds, self._deaf_pace.gap))
            return
        begun = time.monotonic()
        if self._pace.gap and waiter.sleep(min(seconds, self._pace.gap)):
            return
        left = seconds - (time.monotonic() - begun)
        # The interrupt sets its flag before it changes the word.
        if left > 0 and not waiter.interrupted:
            waiter.bell.wait(self._heard, left)
        self._pace.fruitless(time.monotonic() - begun)


class Waiter:
    """The waits of one connection: one interrupt for all of its threads, and an ear for each.

    ``file``: the database.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        # Reentrant: a signal handler may call ``interrupt`` while its own thread holds the lock.
        self._lock = threading.RLock()
        self._held = False
        self._lent = 0
        self._closing = False
        self._pipe = os.pipe()
        #: None before the first ear or ring, and where there can be none.
        self.bell: Bell | None = None
        self.interrupted = False
        forks.protect(self)

    def ring(self) -> None:
        """Wake the ears of all processes."""
        if (bell := self.bell or self._hung()) is not None:
            bell.ring()

    def interrupt(self) -> None:
        """Wake every ear of this connection, now and until ``receive_again``."""
        with self._lock:
            # The flag is set before the write: a thread that woke and found it unset would wake again and again.
            first, self.interrupted = not self.interrupted, True
            if first and not self._closing:
                os.write(self._pipe[1], b"!")
                if self.bell is not None:
                    self.bell.wake_own()

    def sleep(self, seconds: float) -> bool:
        """Wait until the interrupt comes or the time is over; tell whether it has come."""
        poll = select.poll()
        poll.register(self._pipe[0], select.POLLIN)
        return bool(poll.poll(math.ceil(max(0.0, min(seconds, _LONGEST_POLL)) * 1000)))

    def receive_again(self) -> None:
        """Undo ``interrupt``."""
        with self._lock:
            if self.interrupted and not self._closing:
                os.read(self._pipe[0], 1)
                self.interrupted = False

    @contextlib.contextmanager
    def ear(self) -> Iterator[Ear]:
        """Lend an ear to the calling thread for the block. Raises ``BrokerError`` after ``close``."""
        with self._lock:
            if self._closing:
                raise BrokerError(f"the connection to {self._file} is closed")
            self._hung()
            self._lent += 1
        try:
            yield Ear(self)
        finally:
            with self._lock:
                self._lent -= 1
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
        """After a fork: the child gets an interrupt of its own; the ears were its parent's threads'."""
        if child and not (self._closing and not self._lent):
            self._lent = 0
            self._close_all()
            if not self._closing:
                self._pipe = os.pipe()
                if self.interrupted:
                    os.write(self._pipe[1], b"!")
        if self._held:
            self._lock.release()
        elif child:
            self._lock = threading.RLock()

    def _hung(self) -> Bell | None:
        """Return the bell; hang it at the first call."""
        with self._lock:
            if self.bell is None and not self._closing:
                with contextlib.suppress(OSError):
                    self.bell = Bell(self._file)
            return self.bell

    def _close_all(self) -> None:
        self.bell = None
        for fd in self._pipe:
            os.close(fd)
