"""Thread mode: ``threads`` calls of the user's function at once in one worker, for tasks that wait more than compute.

Each call has a lease of its own, as in process mode. What differs: which message may begin is decided here, under one
condition, since a FIFO group's next one must wait for the one before it, and one that ran beside others when their
worker died runs alone; and the main thread runs callbacks only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from sqspipes_mp.ipc.statistics import CALL_STARTED, RUNNING
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.fifo_order import Busy
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.run.function import Function
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.run.runner import Runner

#: Messages held at most while none of them can begin, their FIFO groups being busy.
_MOST_BLOCKED = 60


class SharedFunction(Function):
    """The stage's function, called by several threads at once. A class has one instance for all of them."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(context)
        self._lock = threading.RLock()
        #: When each thread's running call began, monotonic ns.
        self._since: dict[int, int] = {}

    def _reserve(self) -> int:
        # The board's turns are record locks of the kernel, which keep processes apart and not threads.
        with self._lock:
            return super()._reserve()

    def _begins(self, started: int) -> None:
        with self._lock:
            self._since[threading.get_ident()] = started
            self._tell()

    def _ends(self, started: int, *, counts: bool, goes_on: bool = False) -> int:
        with self._lock:
            return super()._ends(started, counts=counts, goes_on=goes_on)

    def ended(self) -> None:
        with self._lock:
            self._since.pop(threading.get_ident(), None)
            self._tell()

    def announce(self, delivery: Delivery, lane: int) -> None:
        with self._lock:
            super().announce(delivery, lane)

    def took(self, since: int) -> None:
        with self._lock:
            super().took(since)

    def _tell(self) -> None:
        """Put the oldest call, which is the next to be late, and the number of calls on the board."""
        self._board.put(self._slot, CALL_STARTED, min(self._since.values(), default=0))
        self._board.put(self._slot, RUNNING, len(self._since))

    def _note_memory(self, read: Callable[[], int]) -> None:
        if not self._since:
            # Growth while several calls run is no single call's.
            super()._note_memory(read)


class GroupQueue(Ready):
    """The messages that wait for a thread. It decides which of them may begin."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(context.demand, context.threads)
        self._context = context
        self._running = 0
        self._alone = False
        self._busy = Busy(fifo=context.fifo)
        #: Threads that still take messages.
        self.threads = context.threads
        #: Messages that may still begin; None: any number.
        self.left: int | None = None

    @property
    def waiting(self) -> int:
        if not self._context.fifo or len(self._deliveries) >= _MOST_BLOCKED:
            return len(self._deliveries)
        with self._changed:
            return self._busy.idle_groups(self._deliveries)

    def next(self, idle: Callable[[], None]) -> Delivery | None:
        """Wait for a message that may begin, calling ``idle`` before; None: there will be no more."""
        context = self._context
        with self._changed:
            while not context.no_more.is_set():
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
            self._busy.leave(delivery)
            if self._context.fifo or not self._running:
                # Only the next of its group, or one that runs alone, can have waited for this one.
                self._changed.notify_all()

    def put_back(self, deliveries: Iterable[Delivery]) -> None:
        with self._changed:
            taken = tuple(deliveries)
            if self.left is not None:
                self.left += len(taken)
            super().put_back(taken)

    def leave(self) -> None:
        """Say that a thread takes no more."""
        with self._changed:
            self.threads -= 1
            self._changed.notify_all()

    def wait_for_callbacks(self) -> None:
        """Wait until there is a callback to run, or all threads have left (main thread)."""
        with self._changed:
            self._changed.wait_for(lambda: self.callbacks or not self.threads)

    def _pick(self) -> Delivery | None:
        if self._alone or self._halted:
            return None
        for place, delivery in enumerate(self._deliveries):
            if self._busy.has(delivery):
                continue
            if delivery.alone and self._running:
                # No other begins before it, or it might wait for ever.
                return None
            del self._deliveries[place]
            self._running += 1
            self.taken_at = time.monotonic()
            if self.left is not None:
                self.left -= 1
            self.idle -= 1
            self._alone = delivery.alone
            self._busy.enter(delivery)
            return delivery
        return None


class ThreadMode:
    """The threads that call the function."""

    def __init__(self, parts: Parts, runner: Runner, turns: GroupQueue) -> None:
        self._parts = parts
        self._context = parts.context
        self._runner = runner
        self._turns = turns
        turns.left = parts.context.left

    def serve(self) -> None:
        """Run messages until told to stop; the main thread runs the callbacks meanwhile."""
        for lane in range(self._context.threads):
            threading.Thread(target=self._work, args=(lane,), name=f"call-{lane}", daemon=True).start()
        while self._turns.threads:
            self._turns.wait_for_callbacks()
            self._parts.run_callbacks()
        if self._turns.left is not None and self._turns.left <= 0:
            # The last of them may have been lost before it began, without a request for a successor.
            self._runner.lifetime.recycle("max_tasks_per_worker")

    def _work(self, lane: int) -> None:
        try:
            while (delivery := self._turns.next(self._idle)) is not None:
                self._context.demand.set()
                try:
                    self._runner.serve_one(delivery, lane)
                finally:
                    self._turns.over(delivery)
        except BaseException as error:
            # The engine's own fault; a worker that has lost a thread must not look alive.
            self._context.fault(error)
            self._context.drain()
        finally:
            self._turns.leave()

    def _idle(self) -> None:
        self._parts.outbox.hurry()
        self._context.demand.set()
