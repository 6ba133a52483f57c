"""Requests to the supervisor: signals, ``stop()`` and the iterating caller. Ctrl-C becomes a drain (supervisor).

A signal becomes a byte in ``Wakeup``, which wakes the supervisor's one wait; ``Requests`` turns the byte into a drain.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from sqspipes_mp.ipc.channel import Kind, ParentChannel
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.shutdown import SECOND_AFTER
from sqspipes_mp.supervisor.stopping import Stopping

log = logging.getLogger("sqspipes_mp.supervisor")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: The byte of ``engine.stop()``; a signal's byte is its number.
_STOP = 0


class Wakeup:
    """A socket pair: signals and ``stop()`` write one end, the supervisor waits for the other."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        #: The handlers that ``catching`` has restored.
        self._old: dict[int, Any] = {}

    def stop(self) -> None:
        """Ask for a drain, from any thread."""
        with contextlib.suppress(OSError):
            # A full socket wakes the supervisor as well, and a closed one means that the run is over.
            self._writer.send(bytes([_STOP]))

    def take(self) -> bytes:
        """Return the bytes that have arrived."""
        with contextlib.suppress(BlockingIOError):
            return self.reader.recv(4096)
        return b""

    def fds(self) -> tuple[int, int]:
        """Return the descriptors of both ends."""
        return self.reader.fileno(), self._writer.fileno()

    def hand_on(self, number: int | None) -> None:
        """Call the host's own handler of SIGTERM, where that signal has ended the run and the host has one.

        It gets None as its frame.
        """
        handler = self._old.get(signal.SIGTERM)
        if number == signal.SIGTERM and callable(handler):
            handler(number, None)

    def close(self) -> None:
        """Close both ends."""
        self.reader.close()
        self._writer.close()

    @contextlib.contextmanager
    def catching(self, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
        """Turn the signals ``numbers`` into bytes within the block, then restore the old handlers.

        A SIGINT that is ignored (in the background of a shell, under nohup) stays ignored. Off the main thread, where
        Python sets no handler, nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        ours = [n for n in numbers if n is not signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
        old = self._old = {number: signal.signal(number, _noted) for number in ours}
        try:
            yield
        finally:
            for number, handler in old.items():
                # None: a handler that was not set from Python cannot be restored; the default is the nearest.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(old_fd)


def _noted(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wake-up descriptor has told the supervisor."""


#: A child takes the default again (``ipc.birth``).
_noted.of_the_engine = True  # type: ignore[attr-defined]


def hangs_up() -> bool:
    """Tell whether SIGHUP means that this process's terminal is gone: there is one, and nobody else handles it."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


class Requests:
    """Hears requests and passes them on."""

    def __init__(
        self, children: Children, events: Events, stopping: Stopping, wakeup: Wakeup, caller: ParentChannel | None
    ) -> None:
        """Prepare to listen; ``caller``: the channel to the process that iterates, None where that is this process."""
        self._children = children
        self._events = events
        self._stopping = stopping
        self._wakeup = wakeup
        self._caller = caller
        self._alone = caller is None
        #: Seconds for which the run was stopped (Ctrl-Z) since ``take_stopped`` was called last.
        self._stopped_for = 0.0
        #: The signal that ends the run.
        self.signal: int | None = None
        self._signal_at = 0.0
        #: Whether the caller waits for every queue to be empty (map).
        self.watching = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listen within the block."""
        with self._wakeup.catching(self._signals()):
            self._events.connect(self._wakeup.reader, self._on_wakeup)
            if self._caller is not None:
                self._events.connect(self._caller, self._on_caller)
                self._events.tell(self._caller, Kind.HELLO)
                self._children.own_fds.append(self._caller.fileno())
            self._children.own_fds += [*self._wakeup.fds(), *self._events.fds()]
            yield

    def stop(self) -> None:
        """Drain, as ``engine.stop()`` does; the supervisor of an iterating caller tells it as it does of SIGTERM."""
        if self._caller is None:
            self._stopping.drain("stopped")
        elif self.signal is None:
            self._on_signal(signal.SIGTERM)

    def take_stopped(self) -> float:
        """Return the seconds for which the run was stopped (Ctrl-Z) since the last call."""
        seconds, self._stopped_for = self._stopped_for, 0.0
        return seconds

    def _signals(self) -> tuple[signal.Signals, ...]:
        """Return the signals to catch."""
        # An iterating caller takes the terminal's Ctrl-C itself, and closes its iterator.
        numbers = [signal.SIGTERM, *([signal.SIGINT] if self._alone else [])]
        if self._alone and hangs_up():
            numbers.append(signal.SIGHUP)
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            numbers.append(signal.SIGTSTP)
        return tuple(numbers)

    def watched(self) -> None:
        """Take note that every queue was seen empty."""
        self.watching = False

    def _on_caller(self) -> None:
        assert self._caller is not None
        for frame in self._caller.read():
            if frame.kind in {Kind.ACK, Kind.LET_GO}:
                child = self._children.worker(frame.header["child"])
                if child is not None:
                    self._events.tell(child.channel, frame.kind, frame.header)
            elif frame.kind is Kind.DRAIN:
                self.signal = frame.header.get("signal")
                self._stopping.drain(str(frame.header.get("reason", "closed")))
            elif frame.kind is Kind.WATCH:
                self.watching = True
                self._children.tell_keeper(Kind.WATCH)
            elif frame.kind is Kind.HASTEN:
                self._stopping.hasten()
        if self._caller.eof:
            self._events.hang_up(self._caller)
            if self._stopping.begun:
                log.warning("the caller is gone: killing what still runs")
            self._stopping.drain("the caller is gone", at_once=True)
            self._stopping.hasten()
        else:
            self._events.send(self._caller)

    def _on_wakeup(self) -> None:
        for byte in self._wakeup.take():
            if byte == _STOP:
                self._stopping.drain("stopped")
            elif byte == signal.SIGTSTP:
                self._suspend()
            elif byte in _SIGNALS:
                self._on_signal(byte)

    def _suspend(self) -> None:
        """Stop the whole run for a Ctrl-Z, until this process is continued; the keeper goes on with the leases.

        The terminal stops this process alone: its children are in groups of their own.
        """
        began = time.monotonic()
        workers = [worker.child for _, worker in self._children.workers]
        for child in workers:
            child.signal_group(signal.SIGSTOP)
        # By the default action, which the kernel leaves out where nobody could continue the process.
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, _noted)
        now = time.monotonic()
        # Before the calls go on: their timeouts do not count that time.
        self._children.board.stood_still(int(now * 1e9), int((now - began) * 1e9))
        self._stopped_for += now - began
        for child in workers:
            child.signal_group(signal.SIGCONT)
        log.info("stopped for %.1f s by the terminal (Ctrl-Z); going on", now - began)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        # A second SIGTERM to an iterating caller's supervisor hastens nothing: the caller passes its own on as well.
        if self.signal is None or self._caller is not None:
            self.signal, self._signal_at = number, time.monotonic()
            self._stopping.drain(name)
        elif time.monotonic() >= self._signal_at + SECOND_AFTER:
            log.warning("%s: killing what still runs", name)
            self._stopping.hasten()
