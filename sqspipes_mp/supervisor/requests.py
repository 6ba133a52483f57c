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
        self, crew: Children, lines: Events, ending: Stopping, wakeup: Wakeup, caller: ParentChannel | None
    ) -> None:
        self._crew = crew
        self._lines = lines
        self._ending = ending
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
        self._lines.connect(self._wakeup.reader, self._on_wakeup)
        if self._caller is not None:
            self._lines.connect(self._caller, self._on_caller)
            # From now on signals are heard.
            self._lines.tell(self._caller, Kind.HELLO)
            self._crew.own_fds.append(self._caller.fileno())
        self._crew.own_fds += [*self._wakeup.fds(), *self._lines.fds()]

    def _on_caller(self) -> None:
        assert self._caller is not None
        for frame in self._caller.read():
            if frame.kind is Kind.ACK:
                child = self._crew.worker(frame.header["child"])
                if child is not None:
                    self._lines.tell(child.channel, Kind.ACK, {"numbers": frame.header["numbers"]})
            elif frame.kind is Kind.DRAIN:
                self.signal = frame.header.get("signal")
                self._ending.drain(str(frame.header.get("reason", "closed")))
            elif frame.kind is Kind.WATCH:
                self.watching = True
                self._crew.tell_keeper(Kind.WATCH)
            elif frame.kind is Kind.QUIT:
                self._ending.hasten()
        if self._caller.eof:
            self._lines.hang_up(self._caller)
            self._ending.drain("the caller is gone")
            self._ending.hasten()
        else:
            self._lines.send(self._caller)

    def _on_wakeup(self) -> None:
        for byte in self._wakeup.take():
            if byte == STOP:
                self._ending.drain("stopped")
            elif byte in _SIGNALS:
                # The iterating caller passes its SIGTERM on, and may not be the only one to send it.
                if self.signal is not None and self._caller is None:
                    if time.monotonic() < self._signal_at + SECOND_AFTER:
                        continue
                    log.warning("%s: killing what still runs", signal.Signals(byte).name)
                    self._ending.hasten()
                    continue
                self.signal, self._signal_at = byte, time.monotonic()
                self._ending.drain(signal.Signals(byte).name)
