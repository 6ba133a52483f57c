"""The messages a worker holds but has not started, between its intake and its main thread (worker)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from sqspipes_mp.worker.context import Delivery


class Ready:
    """A queue of deliveries, and of callbacks that the main thread runs between messages."""

    def __init__(self, demand: threading.Event, appetite: int = 1) -> None:
        self._demand = demand
        self._deliveries: deque[Delivery] = deque()
        #: Callbacks to run, oldest first (main thread).
        self.callbacks: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        #: Whether the stage is paused: no message is taken to be run.
        self._halted = False
        #: Messages held below which taking one wakes the intake.
        self.low = 10
        #: Messages that could begin now.
        self.idle = self._appetite = appetite
        #: When a message began last, monotonic seconds.
        self.taken_at = time.monotonic()

    def __len__(self) -> int:
        """Return how many messages may be taken to be run."""
        return 0 if self._halted else len(self._deliveries)

    @property
    def waiting(self) -> int:
        """How many messages could begin as soon as a thread is free."""
        return len(self._deliveries)

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, deliveries: Iterable[Delivery]) -> None:
        with self._changed:
            self._deliveries.extend(deliveries)
            self._changed.notify_all()

    def put_back(self, deliveries: Iterable[Delivery]) -> None:
        """Put deliveries that were taken, and not begun, back in front of the others."""
        with self._changed:
            self._deliveries.extendleft(reversed(tuple(deliveries)))
            self._changed.notify_all()

    def halt(self, *, halted: bool) -> None:
        """Have no message taken to be run, or have them taken again."""
        with self._changed:
            self._halted = halted
            self._changed.notify_all()

    def put_callback(self, callback: Callable[[], object]) -> None:
        with self._changed:
            self.callbacks.append(callback)
            self._changed.notify_all()

    def close(self) -> None:
        """Say that no delivery will be put any more; callbacks may be."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def poke(self) -> None:
        """Have a waiting main thread look around."""
        with self._changed:
            self._changed.notify_all()

    def take(self) -> Delivery | None:
        """Return the next delivery; None where there is none."""
        with self._changed:
            if not self._deliveries or self._halted:
                return None
            # Reset though `wait` may not have been entered: a stale `idle` of 1 has the intake fetch one too many.
            self.idle = 0
            self.taken_at = time.monotonic()
            delivery = self._deliveries.popleft()
        if len(self._deliveries) < self.low and not self._demand.is_set():
            self._demand.set()
        return delivery

    def hungry(self) -> None:
        """Say that a message could begin now, and wake the intake."""
        self.idle = self._appetite
        self._demand.set()

    def wait(self, give_up: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait for a delivery, a callback, the close, or a poke after which ``give_up`` is true; seconds at most."""
        with self._changed:
            self.idle = self._appetite
            self._changed.wait_for(lambda: len(self) or self.callbacks or self._closed or give_up(), timeout)
            self.idle = 0

    def take_all(self) -> list[Delivery]:
        with self._changed:
            taken = list(self._deliveries)
            self._deliveries.clear()
            return taken

    def take_group(self, group: str | None) -> list[Delivery]:
        """Take each delivery of one FIFO group."""
        return self._take_if(lambda delivery: delivery.received.group == group) if group is not None else []

    def take_older(self, than: float, received_at: Callable[[Delivery], float], *, fifo: bool) -> list[Delivery]:
        """Take the deliveries received before ``than`` (``lease_now``); on FIFO also later ones of their groups."""
        if not self._deliveries or received_at(self._deliveries[0]) >= than:
            return []
        groups: set[str | None] = set()

        def old(delivery: Delivery) -> bool:
            if received_at(delivery) < than:
                groups.add(delivery.received.group)
                return True
            return fifo and delivery.received.group in groups

        return self._take_if(old)

    def _take_if(self, wanted: Callable[[Delivery], bool]) -> list[Delivery]:
        with self._changed:
            taken: list[Delivery] = []
            kept: list[Delivery] = []
            for delivery in self._deliveries:
                (taken if wanted(delivery) else kept).append(delivery)
            self._deliveries = deque(kept)
            return taken
