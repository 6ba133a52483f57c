"""How long a worker lives: how many messages it may have, and its planned replacement (worker)."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.worker.context import WorkerContext

#: A limit from which it is one of several, for leaks and the like; a lower one means that it is meant to the letter.
_ROUND = 10


class Lifetime:
    """Counts messages towards ``max_tasks_per_worker``; any of the threads that run messages may call it."""

    def __init__(self, station: WorkerContext) -> None:
        self._station = station
        self._recycling = False
        self._sharing = threading.Lock()
        most = station.stage.task.max_tasks_per_worker
        station.left = None if most is None else drawn(most, random.randrange)
        #: Messages to go on with while another worker of the stage is being replaced; 0: never.
        self._more = 0 if most is None or station.threads > 1 else most // _ROUND
        stage, seats = station.stage.index, station.orders.plan.seats
        self._others = [slot for slot, seat in enumerate(seats) if seat.stage == stage and slot != station.slot]

    def begins(self, count: int) -> None:
        """Take note that so many messages begin."""
        if self._station.left is not None:
            with self._sharing:
                self._station.left -= count

    def ends(self) -> None:
        """Have this worker replaced if it has had all the messages it may have."""
        station = self._station
        if station.left is None or station.left > 0:
            return
        if self._more and self._others and not station.board.leave(station.slot, self._others):
            station.left = self._more
        else:
            self.recycle("max_tasks_per_worker")

    def recycle(self, reason: str, *, starved: bool = False) -> None:
        """Have this worker replaced once it has finished what it runs.

        ``starved``: it cannot even get at its messages, and its successor may not either.
        """
        with self._sharing:
            first, self._recycling = not (self._recycling or self._station.no_more.is_set()), True
        if first:
            self._station.say(Kind.RECYCLE, {"reason": reason, "starved": starved})
            self._station.stop_receiving()


def drawn(most: int, below: Callable[[int], int]) -> int:
    """Return after how many messages to end: up to a tenth fewer, so that workers do not all end together.

    ``below``: draws a whole number from 0 to below the given one. Pure but for that.
    """
    return most - below(most // _ROUND + 1)
