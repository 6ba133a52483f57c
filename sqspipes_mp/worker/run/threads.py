"""Thread mode: ``threads`` calls of the user's function at once in one worker, for tasks that wait more than compute.

Each call has a lease of its own, as in process mode. What differs: which message may begin is decided here, under one
condition, since a FIFO group's next one must wait for the one before it, and one that ran beside others when their
worker died runs alone; and the main thread runs callbacks only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqspipes_mp.ipc.scoreboard import RUNNING
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.run.function import Function
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.run.runner import Runner

#: Messages held at most while none of them can begin, their FIFO groups being busy.
_MOST_BLOCKED = 60


class SharedCaller(Function):
    """The stage's function, called by several threads at once. A class has one instance for all of them."""

    def __init__(self, station: WorkerContext) -> None:
        super().__init__(station)
        self._lock = threading.Lock()
        self._since: dict[int, int] = {}

    def _reserve(self) -> int:
        # The board's lock is the kernel's, which keeps processes apart and not threads.
        with self._lock:
            return super()._reserve()

    def _running_since(self, started: int) -> None:
        """Note this thread's call; the board has the oldest one, which is the next to be late."""
        me = threading.get_ident()
        with self._lock:
            if started:
                self._since[me] = started
            else:
                self._since.pop(me, None)
            super()._running_since(min(self._since.values(), default=0))
            self._station.board.put(self._station.slot, RUNNING, len(self._since))

    def _note_memory(self) -> None:
        if not self._since:
            # What grows while several run is nobody's own.
            super()._note_memory()

    def _took(self, nanoseconds: int) -> None:
        with self._lock:
            super()._took(nanoseconds)

    def _busy(self, nanoseconds: int) -> None:
        with self._lock:
            super()._busy(nanoseconds)


class GroupQueue(Ready):
    """What waits to be run, and whose turn it is."""

    def __init__(self, station: WorkerContext) -> None:
        super().__init__(station.threads)
        self._station = station
        self._running = 0
        self._alone = False
        self._groups: set[str] = set()
        #: Threads that still take messages.
        self.threads = station.threads
        #: Messages that may still begin; None: any number.
        self.left: int | None = None

    @property
    def waiting(self) -> int:
        if not self._station.fifo or len(self._deliveries) >= _MOST_BLOCKED:
            return len(self._deliveries)
        with self._changed:
            groups = {delivery.received.group for delivery in self._deliveries}
            return len(groups - self._groups)

    def next(self, idle: Callable[[], None]) -> Delivery | None:
        """Wait for a message that may begin, ``idle`` being called before; None: there will be no more."""
        station = self._station
        with self._changed:
            while not station.no_more.is_set():
                if self.left is not None and self.left <= 0:
                    return None
                delivery = self._pick()
                if delivery is not None:
                    return delivery
                if self._closed and not self._deliveries:
                    return None
                idle()
                self._changed.wait()
            return None

    def over(self, delivery: Delivery) -> None:
        """Say that a message taken with ``next`` has been dealt with."""
        with self._changed:
            self._running -= 1
            self.idle += 1
            self._alone = False
            group = delivery.received.group
            if group is not None:
                self._groups.discard(group)
            if group is not None or not self._running:
                # Something may begin now that had to wait for this; anything else could have begun before.
                self._changed.notify_all()

    def leave(self) -> None:
        """Say that a thread takes no more."""
        with self._changed:
            self.threads -= 1
            self._changed.notify_all()

    def wait_for_callbacks(self) -> None:
        """Wait until there is a callback to run, or all threads have left (main thread)."""
        with self._changed:
            self._changed.wait_for(lambda: self._callbacks or not self.threads)

    def _pick(self) -> Delivery | None:
        if self._alone:
            return None
        for place, delivery in enumerate(self._deliveries):
            group = delivery.received.group
            if group is not None and group in self._groups:
                continue
            if delivery.alone and self._running:
                # Nothing else begins before it, or it might wait for ever.
                return None
            del self._deliveries[place]
            self._running += 1
            self.taken_at = time.monotonic()
            if self.left is not None:
                self.left -= 1
            self.idle -= 1
            self._alone = delivery.alone
            if group is not None:
                self._groups.add(group)
            return delivery
        return None


class ThreadMode:
    """The threads that call the function."""

    def __init__(self, parts: Parts, runner: Runner, turns: GroupQueue) -> None:
        self._parts = parts
        self._station = parts.station
        self._runner = runner
        self._turns = turns
        turns.left = parts.station.left

    def serve(self) -> None:
        """Run messages until told to stop; the main thread runs the callbacks meanwhile."""
        for seat in range(self._station.threads):
            threading.Thread(target=self._work, args=(seat,), name=f"call-{seat}", daemon=True).start()
        while self._turns.threads:
            self._turns.wait_for_callbacks()
            self._parts.run_callbacks()
        if self._turns.left is not None and self._turns.left <= 0:
            # The last one it might have may have been lost before it began: then nothing has asked for a successor.
            self._runner.lifetime.recycle("max_tasks_per_worker")

    def _work(self, seat: int) -> None:
        try:
            while (delivery := self._turns.next(self._idle)) is not None:
                self._station.demand.set()
                try:
                    self._runner.serve_one(delivery, seat)
                finally:
                    self._turns.over(delivery)
        except BaseException as error:
            # The engine's own fault: a worker that has lost a thread must not look alive.
            self._station.fault(error)
            self._station.drain()
        finally:
            self._turns.leave()

    def _idle(self) -> None:
        self._parts.outbox.hurry()
        self._station.demand.set()
