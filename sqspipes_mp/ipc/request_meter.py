"""Counts a process's requests to the broker in the statistics (worker, keeper)."""

from __future__ import annotations

import threading
import time

from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import (
    EMPTY_RECEIVES,
    ERROR_KINDS,
    ERRORS,
    LAST_CONTACT,
    LAST_TROUBLE,
    OPERATIONS,
    REQUESTS,
    TRANSPORT,
    TRANSPORTS,
    SlotField,
)

_PLACES = {operation: place for place, operation in enumerate(OPERATIONS)}
_KINDS = {kind: place for place, kind in enumerate(ERROR_KINDS)}


class RequestMeter:
    """The ``Meter`` of one slot; any thread of its process may call it."""

    def __init__(self, board: Scoreboard, slot: int) -> None:
        """``slot``: the worker's, or the keeper's, which is the board's ``slots``."""
        self._board = board
        self._slot = slot
        self._lock = threading.Lock()

    def request(self, operation: str, error: str | None) -> None:
        """Count a request that has ended; ``error``: its kind, None where the broker did as it was asked."""
        place = _PLACES.get(operation, _PLACES["other"])
        board, slot, now = self._board, self._slot, time.monotonic_ns()
        with self._lock:
            board.add(slot, SlotField(REQUESTS + place), 1)
            if error is None:
                board.put(slot, LAST_CONTACT, now)
            else:
                board.add(slot, SlotField(ERRORS + place * len(ERROR_KINDS) + _KINDS[error]), 1)
                board.put(slot, LAST_TROUBLE, now)

    def empty(self) -> None:
        """Count a receive that brought nothing."""
        with self._lock:
            self._board.add(self._slot, EMPTY_RECEIVES, 1)

    def transport(self, name: str) -> None:
        """Note the way of the requests from now on: one of ``TRANSPORTS``."""
        self._board.put(self._slot, TRANSPORT, 1 + TRANSPORTS.index(name))
