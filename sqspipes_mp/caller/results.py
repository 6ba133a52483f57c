"""The iterator that ``run(iterate=True)`` returns: results come from a supervisor in a process of its own (caller)."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import pickle
import select
import signal
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.caller.progress.progress import Progress
from sqspipes_mp.caller.sigterm import Sigterm
from sqspipes_mp.errors import GUARD, SupervisorLost
from sqspipes_mp.ipc.birth import Birth
from sqspipes_mp.ipc.channel import Frame, Kind, describe_exit
from sqspipes_mp.ipc.map_lock import MapLock
from sqspipes_mp.ipc.outcome import Outcome
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.summary import Summary, readings
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.supervisor.child import start
from sqspipes_mp.supervisor.children import Mains
from sqspipes_mp.supervisor.run import supervisor_main
from sqspipes_mp.supervisor.shutdown import SECOND_AFTER

log = logging.getLogger("sqspipes_mp.engine")

R = TypeVar("R")

#: Ids of results handed out that are remembered, to drop one that comes again after its worker died.
_REMEMBERED = 100_000
#: What a supervisor may need beyond ``shutdown_grace``, seconds, before its caller stops waiting for it.
_SLACK = 20.0


class Results(Iterator[R]):
    """Hands out each result once.

    A result is acknowledged, and its message deleted, when the *next* one is asked for: what fails in the loop's body
    loses nothing. Closing (``close()``, leaving a ``with``, losing the last reference) drains; the results not
    acknowledged come again in the next run. Not for several threads at once.
    """

    #: The map's lock, which the supervisor holds as well.
    _lock: MapLock | None = None

    def __init__(
        self,
        plan: RunPlan,
        broker: Broker,
        board: Scoreboard,
        mains: Mains,
        context: Any,
        ended: Callable[[], None],
        owner: object,
        progress: Progress,
    ) -> None:
        self.summary: Summary | None = None
        #: Indexes of the stages it runs.
        self.stages = plan.selected
        self._grace = plan.settings.grace
        self._ended = ended
        self._running = partial(_running, plan, board)
        self._progress = progress
        # The engine removes its temporary files when nobody needs it any more.
        self._owned_by = owner
        self._ready: deque[Frame] = deque()
        self._handed: Frame | None = None
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._outcome: Outcome | None = None
        self._closed = False
        self._stopped = False
        #: Whether the supervisor imports the program, and whether it has said that it is there.
        self._fresh = context.get_start_method() != "fork"
        self._greeted = False
        #: Whether the results on their way have been taken back: they come again in the next run.
        self._taken_back = False
        assert plan.sink is not None
        self._repeatable = not plan.pipeline.stages[plan.sink].is_source
        self._sigterm: Sigterm | None = None

        lock = self._lock

        def target(birth: Birth) -> tuple[Callable[..., None], tuple[Any, ...]]:
            return supervisor_main, (birth, plan, broker, board, mains, context.get_start_method(), lock)

        with contextlib.nullcontext() if lock is None else lock.bequeathed():
            self._child = start(context, target, name="supervisor", inherited=())
        self._poll = select.poll()
        self._poll.register(self._child.channel.fileno(), select.POLLIN)
        self._poll.register(self._child.watch, select.POLLIN)
        # Before multiprocessing's own, which would wait for the supervisor for ever.
        self._owner = os.getpid()
        self._at_exit = partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        if threading.current_thread() is threading.main_thread():
            self._sigterm = Sigterm(self.stop)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> R:
        """Return the next result. Raises what ended the run, as ``run()`` would."""
        if self._closed:
            raise StopIteration
        if self._handed is not None:
            self._acknowledge(self._handed)
            self._handed = None
        if self._ready:
            # Did the run end meanwhile?
            self._listen(0.0)
        while True:
            while self._ready and not (self._stopped or self._taken_back):
                frame = self._ready.popleft()
                if str(frame.header["id"]) in self._seen:
                    self._acknowledge(frame)
                    continue
                value: R = self._read(frame)
                # Only now: one that cannot be read here was not handed out.
                self._remember(frame)
                self._handed = frame
                return value
            if self._outcome is not None:
                self._end_with_outcome()
            self._listen(None)

    @property
    def open(self) -> bool:
        """Whether it takes messages: not ended, not stopped, and no copy in a process that was forked."""
        return not self._closed and not self._stopped and self._owner == os.getpid()

    def stop(self) -> None:
        """Drain, from any thread; the iteration ends."""
        self._stopped = True
        self._signal_supervisor()

    def close(self) -> None:
        """Drain and wait until every process is gone."""
        if self._closed:
            return
        began = time.monotonic()
        deadline = began + self._grace + _SLACK
        self._child.channel.queue(Kind.DRAIN, {"reason": "closed"})
        self._child.channel.flush()
        while self._outcome is None and time.monotonic() < deadline:
            try:
                self._listen(deadline - time.monotonic())
            except KeyboardInterrupt:
                if time.monotonic() < began + SECOND_AFTER:
                    # One Ctrl-C may send two, to the process and to its group.
                    continue
                # The second one: whoever presses it does not want to wait.
                log.warning("interrupted again: killing what still runs")
                self._child.channel.queue(Kind.HASTEN)
                self._child.channel.flush()
            except SupervisorLost:
                return
        outcome = self._outcome
        self._finish()
        if outcome is not None:
            self.summary = outcome.summary
            failure = outcome.report.text if outcome.report is not None else outcome.error
            if failure:
                log.error("a failure while the iterator was being closed: %s", failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is KeyboardInterrupt and not self._closed:
                self._tell_of_the_second()
        finally:
            self.close()

    def _tell_of_the_second(self) -> None:
        while True:
            try:
                if running := self._running():
                    text = "draining: calls that run (%d) have %g s to end; a second Ctrl-C kills them"
                    log.warning(text, running, self._grace)
            except KeyboardInterrupt:
                # Of the same Ctrl-C, sent to the process and to its group: said all the same.
                continue
            return

    def __del__(self) -> None:
        # A half-built one has nothing to close, and a forked copy is not the owner.
        if hasattr(self, "_at_exit"):
            self._close_if_ours()

    def _close_if_ours(self) -> None:
        if self._owner == os.getpid():
            self.close()

    def _remember(self, frame: Frame) -> None:
        self._seen[str(frame.header["id"])] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def _acknowledge(self, frame: Frame) -> None:
        self._child.channel.queue(Kind.ACK, {"child": frame.header["child"], "numbers": [frame.header["number"]]})
        self._child.channel.flush()

    def _listen(self, timeout: float | None) -> None:
        """Take what the supervisor says. Raises ``SupervisorLost`` where it died without its last word."""
        if self._child.channel.wants_write:
            # Its socket is full because ours is: reading makes room.
            timeout = 0.05
        ready = self._watch(timeout)
        for frame in self._child.channel.read():
            self._heard(frame)
        self._child.channel.flush()
        # One turn does not read everything that a dead supervisor has left.
        died = self._child.watch in ready and self._child.channel.fileno() not in ready
        if (died or self._child.channel.eof) and self._outcome is None:
            pid = self._child.pid
            self._child.kill()
            code = self._finish()
            hint = f". {GUARD}" if self._fresh and not self._greeted else ""
            raise SupervisorLost("(supervisor)", pid, f"{describe_exit(code)}{hint}")

    def _watch(self, timeout: float | None) -> dict[int, int]:
        """Wait for the supervisor, showing the progress meanwhile."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            now = time.monotonic()
            self._progress.tick(now)
            until = min(deadline, self._progress.due)
            ready = self._poll.poll(None if until == math.inf else max(0.0, until - now) * 1000)
            if ready or time.monotonic() >= deadline:
                return dict(ready)

    def _heard(self, frame: Frame) -> None:
        if frame.kind is Kind.RESULT:
            self._ready.append(frame)
        elif frame.kind is Kind.HELLO:
            self._greeted = True
            if self._stopped:
                # Stopped before it could hear signals.
                self._signal_supervisor()
        elif frame.kind is Kind.TAKEN_BACK:
            self._taken_back = self._repeatable
        elif frame.kind is Kind.BYE:
            self._outcome = pickle.loads(frame.blob)  # noqa: S301  (our own child's)

    def _read(self, frame: Frame) -> Any:
        return pickle.loads(frame.blob)  # noqa: S301  (our own worker's, never a queue's)

    def _end_with_outcome(self) -> NoReturn:
        """Raise what the run's end means for the loop."""
        assert self._outcome is not None
        self._finish()
        if self._outcome.failed:
            raise _not_the_end(self._outcome.exception())
        self.summary = self._outcome.summary
        raise StopIteration

    def _finish(self) -> int:
        """Reap the supervisor and give back what was borrowed from the process."""
        self._closed = True
        code = self._reap()
        atexit.unregister(self._at_exit)
        if self._sigterm is not None:
            self._sigterm.remove()
        self._ended()
        return code

    def _reap(self) -> int:
        poll = select.poll()
        poll.register(self._child.watch, select.POLLIN)
        if not poll.poll(_SLACK * 1000):
            self._child.kill()
        return self._child.reap()

    def _signal_supervisor(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if not self._closed:
                os.kill(self._child.pid, signal.SIGTERM)


def _not_the_end(error: BaseException) -> BaseException:
    """Return the error, within another where it would pass for the end of the loop."""
    if not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError("a task raised StopIteration")
    wrapped.__cause__ = error
    return wrapped


def _running(plan: RunPlan, board: Scoreboard) -> int:
    return sum(reading.running for reading in readings(plan, board))


def _close_at_exit(left_open: weakref.ref[Results[Any]]) -> None:
    """Drain at the interpreter's end, where an iterator was left open."""
    iteration = left_open()
    if iteration is not None:
        iteration._close_if_ours()
