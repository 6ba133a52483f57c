"""Orders to the supervisor: signals, ``stop()``, the iterating caller. Ctrl-C becomes a drain here (supervisor)."""

from __future__ import annotations

import logging
import signal
import time

from sqspipes_mp.ipc.channel import Kind, ParentChannel
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.shutdown import SECOND_AFTER
from sqspipes_mp.supervisor.signals import STOP, Wakeup
from sqspipes_mp.supervisor.stopping import Stopping

log = logging.getLogger("sqspipes_mp.supervisor")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Requests:
    """Hears them and passes them on. ``caller``: the line to the process that iterates, where that is another one."""

    def __init__(
        self, children: Children, events: Events, stopping: Stopping, wakeup: Wakeup, caller: ParentChannel | None
    ) -> None:
        self._children = children
        self._events = events
        self._stopping = stopping
        self._wakeup = wakeup
        self._caller = caller
        # A terminal's Ctrl-C is the iterating caller's to take; it closes its iterator.
        self.signals = _SIGNALS if caller is None else (signal.SIGTERM,)
        #: The signal that ends the run.
        self.signal: int | None = None
        self._signal_at = 0.0
        #: Whether the caller waits for every queue to be empty (map).
        self.watching = False

    def connect(self) -> None:
        """Listen from now on."""
        self._events.connect(self._wakeup.reader, self._on_wakeup)
        if self._caller is not None:
            self._events.connect(self._caller, self._on_caller)
            # From now on signals are heard.
            self._events.tell(self._caller, Kind.HELLO)
            self._children.own_fds.append(self._caller.fileno())
        self._children.own_fds += [*self._wakeup.fds(), *self._events.fds()]

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
            self._stopping.drain("the caller is gone")
            self._stopping.hasten()
        else:
            self._events.send(self._caller)

    def _on_wakeup(self) -> None:
        for byte in self._wakeup.take():
            if byte == STOP:
                self._stopping.drain("stopped")
            elif byte in _SIGNALS:
                # The iterating caller passes its SIGTERM on, and may not be the only one to send it.
                if self.signal is not None and self._caller is None:
                    if time.monotonic() < self._signal_at + SECOND_AFTER:
                        continue
                    log.warning("%s: killing what still runs", signal.Signals(byte).name)
                    self._stopping.hasten()
                    continue
                self.signal, self._signal_at = byte, time.monotonic()
                self._stopping.drain(signal.Signals(byte).name)
