"""Batches: one call of the user's function with the values of several messages (worker's main thread).

No message is charged for the failure of a batch of several. After a raise its members run again one by one, at once;
after a death each runs alone at its next delivery. A failure of the one that runs alone is charged to it.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from functools import partial
from textwrap import shorten
from typing import Any

from sqspipes_mp.errors import WrongShape
from sqspipes_mp.ipc.leases import LeaseState
from sqspipes_mp.ipc.report.exception_text import message_of
from sqspipes_mp.ipc.statistics import SlotField
from sqspipes_mp.messages.plain import one_line
from sqspipes_mp.pipeline.current import batch_message, set_current
from sqspipes_mp.pipeline.outputs import results_of
from sqspipes_mp.worker.context import Delivery
from sqspipes_mp.worker.fifo_order import Line
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.run.function import Function
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.run.runner import Runner
from sqspipes_mp.worker.send.policy import decide

log = logging.getLogger("sqspipes_mp.worker")


class BatchFunction(Function):
    """A function that takes a list of values and returns a list of as many."""

    #: The error of a whole batch's list, while its members run one by one.
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
            # The user knows the whole batch, not the batch of one that was made to find the message.
            raise WrongShape(str(self.whole)) from None
        if isinstance(result, BaseException):
            raise result
        return result

    def announce(self, delivery: Delivery, lane: int) -> None:
        """Announce one message of a batch to readers, and a batch of it alone to the function."""
        super().announce(delivery, lane)
        self.announce_all([delivery])

    def announce_all(self, members: list[Delivery]) -> None:
        """Announce a batch: ``current_message()`` tells when it is to end, and nothing of its messages."""
        timeout = self.task.timeout
        late_at = math.inf if timeout is None else time.monotonic() + timeout
        full_at = min(member.until for member in members) + self._full_after
        set_current(batch_message(late_at, full_at, self._context.ending))


class BatchQueue(Ready):
    """The messages that wait to be run, taken several at a time."""

    def fill(self, most: int, until: float, give_up: Callable[[], bool]) -> None:
        """Wait for ``most`` messages until ``until`` (monotonic s), or for something else to do."""
        with self._changed:
            self.idle = self._appetite
            self._changed.wait_for(
                lambda: len(self) >= most or self.callbacks or self._closed or self._halted or give_up(),
                max(0.0, until - time.monotonic()),
            )
            self.idle = 0

    @property
    def lone(self) -> bool:
        """Whether the next message has to run alone, so that waiting for others is in vain."""
        return bool(self._deliveries) and self._deliveries[0].alone

    def take_some(self, most: int) -> list[Delivery]:
        """Take up to ``most`` messages; one that has to run alone is taken alone."""
        with self._changed:
            taken: list[Delivery] = []
            self.taken_at = time.monotonic()
            while len(self) and len(taken) < most:
                if self._deliveries[0].alone and taken:
                    break
                taken.append(self._deliveries.popleft())
                if taken[-1].alone:
                    break
            return taken


class Batches:
    """Gathers batches and runs them."""

    def __init__(self, parts: Parts, function: BatchFunction, runner: Runner, ready: BatchQueue) -> None:
        self._parts = parts
        self._context = parts.context
        self._function = function
        self._runner = runner
        self._ready = ready
        self._size = function.task.batch or 1

    def serve(self) -> None:
        """Run batches until told to stop."""
        context, ready, wait = self._context, self._ready, self._function.task.batch_wait
        until: float | None = None
        while not context.no_more.is_set():
            self._parts.run_callbacks()
            most = self._size if context.left is None else min(self._size, context.left)
            if not len(ready):
                if ready.closed:
                    return
                self._rest()
                ready.wait(context.no_more.is_set)
                continue
            if until is None:
                until = time.monotonic() + wait
            if len(ready) < most and time.monotonic() < until and not (ready.closed or ready.lone):
                self._rest()
                ready.fill(most, until, context.no_more.is_set)
                continue
            until = None
            if members := ready.take_some(most):
                context.demand.set()
                began = time.monotonic()
                self._process(members)
                self._runner.note_time(began)

    def _rest(self) -> None:
        self._parts.outbox.hurry()
        self._ready.hungry()

    def _process(self, members: list[Delivery]) -> None:
        context, runner, leases = self._context, self._runner, self._context.leases
        if len(members) == 1:
            runner.process(members[0])
            return
        if not self._function.pace(self._parts.outbox.hurry):
            runner.keep(*members)
            return
        line = Line(context, runner.hand_back)
        ours = [member for member in members if line.passes(member, self._is_ours)]
        if not ours:
            return
        now = time.monotonic()
        starts = self._function.starts
        for member in ours:
            leases.start_together(member.lease, now)
        if context.paused:
            self._parts.pause.not_begun(ours)
            return
        for lane, member in enumerate(ours):
            self._function.announce(member, min(lane, len(starts) - 1))
        self._function.announce_all(ours)
        try:
            results = self._function.call_many([member.message.value for member in ours])
        except BaseException as error:
            set_current(None)
            # SystemExit and KeyboardInterrupt of the user's code are its failures, too.
            for member in ours:
                leases.set_state(member.lease, LeaseState.HELD)
            self._hide(starts[: len(ours)])
            self._one_by_one(ours, line, error)
            return
        self._hide(starts[: len(ours)])
        set_current(None)
        runner.lifetime.begins(len(ours))
        for member, result in zip(ours, results, strict=True):
            line.passes(member, partial(runner.settle, value=result))
        runner.lifetime.ends()

    def _hide(self, starts: list[SlotField]) -> None:
        """Tell readers that a batch's calls are over."""
        for start in starts:
            self._context.board.put(self._context.slot, start, 0)

    def _is_ours(self, member: Delivery) -> bool:
        if self._context.holds(member):
            return True
        self._runner.lost(member)
        return False

    def _one_by_one(self, members: list[Delivery], line: Line, error: BaseException) -> None:
        context, runner = self._context, self._runner
        log.warning(
            "%s: a batch of %d failed (%s: %s); its messages run one by one",
            context.stage.name, len(members), type(error).__name__, _words_of(error),
        )  # fmt: skip
        self._function.whole = error if isinstance(error, WrongShape) else None
        for place, member in enumerate(members):
            if context.hold.is_set() or context.paused:
                runner.keep(*members[place:])
                break
            line.passes(member, runner.process)
        self._function.whole = None
        if isinstance(error, WrongShape):
            # It is no message's fault, so no message's failure tells of it.
            self._blame_function(error)
        runner.lifetime.failed(error)

    def _blame_function(self, error: BaseException) -> None:
        """End the run with an error that is no message's fault, if the task's policy says so."""
        policy = self._context.on_error
        decision, error = decide(
            error, attempt=1, receives=0, max_attempts=2, on_error=policy, group=None, jitter=random.uniform
        )
        if decision.report:
            self._context.end_run(error)


def _words_of(error: BaseException) -> str:
    """Return an error's text for one line of the log, cut between words."""
    return one_line(shorten(message_of(error)[:2000], 300, placeholder=" ..."), 300)
