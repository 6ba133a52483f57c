"""The user's code and what surrounds each call of it: building, pacing, timing (worker's main thread)."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from sqspipes_mp.errors import LATE
from sqspipes_mp.host.memory import open_memory
from sqspipes_mp.ipc.channel import EXIT_TASK
from sqspipes_mp.ipc.scoreboard import BUSY_NS, CALL_MEMORY, CALL_STARTED, WATCHES_MEMORY
from sqspipes_mp.messages.attributes import values_of
from sqspipes_mp.pipeline.current import CurrentMessage, put_off, set_current
from sqspipes_mp.pipeline.task import Task, interval_seconds
from sqspipes_mp.worker.context import Delivery, WorkerContext

log = logging.getLogger("sqspipes_mp.worker")

#: Seconds after which a late call that runs still is known to the supervisor, and what it has to tell of a stop.
_UNSEEN, _WORD_OF_A_STOP = 0.25, 1.0
#: Weight of the newest message in the mean run time.
_NEWEST = 0.2
_NO_ATTRIBUTES: Mapping[str, str | bytes] = MappingProxyType({})


class Late(Exception):
    """A call came back when it was too late: whatever it gave or raised does not count. Its text says why."""

    def __init__(self, why: str = LATE) -> None:
        super().__init__(why)


class Function:
    """The stage's function, built for this worker."""

    def __init__(self, station: WorkerContext) -> None:
        task = station.stage.task
        if task.init is not None:
            task.init()
            station.check_process()
        self._station = station
        self._task = task
        #: Found out once: it takes longer than a short call.
        self.is_generator = task.is_generator
        self._args = station.orders.plan.args[station.stage.index]
        self._method: Callable[..., Any] = task.method(*task.init_args) if task.is_class else task.method
        station.check_process()
        self._line = os.fstat(station.channel.fileno()).st_ino
        self._limit = math.inf if task.timeout is None else task.timeout * 1e9
        self._memory = open_memory() if station.board.header(WATCHES_MEMORY) else None
        self._paced = callable(task.interval) or task.interval > 0
        #: The stage's newest interval, nanoseconds.
        self._interval = 0

    @property
    def task(self) -> Task:
        return self._task

    def pace(self, idle: Callable[[], None]) -> bool:
        """Wait for this stage's turn, if it has an interval; False: the run ends first.

        ``idle`` is called before a wait in which nothing would come to fill a batch.
        """
        station = self._station
        if not self._paced:
            return True
        wait = self._reserve() / 1e9
        if wait > station.connection.linger:
            idle()
        return not (station.no_more if station.stage.is_source else station.full_stop).wait(wait)

    def _reserve(self) -> int:
        """Take the stage's next turn; return in how many nanoseconds it is."""
        now = time.monotonic_ns()
        turn = self._station.board.reserve_call(self._station.stage.index, now, self._gap)
        return max(0, turn - now)

    def _gap(self) -> int:
        self._interval = int(interval_seconds(self._task) * 1e9)
        return self._interval

    def call(self, *values: Any) -> Any:
        """Call the function with what precedes its ``args``; time it. Raises ``Late``, and what the function raises."""
        self._note_memory()
        started = time.monotonic_ns()
        self._running_since(started)
        try:
            return self._method(*values, *self._args)
        finally:
            self._check_line()
            self._running_since(0)
            # Read after the board was told: a call that the supervisor sees running late is late here, too.
            spent = time.monotonic_ns() - started
            self._busy(spent)
            if not self.is_generator:
                self._took(spent)
            self._check_late(started, spent)

    def next_of(self, iterator: Any, since: int | None = None) -> Any:
        """Take the next value of a generator; time it as a call.

        ``since``: monotonic ns at which the message began, where one message is the whole generator: then its timeout
        counts from there, as its lease's cap does, until ``ended`` or ``aside``.

        Raises ``Late``, and what the generator raises.
        """
        if since is None:
            self._note_memory()
        started = time.monotonic_ns()
        self._running_since(since or started)
        try:
            return next(iterator)
        finally:
            self._check_line()
            now = time.monotonic_ns()
            if since is None:
                self._running_since(0)
                self._took(now - started)
            self._busy(now - started)
            self._check_late(since or started, now - (since or started))

    def _check_late(self, started: int, spent: int) -> None:
        """Raise ``Late`` where a call took longer than its timeout, less what the whole engine stood still."""
        if spent <= self._limit:
            return
        board, until = self._station.board, time.monotonic() + _WORD_OF_A_STOP
        if spent - self._limit > _UNSEEN * 1e9 and not self._station.region.blamed:
            # The supervisor would have seen it: unless it was stopped as well, and is about to say so.
            nap = threading.Event()
            while not board.credit(started) and time.monotonic() < until:
                nap.wait(0.01)
        if spent > self._limit + board.credit(started):
            raise Late

    def _note_memory(self) -> None:
        """Note what this worker has before the call, where that is watched: the call pays for its own growth only."""
        if self._memory is not None:
            self._station.board.put(self._station.slot, CALL_MEMORY, self._memory())

    def took(self, since: int) -> None:
        """Count a message's generator that is through; it began at ``since``, monotonic ns."""
        self._took(time.monotonic_ns() - since)

    def _took(self, nanoseconds: int) -> None:
        self._station.board.took(self._station.slot, nanoseconds)

    def aside(self, delivery: Delivery, step: Callable[[], None]) -> int:
        """Do something in the middle of a message's generator that is no time of the function's.

        Returns the nanoseconds it took, by which the message's timeout ends later. Its lease stays RUNNING.
        """
        region, before = self._station.region, time.monotonic_ns()
        self.ended()
        started = region.pause(delivery.lease)
        try:
            step()
        finally:
            spent = time.monotonic_ns() - before
            region.resume(delivery.lease, started + spent / 1e9)
        put_off(spent / 1e9)
        return spent

    def ended(self) -> None:
        """Say that no call runs: a message's generator is through, or waits while what it gave is sent."""
        self._running_since(0)

    def _running_since(self, started: int) -> None:
        self._station.board.put(self._station.slot, CALL_STARTED, started)

    def _busy(self, nanoseconds: int) -> None:
        self._station.board.add(self._station.slot, BUSY_NS, nanoseconds)

    def _check_line(self) -> None:
        """End a forked copy of this process that came back, and one whose line to the supervisor the function closed.

        With the line it has likely closed every descriptor, and the broker's calls might hang for ever then. The
        message still counts as running, so it is charged.
        """
        self._station.check_process()
        try:
            cut = os.fstat(self._station.channel.fileno()).st_ino != self._line
        except OSError:
            cut = True
        if cut:
            log.error("%s: the function closed descriptors that are not its own; this worker ends", self._task.name)
            os._exit(EXIT_TASK)

    def serve(self, step: Callable[..., object], *taken: Any) -> None:
        """Have ``step`` deal with what was ``taken``, and count how long that was towards the mean.

        With its turn and its results' way, not just its call. Several threads may be in here: what one of them
        overwrites is made good by the next.
        """
        began = time.monotonic()
        step(*taken)
        seconds = max(time.monotonic() - began, self._interval / 1e9)
        station, mean = self._station, self._station.mean
        station.mean = seconds if mean is None else mean + (seconds - mean) * _NEWEST

    def announce(self, delivery: Delivery) -> None:
        """Make the message the one ``current_message()`` speaks of."""
        received, message = delivery.received, delivery.message
        timeout = self._task.timeout
        set_current(
            CurrentMessage(
                id=message.id,
                stage=self._station.stage.name,
                hop=message.parent,
                attempt=delivery.attempt,
                priority=message.priority,
                group=received.group,
                sent_at=received.sent_at,
                deadline=None if timeout is None else time.monotonic() + timeout,
                meta=message.meta,
                attributes=values_of(received.attributes) if received.attributes else _NO_ATTRIBUTES,
            )
        )

    def finish(self) -> None:
        """Run the class's ``close`` and the task's ``exit``, after the last message of a clean end."""
        close = getattr(self._method, "close", None) if self._task.is_class else None
        try:
            if callable(close):
                close()
        finally:
            self._station.check_process()
            if self._task.exit is not None:
                self._task.exit()
                self._station.check_process()
