"""The user's code and what surrounds each call of it: building, pacing, timing (worker's main thread)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from sqspipes_mp.brokers.attributes import values_of
from sqspipes_mp.control import EXIT_TASK
from sqspipes_mp.current import CurrentMessage, put_off, set_current
from sqspipes_mp.scoreboard import BUSY_NS, CALL_STARTED
from sqspipes_mp.task import Task, interval_seconds
from sqspipes_mp.worker.station import Delivery, Station

log = logging.getLogger("sqspipes_mp.worker")

#: Weight of the newest message in the mean run time.
_NEWEST = 0.2
_NO_ATTRIBUTES: Mapping[str, str | bytes] = MappingProxyType({})


class Caller:
    """The stage's function, built for this worker."""

    def __init__(self, station: Station) -> None:
        task = station.stage.task
        if task.init is not None:
            task.init()
        self._station = station
        self._task = task
        #: Found out once: it takes longer than a short call.
        self.is_generator = task.is_generator
        self._args = station.orders.plan.args[station.stage.index]
        self._method: Callable[..., Any] = task.method(*task.init_args) if task.is_class else task.method
        self._line = os.fstat(station.channel.fileno()).st_ino
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
        """Call the function with what precedes its ``args``; time it."""
        started = time.monotonic_ns()
        self._running_since(started)
        try:
            return self._method(*values, *self._args)
        finally:
            self._check_line()
            self._running_since(0)
            spent = time.monotonic_ns() - started
            self._busy(spent)
            if not self.is_generator:
                self._took(spent)

    def next_of(self, iterator: Any, since: int | None = None) -> Any:
        """Take the next value of a generator; time it as a call.

        ``since``: monotonic ns at which the message began, where one message is the whole generator: then its timeout
        counts from there, as its lease's cap does, until ``ended`` or ``aside``.
        """
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
        """End this process if the function closed the line to the supervisor, and with it likely every descriptor.

        The broker's calls might hang for ever then. The message still counts as running, so it is charged.
        """
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
            if self._task.exit is not None:
                self._task.exit()
