"""The messages a worker holds but has not started, between its intake and its main thread (worker)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from sqspipes_mp.worker.context import Delivery


class Ready:
    """A queue of deliveries and of callbacks that the main thread has to run between messages."""

    def __init__(self, appetite: int = 1) -> None:
        self._deliveries: deque[Delivery] = deque()
        self._callbacks: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        #: Messages that could begin now.
        self.idle = self._appetite = appetite
        #: When one began last, monotonic s.
        self.taken_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._deliveries)

    @property
    def waiting(self) -> int:
        """How many could begin as soon as there is a thread for them."""
        return len(self._deliveries)

    def put(self, deliveries: Iterable[Delivery]) -> None:
        with self._changed:
            self._deliveries.extend(deliveries)
            self._changed.notify_all()

    def put_callback(self, callback: Callable[[], object]) -> None:
        with self._changed:
            self._callbacks.append(callback)
            self._changed.notify_all()

    def close(self) -> None:
        """Say that nothing more will be put, callbacks excepted."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def poke(self) -> None:
        """Have a waiting main thread look around."""
        with self._changed:
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def take_callback(self) -> Callable[[], object] | None:
        return self._callbacks.popleft() if self._callbacks else None

    def take(self) -> Delivery | None:
        """Return the next delivery if there is one."""
        with self._changed:
            if not self._deliveries:
                return None
            # Also where it never waited: one that was there at once must not let the intake fetch another behind it.
            self.idle = 0
            self.taken_at = time.monotonic()
            return self._deliveries.popleft()

    def hungry(self) -> None:
        """Say that one could begin now, before the intake is woken for it."""
        self.idle = self._appetite

    def wait(self, give_up: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait until there is something to take or run, nothing more can come, or ``give_up`` says so when poked."""
        with self._changed:
            self.idle = self._appetite
            self._changed.wait_for(lambda: self._deliveries or self._callbacks or self._closed or give_up(), timeout)
            self.idle = 0

    def take_all(self) -> list[Delivery]:
        with self._changed:
            taken = list(self._deliveries)
            self._deliveries.clear()
            return taken

    def take_group(self, group: str | None) -> list[Delivery]:
        """Take every delivery of one FIFO group: what precedes them failed, so they go back with it."""
        return self._take_if(lambda delivery: delivery.received.group == group) if group is not None else []

    def take_older(self, than: float, received_at: Callable[[Delivery], float], *, fifo: bool) -> list[Delivery]:
        """Take what was received before ``than`` (``lease_now``), on FIFO with all that follows in the same groups."""
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
