"""The caller's private line to its run's supervisor: ``engine.pause`` and the like (caller).

It is a socket pair of its own, never the channel of results, which belongs to the thread that iterates. The supervisor
takes it for a client of its control socket.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Collection, Mapping
from typing import Any

from sqspipes_mp.errors import OrderRefused
from sqspipes_mp.host import fork_guard as forks

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
        self._number = 0
        self._read = bytearray()
        forks.protect(self)

    def ask(self, order: Mapping[str, object]) -> dict[str, Any]:
        """Send an order and return the answer. Raises ``OrderRefused``."""
        if threading.get_ident() == self._supervises:
            raise OrderRefused("this thread runs the engine, and cannot wait for it; give orders from another one")
        with self._lock:
            self._number += 1
            try:
                self._ours.sendall(json.dumps({**order, "id": self._number}).encode() + b"\n")
                # An earlier order may have been given up before its answer came.
                while (answer := self._answer()).get("id") != self._number:
                    pass
            except OSError as error:
                raise OrderRefused(f"the run does not answer, or has ended: {error}") from None
        if answer.get("ok") is not True:
            raise OrderRefused(str(answer.get("error")))
        return answer

    def _answer(self) -> dict[str, Any]:
        """Return the next answer. Raises ``OSError``."""
        while (end := self._read.find(b"\n")) < 0:
            data = self._ours.recv(1 << 16)
            if not data:
                raise ConnectionResetError("it ended before it answered")
            self._read += data
        line = bytes(self._read[: end + 1])
        del self._read[: end + 1]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Close the caller's end."""
        self._ours.close()

    def hold(self, patience: float) -> None:
        """Do nothing before a fork."""

    def resume(self, *, child: bool) -> None:
        """Close the caller's end in a forked ``child``: the supervisor hears the caller alone."""
        if child:
            # A thread of the parent may have held the old one.
            self._lock = threading.Lock()
            with contextlib.suppress(OSError):
                self._ours.close()
