"""The user's function, built for a worker: its turns, its timed calls, its end (the threads that run messages)."""

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
from sqspipes_mp.ipc.leases import asked_after
from sqspipes_mp.ipc.statistics import BUSY_NS, CALL_MEMORY, CALL_STARTED, WATCHES_MEMORY, lane_started
from sqspipes_mp.messages.attributes import values_of
from sqspipes_mp.pipeline.current import CurrentMessage, put_off, set_current, tell_progress_to
from sqspipes_mp.pipeline.outputs import Built
from sqspipes_mp.pipeline.task import Task, interval_seconds
from sqspipes_mp.worker.context import Delivery, WorkerContext

log = logging.getLogger("sqspipes_mp.worker")

#: Seconds after which the supervisor knows of a late call that still runs.
_UNSEEN = 0.25
#: Seconds that the supervisor has to say that the whole engine was stopped (Ctrl-Z).
_WORD_OF_A_STOP = 1.0
_NO_ATTRIBUTES: Mapping[str, str | bytes] = MappingProxyType({})


class Late(Exception):
    """A call came back too late: its result, or its exception, does not count. The text says why."""

    def __init__(self, why: str = LATE) -> None:
        super().__init__(why)


class Function:
    """The stage's function, built for this worker."""

    def __init__(self, context: WorkerContext) -> None:
        task, plan = context.stage.task, context.assignment.plan
        self._args = plan.args[context.stage.index]
        self._built = Built(task, self._args, context.check_process)
        self._method = self._built.method
        self._context = context
        self._board, self._slot = context.board, context.slot
        self._task = task
        #: Kept here: finding out takes longer than a short call.
        self.is_generator = task.is_generator
        self._line = context.channel.fileno()
        self._line_inode = os.fstat(self._line).st_ino
        #: Nanoseconds after which a call may have kept a reply of the queue service unread for too long.
        self._long = plan.first_lease / 4 * 1e9
        self._limit = math.inf if task.timeout is None else task.timeout * 1e9
        #: Seconds from the end of a message's first lease until its call is to come to an end.
        self._full_after = asked_after(context.assignment.broker.longest_hold) - plan.first_lease
        self._memory = open_memory() if context.board.header(WATCHES_MEMORY) else None
        #: Whether calls of the stage wait for their turn.
        self.paced = callable(task.interval) or task.interval > 0
        #: The stage's newest interval, seconds.
        self.interval = 0.0
        lanes = context.board.shape.lanes
        #: The fields with the starts of the calls that run in the lanes; 0 there ends a call for readers.
        self.starts = [lane_started(lane) for lane in range(lanes)]
        #: The hop of each lane's newest message.
        self._hops = [""] * lanes
        tell_progress_to(self._progressed)

    @property
    def task(self) -> Task:
        return self._task

    # -- turns --------------------------------------------------------------------------------------------------

    def pace(self, idle: Callable[[], None]) -> bool:
        """Wait for this stage's turn, if it has an interval; False: the run ends, or the stage is paused, first.

        ``idle`` is called before a wait in which no message would come to fill a batch.
        """
        context = self._context
        if not self.paced:
            return True
        wait = self._reserve() / 1e9
        if wait > context.connection.linger:
            idle()
        with context.resting():
            return not (context.no_more if context.stage.is_source else context.hold).wait(wait)

    def _reserve(self) -> int:
        """Take the stage's next turn; return the nanoseconds until then."""
        now = time.monotonic_ns()
        return max(0, self._board.reserve_call(self._context.stage.index, now, self._gap) - now)

    def _gap(self) -> int:
        self.interval = interval_seconds(self._task)
        return int(self.interval * 1e9)

    # -- calls --------------------------------------------------------------------------------------------------

    def call(self, *values: Any) -> Any:
        """Call the function with values and its ``args``; time it. Raises ``Late``, and what the function raises."""
        if self._memory is not None:
            self._note_memory(self._memory)
        started = time.monotonic_ns()
        self._begins(started)
        try:
            return self._method(*values, *self._args)
        finally:
            self._check_line()
            # Read after the board was told: a call that the supervisor sees running late is late here, too.
            spent = self._ends(started, counts=not self.is_generator)
            if spent > self._limit:
                self._check_late(started, spent)

    def next_of(self, iterator: Any, since: int | None = None) -> Any:
        """Take the next value of a generator; time it as a call. Raises ``Late``, and what the generator raises.

        ``since``: monotonic ns at which the message began, where one message is the whole generator: its timeout, and
        its lease's cap, count from there until ``ended`` or ``aside``.
        """
        if since is None and self._memory is not None:
            self._note_memory(self._memory)
        started = time.monotonic_ns()
        self._begins(since or started)
        try:
            return next(iterator)
        finally:
            self._check_line()
            spent = self._ends(started, counts=since is None, goes_on=since is not None)
            if since is not None:
                spent += started - since
            if spent > self._limit:
                self._check_late(since or started, spent)

    def aside(self, delivery: Delivery, step: Callable[[], None]) -> int:
        """Run a step in the middle of a message's generator whose time is not the function's.

        Returns the nanoseconds it took, by which the message's timeout ends later. Its lease stays RUNNING.
        """
        leases, before = self._context.leases, time.monotonic_ns()
        self.ended()
        started = leases.pause(delivery.lease)
        try:
            step()
        finally:
            spent = time.monotonic_ns() - before
            leases.resume(delivery.lease, started + spent / 1e9)
        put_off(spent / 1e9)
        return spent

    def took(self, since: int) -> None:
        """Count a message's generator that is through; it began at ``since``, monotonic ns."""
        self._board.took(self._slot, time.monotonic_ns() - since)

    def ended(self) -> None:
        """Say that no call runs: a message's generator is through, or waits while its outputs are sent."""
        self._board.put(self._slot, CALL_STARTED, 0)

    def _begins(self, started: int) -> None:
        """Tell the board of a call that began at ``started`` (monotonic ns)."""
        self._board.put(self._slot, CALL_STARTED, started)

    def _ends(self, started: int, *, counts: bool, goes_on: bool = False) -> int:
        """Tell the board of a call's end, and return its nanoseconds.

        ``counts``: it is a call of its own among the run times; ``goes_on``: its message's generator does.
        """
        board, slot = self._board, self._slot
        if not goes_on:
            self.ended()
        spent = time.monotonic_ns() - started
        board.add(slot, BUSY_NS, spent)
        if counts:
            board.took(slot, spent)
        if spent > self._long:
            self._context.long_call_ended = time.monotonic()
        return spent

    def _check_late(self, started: int, spent: int) -> None:
        """Raise ``Late`` where a call took longer than its timeout, less the time the whole engine stood still."""
        board, until = self._board, time.monotonic() + _WORD_OF_A_STOP
        if spent - self._limit > _UNSEEN * 1e9 and not self._context.leases.blamed:
            # The supervisor would have seen it, unless it was stopped as well and is about to say so.
            nap = threading.Event()
            while not board.credit(started) and time.monotonic() < until:
                nap.wait(0.01)
        if spent > self._limit + board.credit(started):
            raise Late

    def _note_memory(self, read: Callable[[], int]) -> None:
        """Note this worker's memory before the call, where that is watched: a call pays for its own growth only."""
        self._board.put(self._slot, CALL_MEMORY, read())

    def _check_line(self) -> None:
        """End a forked copy of this process that came back, and one whose line to the supervisor the function closed.

        With the line the function has likely closed every descriptor, and the broker's calls might hang for ever. The
        message still counts as running, so it is charged.
        """
        self._context.check_process()
        try:
            cut = os.fstat(self._line).st_ino != self._line_inode
        except OSError:
            cut = True
        if cut:
            log.error("%s: the function closed descriptors that are not its own; this worker ends", self._task.name)
            os._exit(EXIT_TASK)

    def announce(self, delivery: Delivery, lane: int) -> None:
        """Make the message the one ``current_message()`` speaks of, and tell readers that its call begins in a lane."""
        received, message = delivery.received, delivery.message
        timeout = self._task.timeout
        first = received.receives <= 1 and delivery.attempt == 1 and received.sent_at > 0
        waited = int((time.time() - received.sent_at) * 1e9) if first else None
        self._hops[lane] = message.parent
        self._board.begins(self._slot, lane, time.monotonic_ns(), message.parent, waited, delivery.lease)
        set_current(
            CurrentMessage(
                id=message.id,
                stage=self._task.name,
                hop=message.parent,
                attempt=delivery.attempt,
                priority=message.priority,
                group=received.group,
                sent_at=received.sent_at,
                meta=message.meta,
                attributes=values_of(received.attributes) if received.attributes else _NO_ATTRIBUTES,
                continuation=0 if delivery.chain is None else delivery.chain.count,
                _late_at=math.inf if timeout is None else time.monotonic() + timeout,
                _full_at=delivery.until + self._full_after,
                _ending=self._context.ending,
            )
        )

    def _progressed(self, hop: str, fraction: float, text: str) -> None:
        """Tell readers of a call's progress, unless another message runs in its lane meanwhile."""
        if hop in self._hops:
            self._board.progressed(self._slot, self._hops.index(hop), fraction, text)

    def finish(self) -> None:
        """Run the class's ``close`` and the task's ``exit``, after the last message of a clean end."""
        self._built.close()
