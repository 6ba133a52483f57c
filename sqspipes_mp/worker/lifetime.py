"""How long a worker lives: how many messages it may have, and its planned replacement (worker)."""

from __future__ import annotations

import random
import threading

from sqspipes_mp.control import Kind
from sqspipes_mp.worker.station import Station


class Lifetime:
    """Counts messages towards ``max_tasks_per_worker``; any of the threads that run messages may call it."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self._recycling = False
        self._sharing = threading.Lock()
        station.left = _drawn(station.stage.task.max_tasks_per_worker)

    def begins(self, count: int) -> None:
        """Take note that so many messages begin."""
        if self._station.left is not None:
            with self._sharing:
                self._station.left -= count

    def ends(self) -> None:
        """Have this worker replaced if it has had all the messages it may have."""
        if self._station.left is not None and self._station.left <= 0:
            self.recycle("max_tasks_per_worker")

    def recycle(self, reason: str) -> None:
        """Have this worker replaced once it has finished what it runs."""
        with self._sharing:
            first, self._recycling = not (self._recycling or self._station.no_more.is_set()), True
        if first:
            self._station.say(Kind.RECYCLE, {"reason": reason})
            self._station.stop_receiving()


def _drawn(most: int | None) -> int | None:
    """Return after how many messages to end: up to a tenth fewer, so that workers do not all end together."""
    return None if most is None else most - random.randrange(most // 10 + 1)
