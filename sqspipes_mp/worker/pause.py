"""A worker's pause: it finishes its calls, gives back what it holds, and begins nothing until resumed (worker).

The stage's word on the scoreboard says whether the stage is paused. The supervisor's order only has a worker look: a
thread that runs messages reads the word before each call, since no order is heard while C code keeps the GIL.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import LeaseState
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.send.outbox import Outbox
from sqspipes_mp.worker.send.outgoing import Release


class Pause:
    """Follows the board; any thread may have it look."""

    def __init__(self, context: WorkerContext, ready: Ready, outbox: Outbox) -> None:
        self._context = context
        self._ready = ready
        self._outbox = outbox
        self._lock = threading.Lock()
        #: Whether this worker is paused.
        self.paused = False
        #: Whether the stage's workers have stopped receiving, so that messages given back stay in the queue.
        self._released = False
        #: Number of the newest order, and of the one that was answered.
        self._order = self._answered = 0

    def follow(self, order: int | None = None) -> None:
        """Pause, or go on, as the board says; ``order``: the number of the order to look."""
        with self._lock:
            if order is not None:
                self._order = order
            if self._context.paused is not self.paused:
                self.paused, self._released = not self.paused, False
                self._switch()
        self._context.demand.set()

    def _switch(self) -> None:
        context = self._context
        if self.paused:
            context.hold.set()
            context.connection.interrupt()
        else:
            context.hold.clear()
            context.connection.receive_again()
        # The worker may have been told to end meanwhile.
        if context.full_stop.is_set():
            context.hold.set()
        if context.no_more.is_set():
            context.connection.interrupt()
        self._ready.halt(halted=self.paused)

    def release(self) -> None:
        """Give back what is held: no worker of the stage receives any more."""
        with self._lock:
            self._released = self.paused
        self.give_back(waits=False)

    def give_back(self, *, waits: bool = True) -> None:
        """Give back what came, or was not begun, after ``release``; ``waits``: as of ``Outbox.put``."""
        if self._released and (held := self._ready.take_all()):
            self._outbox.put(Release(tuple(held), 0.0), waits=waits)

    def not_begun(self, deliveries: Iterable[Delivery]) -> None:
        """Take messages whose call is not to begin, as it would have, because of the pause."""
        taken = tuple(deliveries)
        for delivery in taken:
            self._context.leases.set_state(delivery.lease, LeaseState.HELD)
        self.follow()
        self._ready.put_back(taken)
        self.give_back()

    def quiet(self) -> None:
        """Tell the supervisor, once for each order, that this paused worker receives no more."""
        with self._lock:
            if not self.paused or self._answered == self._order:
                return
            self._answered = self._order
        self._context.say(Kind.PAUSED, {"order": self._answered})
