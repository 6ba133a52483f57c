"""SIGTERM, or a terminal's SIGHUP, stops an iteration; the previous handler is restored afterwards (caller)."""

from __future__ import annotations

import contextlib
import os
import signal
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any


class Sigterm:
    """Has a signal call a bound method, without keeping its object alive. Several may come and go in any order."""

    #: A child takes the default again (``ipc.birth``).
    of_the_engine = True
    _old: Any

    def __init__(self, stop: Callable[[], None], number: signal.Signals = signal.SIGTERM) -> None:
        self._number = number
        self._stop = weakref.WeakMethod(stop)
        self._removed = self._came = False
        self._old = signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        stop = self._stop()
        if stop is not None and not self._removed:
            self._came = True
            stop()
        elif not isinstance(self._old, Sigterm):
            # ``remove`` could not restore the old handler (wrong thread, or another handler above): restore it now, and
            # deliver the signal to it.
            signal.signal(number, self._before())
            os.kill(os.getpid(), number)
        if isinstance(self._old, Sigterm):
            self._old(number, frame)

    def remove(self) -> None:
        """Restore the old handler, unless another handler is above this one or this is not the main thread."""
        self._removed = True
        before = self._before()
        with contextlib.suppress(ValueError):
            current: object = signal.getsignal(self._number)
            if current is self:
                signal.signal(self._number, before)

    def hand_on(self) -> None:
        """After ``remove``: call the host's own handler, where SIGTERM has come and the host has one.

        It gets None as its frame. Where several iterations were stopped by the signal, the last to end calls it.
        """
        before = self._before()
        if self._came and callable(before) and not isinstance(before, Sigterm):
            self._came = False
            before(int(signal.SIGTERM), None)

    def _before(self) -> Any:
        old: Any = self._old
        while isinstance(old, Sigterm) and old._removed:
            old = old._old
        # None: the old handler was not set from Python and cannot be restored; the default is nearest to it.
        return signal.SIG_DFL if old is None else old
