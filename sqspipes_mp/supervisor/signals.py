"""Signals and orders from other threads, as readable bytes in the supervisor's wait; the old handlers come back."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

#: The byte that means ``engine.stop()``; signals come as their own number.
STOP = 0


class Wakeup:
    """A socket pair: signals and ``stop()`` write one end, the supervisor waits on the other."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def stop(self) -> None:
        """Ask for a drain, from any thread."""
        with contextlib.suppress(OSError):
            # Full: there is plenty to wake up for. Closed: the run is over.
            self._writer.send(bytes([STOP]))

    def take(self) -> bytes:
        """Return the bytes that have arrived."""
        with contextlib.suppress(BlockingIOError):
            return self.reader.recv(4096)
        return b""

    def fds(self) -> tuple[int, int]:
        return self.reader.fileno(), self._writer.fileno()

    def writer_fd(self) -> int:
        return self._writer.fileno()

    def close(self) -> None:
        self.reader.close()
        self._writer.close()


def _noted(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wake-up descriptor has told the supervisor."""


@contextlib.contextmanager
def watching(wakeup: Wakeup, numbers: tuple[signal.Signals, ...]) -> Iterator[bool]:
    """Turn ``numbers`` into bytes on ``wakeup`` within the block; off the main thread yield False and do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    old_fd = signal.set_wakeup_fd(wakeup.writer_fd(), warn_on_full_buffer=False)
    old = {number: signal.signal(number, _noted) for number in numbers}
    try:
        yield True
    finally:
        for number, handler in old.items():
            # None: it was not set from Python, so it cannot be put back; the default is the nearest.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(old_fd)
