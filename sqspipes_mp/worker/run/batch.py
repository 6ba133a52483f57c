"""Batches: one call of the user's function with several messages' values (worker's main thread).

Nobody is charged for what happened to a batch of several: after a raise its members run again one by one, here and
now; after a death each runs alone at its next delivery. Only then an attempt is counted, and to the right account.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from functools import partial
from textwrap import shorten
from typing import Any

from sqspipes_mp.errors import WrongShape
from sqspipes_mp.ipc.lease import LeaseState
from sqspipes_mp.ipc.report.words import message_of
from sqspipes_mp.pipeline.outputs import results_of
from sqspipes_mp.worker.context import Delivery
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.run.function import Function
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.run.runner import Runner
from sqspipes_mp.worker.send.policy import decide

log = logging.getLogger("sqspipes_mp.worker")


class BatchCaller(Function):
    """A function that takes a list of values and returns a list of as many."""

    #: What was wrong with the list that a whole batch gave, while its members run one by one.
    whole: WrongShape | None = None

    def call_many(self, values: list[Any]) -> list[Any]:
        """Return one result, or exception, per value. Raises ``WrongShape``, and what the function raised."""
        return results_of(self.task.name, len(values), super().call(values))

    def call(self, *values: Any) -> Any:
        """Call with one value; raise what it gave as an exception."""
        try:
            (result,) = self.call_many(list(values))
        except WrongShape:
            if self.whole is None:
                raise
            # Of the batch as the user knows it, not of the one made to find out.
            raise WrongShape(str(self.whole)) from None
        if isinstance(result, BaseException):
            raise result
        return result

    def announce(self, delivery: Delivery) -> None:
        """Several messages run at once: none is the current one."""


class BatchQueue(Ready):
    """What waits to be run, taken several at a time."""

    def fill(self, most: int, until: float, give_up: Callable[[], bool]) -> None:
        """Wait for so many until then (monotonic s), or for something else to do."""
        with self._changed:
            self.idle = self._appetite
            self._changed.wait_for(
                lambda: len(self._deliveries) >= most or self._callbacks or self._closed or give_up(),
                max(0.0, until - time.monotonic()),
            )
            self.idle = 0

    @property
    def lone(self) -> bool:
        """Whether the next one has to run alone, so that there is no company to wait for."""
        return bool(self._deliveries) and self._deliveries[0].alone

    def take_some(self, most: int) -> list[Delivery]:
        """Take up to so many; what has to run alone is taken alone."""
        with self._changed:
            taken: list[Delivery] = []
            self.taken_at = time.monotonic()
            while self._deliveries and len(taken) < most:
                if self._deliveries[0].alone and taken:
                    break
                taken.append(self._deliveries.popleft())
                if taken[-1].alone:
                    break
            return taken


class Batches:
    """Gathers batches and runs them."""

    def __init__(self, parts: Parts, caller: BatchCaller, runner: Runner, ready: BatchQueue) -> None:
        self._parts = parts
        self._station = parts.station
        self._caller = caller
        self._runner = runner
        self._ready = ready
        self._size = caller.task.batch or 1

    def serve(self) -> None:
        """Run batches until told to stop."""
        station, ready, wait = self._station, self._ready, self._caller.task.batch_wait
        until: float | None = None
        while not station.no_more.is_set():
            self._parts.run_callbacks()
            most = self._size if station.left is None else min(self._size, station.left)
            if not len(ready):
                if ready.closed:
                    return
                self._rest()
                ready.wait(station.no_more.is_set)
                continue
            if until is None:
                until = time.monotonic() + wait
            if len(ready) < most and time.monotonic() < until and not (ready.closed or ready.lone):
                self._rest()
                ready.fill(most, until, station.no_more.is_set)
                continue
            until = None
            if members := ready.take_some(most):
                station.demand.set()
                self._caller.serve(self._process, members)

    def _rest(self) -> None:
        self._parts.outbox.hurry()
        self._ready.hungry()
        self._station.demand.set()

    def _process(self, members: list[Delivery]) -> None:
        station, runner, region = self._station, self._runner, self._station.region
        if len(members) == 1:
            runner.process(members[0])
            return
        if not self._caller.pace(self._parts.outbox.hurry):
            runner.back += members
            return
        line = _Line(self._runner, fifo=station.fifo)
        ours = [member for member in members if line.passes(member, self._is_ours)]
        if not ours:
            return
        now = time.monotonic()
        for member in ours:
            region.start_together(member.lease, now)
        try:
            results = self._caller.call_many([member.message.value for member in ours])
        except BaseException as error:
            # SystemExit and KeyboardInterrupt of the user's code are its failures, too.
            for member in ours:
                region.set_state(member.lease, LeaseState.HELD)
            self._one_by_one(ours, line, error)
            return
        runner.lifetime.begins(len(ours))
        for member, result in zip(ours, results, strict=True):
            line.passes(member, partial(runner.settle, value=result))
        runner.lifetime.ends()

    def _is_ours(self, member: Delivery) -> bool:
        if self._station.holds(member):
            return True
        self._runner.lost(member)
        return False

    def _one_by_one(self, members: list[Delivery], line: _Line, error: BaseException) -> None:
        station, runner = self._station, self._runner
        log.warning(
            "%s: a batch of %d failed (%s: %s); its messages run one by one",
            station.stage.name, len(members), type(error).__name__, _words_of(error),
        )  # fmt: skip
        self._caller.whole = error if isinstance(error, WrongShape) else None
        for member in members:
            if station.full_stop.is_set():
                runner.back.append(member)
            else:
                line.passes(member, runner.process)
        self._caller.whole = None
        if isinstance(error, WrongShape):
            # No message's fault, so no message can tell of it.
            self._blame_function(error)
        if isinstance(error, MemoryError):
            runner.lifetime.recycle("MemoryError")

    def _blame_function(self, error: BaseException) -> None:
        """End the run with an error that is no message's fault, if the task's policy says so."""
        policy = self._station.on_error
        decision, error = decide(
            error, attempt=1, receives=0, max_attempts=2, on_error=policy, group=None, jitter=random.uniform
        )
        if decision.report:
            self._station.end_run(error)


def _words_of(error: BaseException) -> str:
    """Return an error's message for one line of the log, in whole words."""
    return shorten(message_of(error)[:2000], 300, placeholder=" ...")


class _Line:
    """Members of one batch, in order: on FIFO none may overtake one of its group that did not get through."""

    def __init__(self, runner: Runner, *, fifo: bool) -> None:
        self._runner = runner
        self._fifo = fifo
        self._blocked: set[str | None] = set()

    def passes(self, member: Delivery, through: Callable[[Delivery], bool]) -> bool:
        """Have a member go ``through``, or go back where it may not; tell whether it got through."""
        group = member.received.group
        if self._fifo and group in self._blocked:
            self._runner.hand_back([member])
            return False
        if through(member):
            return True
        self._blocked.add(group)
        return False
