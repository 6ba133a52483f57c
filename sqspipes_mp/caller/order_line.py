"""The caller's private line to its run's supervisor: ``engine.pause`` and the like (caller).

It is a socket pair of its own, never the channel of results, which belongs to the thread that iterates. The supervisor
takes it for a client of its control socket.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Collection, Mapping
from typing import Any

from sqspipes_mp.errors import OrderRefused
from sqspipes_mp.host import fork_guard as forks
from sqspipes_mp.ipc.running.asking import Unanswered, exchange

#: Seconds that an answer may take; that of ``scale`` waits a while for workers to boot.
_PATIENCE = 30.0


class OrderLine:
    """One run's line; any thread may ask."""

    def __init__(self, stages: Collection[int], *, here: bool) -> None:
        """Make the pair; ``stages``: those that the run has, ``here``: this thread is to supervise it."""
        self.stages = frozenset(stages)
        self._ours, self.theirs = socket.socketpair()
        self._ours.settimeout(_PATIENCE)
        self._supervises = threading.get_ident() if here else None
        self._lock = threading.Lock()
        forks.protect(self)

    def ask(self, order: Mapping[str, object]) -> dict[str, Any]:
        """Send an order and return the answer. Raises ``OrderRefused``."""
        if threading.get_ident() == self._supervises:
            raise OrderRefused("this thread runs the engine, and cannot wait for it; give orders from another one")
        with self._lock:
            try:
                answer, _ = exchange(self._ours, order)
            except Unanswered as why:
                raise OrderRefused(str(why)) from None
            except OSError as error:
                raise OrderRefused(f"the run does not answer, or has ended: {error}") from None
        return answer

    def close(self) -> None:
        """Close the caller's end."""
        self._ours.close()

    def hold(self, patience: float) -> None:
        """Do nothing before a fork."""

    def resume(self, *, child: bool) -> None:
        """Close the caller's end in a forked ``child``: the supervisor hears the caller alone."""
        if child:
            with contextlib.suppress(OSError):
                self._ours.close()
