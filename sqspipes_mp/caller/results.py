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
import socket
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.caller.progress.progress import Progress
from sqspipes_mp.caller.sigterm import Sigterm
from sqspipes_mp.caller.suspend import follow, leave
from sqspipes_mp.errors import GUARD, SqsPipesError, StartFailed, StartRefused, SupervisorLost
from sqspipes_mp.ipc.birth import Birth
from sqspipes_mp.ipc.channel import Frame, Kind, describe_exit
from sqspipes_mp.ipc.map_lock import MapLock
from sqspipes_mp.ipc.outcome import Outcome
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.summary import Summary, readings
from sqspipes_mp.messages.plain import lines
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.supervisor.child import PASSING, Child, Target
from sqspipes_mp.supervisor.child import start as start_child
from sqspipes_mp.supervisor.children import Mains
from sqspipes_mp.supervisor.restart import START_PATIENCE, RestartAt, Starts
from sqspipes_mp.supervisor.run import supervisor_main
from sqspipes_mp.supervisor.shutdown import SECOND_AFTER
from sqspipes_mp.supervisor.stop_requests import hangs_up

log = logging.getLogger("sqspipes_mp.engine")

R = TypeVar("R")

#: Remembered ids of results that were handed out: a result that comes again after its worker's death is dropped.
_REMEMBERED = 100_000
#: Seconds beyond ``shutdown_grace`` after which the caller waits no longer for its supervisor.
SLACK = 20.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """The parts of an iteration, put together by ``Runs``."""

    plan: RunPlan
    broker: Broker
    board: Scoreboard
    #: The main functions of the children.
    mains: Mains
    context: BaseContext
    #: Called once, at the iteration's end.
    ended: Callable[[], None]
    #: The engine: it removes its temporary files when nothing refers to it any more.
    owner: object
    progress: Progress
    #: The supervisor's end of the line for orders.
    orders: socket.socket


class Results(Iterator[R]):
    """Hands out each result once.

    A result is acknowledged, and its message deleted, when the *next* result is asked for: an exception in the loop's
    body loses nothing. Closing (``close()``, leaving a ``with``, losing the last reference) stops the run; results
    that were not acknowledged come again in the next run. Not for several threads at once.
    """

    #: The map's lock, which the supervisor holds as well.
    _lock: MapLock | None = None

    def __init__(self, start: Start) -> None:
        plan, board, context = start.plan, start.board, start.context
        self._summary: Summary | None = None
        #: Indexes of the stages that run.
        self.stages = plan.selected
        self._grace = plan.settings.grace
        self._ended = start.ended
        self._running = partial(_running, plan, board)
        self._progress = start.progress
        self._owned_by = start.owner
        self._ready: deque[Frame] = deque()
        self._handed: Frame | None = None
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._outcome: Outcome | None = None
        self._closed = False
        self._stopped = False
        #: Whether the supervisor is a fresh process, which imports the program, and whether it has said HELLO.
        self._fresh = context.get_start_method() != "fork"
        self._greeted = False
        #: Whether the workers have taken back the results on their way: those come again in the next run.
        self._taken_back = False
        assert plan.sink is not None
        self._repeatable = not plan.pipeline.stages[plan.sink].is_source
        self._sigterm: Sigterm | None = None
        self._sighup: Sigterm | None = None
        #: The thread that is in ``next`` just now.
        self._reader: int | None = None
        self._over = threading.Event()

        lock = self._lock

        def target(birth: Birth) -> tuple[Callable[..., None], tuple[Any, ...]]:
            method = context.get_start_method()
            return supervisor_main, (birth, plan, start.broker, board, start.mains, method, start.orders, lock)

        with contextlib.nullcontext() if lock is None else lock.bequeathed():
            self._child = _start_supervisor(context, target)
        self._poll = select.poll()
        self._poll.register(self._child.channel.fileno(), select.POLLIN)
        self._poll.register(self._child.watch, select.POLLIN)
        # Runs before multiprocessing's own exit handler, which would wait for the supervisor for ever.
        self._owner = os.getpid()
        self._at_exit = partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        if threading.current_thread() is threading.main_thread():
            self._sigterm = Sigterm(self.stop)
            if hangs_up():
                self._sighup = Sigterm(self.stop, signal.SIGHUP)
        follow(self._child.pid)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> R:
        """Return the next result. Raises the exception that ended the run, as ``run()`` would.

        Whatever it raises, Ctrl-C included, the run is stopped and the iteration closed by then.
        """
        if self._closed:
            raise StopIteration
        self._reader = threading.get_ident()
        try:
            return self._next()
        except StopIteration:
            raise
        except BaseException as error:
            # The error's traceback keeps this iterator, in a notebook or REPL for ever (sys.last_value): nothing else
            # would close it, and its workers would go on.
            if isinstance(error, KeyboardInterrupt) and not self._closed:
                self._warn_of_the_second()
            self.close()
            raise
        finally:
            self._reader = None

    def _next(self) -> R:
        """Return the next result of an open iteration."""
        if self._handed is not None:
            self._acknowledge(self._handed)
            self._handed = None
        if self._ready:
            # The run may have ended meanwhile.
            self._listen(0.0)
        while True:
            while self._ready and not (self._stopped or self._taken_back):
                frame = self._ready.popleft()
                if str(frame.header["id"]) in self._seen:
                    self._acknowledge(frame)
                    continue
                value: R = self._read(frame)
                # After the unpickling: a result that cannot be read was not handed out.
                self._remember(frame)
                self._handed = frame
                return value
            if self._outcome is not None:
                self._end_with_outcome()
            self._listen(None)

    @property
    def summary(self) -> Summary:
        """Every stage's figures, once the iteration has ended or was closed.

        Raises:
            SqsPipesError: before the end, and where an exception was the end.
        """
        if self._summary is None:
            missing = "its end was an exception" if self._closed else "read the results to their end, or close them"
            raise SqsPipesError(f"this iteration has no summary: {missing}")
        return self._summary

    @property
    def open(self) -> bool:
        """Whether the iteration takes messages: not ended, not stopped, and no copy in a forked process."""
        return not self._closed and not self._stopped and self._owner == os.getpid()

    def stop(self) -> None:
        """Stop the run, from any thread; the iteration ends."""
        self._stopped = True
        self._signal_supervisor()

    def close(self) -> None:
        """Stop the run and wait until every process is gone."""
        if self._closed:
            return
        began = time.monotonic()
        deadline = began + self._grace + SLACK
        self._child.channel.queue(Kind.DRAIN, {"reason": "closed"})
        self._child.channel.flush()
        while self._outcome is None and time.monotonic() < deadline:
            try:
                self._listen(deadline - time.monotonic())
            except KeyboardInterrupt:
                if time.monotonic() < began + SECOND_AFTER:
                    # One Ctrl-C may send two signals, to the process and to its group.
                    continue
                # A second Ctrl-C.
                log.warning("interrupted again: killing what still runs")
                self._child.channel.queue(Kind.HASTEN)
                self._child.channel.flush()
            except SupervisorLost:
                return
        outcome = self._outcome
        self._finish()
        if outcome is not None:
            self._summary = outcome.summary
            failure = outcome.report.text if outcome.report is not None else outcome.error
            if failure:
                log.error("a failure while the iterator was being closed: %s", lines(str(failure)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is KeyboardInterrupt and not self._closed:
                self._warn_of_the_second()
        finally:
            self.close()

    def _warn_of_the_second(self) -> None:
        """Log the effect of a second Ctrl-C."""
        while True:
            try:
                if running := self._running():
                    text = "draining: calls that run (%d) have %g s to end; a second Ctrl-C kills them"
                    log.warning(text, running, self._grace)
            except KeyboardInterrupt:
                # The second signal of one Ctrl-C (process and group each get one); the message is logged anyway.
                continue
            return

    def __del__(self) -> None:
        # An object that failed in its constructor has nothing to close, and a forked copy is not the owner.
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
        """Handle the supervisor's frames, waiting ``timeout`` seconds for the first (None: for ever).

        Raises ``SupervisorLost`` where the supervisor died without a BYE.
        """
        if self._child.channel.wants_write:
            # The supervisor's socket is full because ours is: reading makes room.
            timeout = 0.05
        ready = self._watch(timeout)
        for frame in self._child.channel.read():
            self._heard(frame)
        self._child.channel.flush()
        # One read may leave some of a dead supervisor's frames.
        died = self._child.watch in ready and self._child.channel.fileno() not in ready
        if (died or self._child.channel.eof) and self._outcome is None:
            pid = self._child.pid
            # A kill before it has ended would be taken for the cause of its end.
            code = self._finish()
            hint = f". {GUARD}" if self._fresh and not self._greeted else ""
            raise SupervisorLost("(supervisor)", pid, f"{describe_exit(code)}{hint}")

    def _watch(self, timeout: float | None) -> dict[int, int]:
        """Wait ``timeout`` seconds for the supervisor, showing progress meanwhile. Returns the descriptors' events."""
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
                # ``stop`` came before the supervisor could hear signals.
                self._signal_supervisor()
        elif frame.kind is Kind.TAKEN_BACK:
            self._taken_back = self._repeatable
        elif frame.kind is Kind.BYE:
            self._outcome = pickle.loads(frame.blob)  # noqa: S301  (our own child's)

    def _read(self, frame: Frame) -> Any:
        return pickle.loads(frame.blob)  # noqa: S301  (our own worker's, never a queue's)

    def _end_with_outcome(self) -> NoReturn:
        """Raise ``StopIteration``, or the exception that ended the run."""
        assert self._outcome is not None
        self._finish()
        if self._outcome.failed:
            raise _not_the_end(self._outcome.exception())
        self._summary = self._outcome.summary
        raise StopIteration

    def _finish(self) -> int:
        """Reap the supervisor and remove our handlers from the process. Returns the supervisor's exit status."""
        self._closed = True
        leave(self._child.pid)
        code = self._reap()
        atexit.unregister(self._at_exit)
        for handler in (self._sigterm, self._sighup):
            if handler is not None:
                handler.remove()
        self._ended()
        if self._sigterm is not None and not self._over.is_set():
            self._over.set()
            self._sigterm.hand_on()
        self._over.set()
        return code

    def _reap(self) -> int:
        poll = select.poll()
        poll.register(self._child.watch, select.POLLIN)
        if not poll.poll(SLACK * 1000):
            self._child.kill()
        return self._child.reap()

    def _signal_supervisor(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if not self._closed:
                os.kill(self._child.pid, signal.SIGTERM)


def _start_supervisor(context: BaseContext, target: Target) -> Child:
    """Start the supervisor, as patiently as a supervisor starts its children. Raises ``BootError``."""
    starts, role = Starts(), "the supervisor"
    while True:
        try:
            return start_child(context, target, name="supervisor", inherited=())
        except OSError as error:
            why = str(error)
            if error.errno not in PASSING:
                raise StartFailed(role, why) from error
        decision = starts.refused(time.monotonic(), 0, alive=False)
        if not isinstance(decision, RestartAt):
            raise StartRefused(role, START_PATIENCE, why)
        log.warning("%s could not be started: %s; trying again in %.1f s", role, why, decision.delay)
        threading.Event().wait(decision.delay)


def _not_the_end(error: BaseException) -> BaseException:
    """Return the error, wrapped where it is a ``StopIteration``, which would end the loop without a word."""
    if not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError("a task raised StopIteration")
    wrapped.__cause__ = error
    return wrapped


def _running(plan: RunPlan, board: Scoreboard) -> int:
    return sum(reading.running for reading in readings(plan, board))


def _close_at_exit(left_open: weakref.ref[Results[Any]]) -> None:
    """Close an iterator that is still open at the interpreter's end."""
    iteration = left_open()
    if iteration is None or iteration._owner != os.getpid():
        return
    if iteration._reader not in (None, threading.get_ident()):
        # A daemon thread waits for a result: it ends the iteration itself.
        iteration.stop()
        iteration._over.wait(iteration._grace + SLACK)
    iteration.close()
