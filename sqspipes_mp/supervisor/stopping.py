"""Ends a run: keeps the reason, and takes the steps of ``shutdown`` until no child is left (supervisor).

``shutdown`` decides which step is due; this module takes it.
"""

from __future__ import annotations

import logging
import math
import signal
import time

from sqspipes_mp.errors import SqsPipesError
from sqspipes_mp.ipc.channel import Kind, ParentChannel
from sqspipes_mp.ipc.leases import Cause
from sqspipes_mp.ipc.report.report import Report
from sqspipes_mp.ipc.summary import readings
from sqspipes_mp.messages.plain import lines, one_line
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.shutdown import Shutdown, Step

log = logging.getLogger("sqspipes_mp.supervisor")

#: Reasons at which no message runs.
_NOTHING_RUNS = frozenset({"drained", "ended"})
#: Seconds that workers have to end by themselves then, whatever ``shutdown_grace`` is: a worker may be about to report
#: that the last message has failed.
_LAST_STEPS = 5.0


class Stopping:
    """A run's end, which begins with the first ``drain`` or ``fail``."""

    def __init__(self, children: Children, events: Events, caller: ParentChannel | None) -> None:
        self._children = children
        self._events = events
        self._caller = caller
        self._shutdown: Shutdown | None = None
        #: Whether nothing is left to wait for.
        self.over = False
        #: The reason in the run's summary.
        self.reason = ""
        #: The exception of a child that ended the run.
        self.report: Report | None = None
        #: The engine's own error that ended the run.
        self.error: SqsPipesError | None = None
        #: Whether the keeper was told to finish.
        self.quitting = False
        #: Whether a keeper is neither waited for nor replaced.
        self.out_of_time = False

    @property
    def begun(self) -> bool:
        """Whether the run is being ended."""
        return self._shutdown is not None

    def deadline(self) -> float:
        """Return when the next step may be due, monotonic seconds."""
        return math.inf if self._shutdown is None else self._shutdown.deadline()

    def end(self) -> None:
        """End the run without another step."""
        self.over = True

    def abandon_keeper(self) -> None:
        """Wait for no keeper, and have none replaced."""
        self.out_of_time = True

    def fail(self, why: Report | SqsPipesError) -> None:
        """Drain because of an error; the caller gets the first one."""
        if self.report is None and self.error is None:
            if isinstance(why, Report):
                self.report = why
            else:
                self.error = why
        elif isinstance(why, Report):
            first = self.report
            alike = first is not None and (first.type_name, first.message) == (why.type_name, why.message)
            words = f"{why.type_name}: {one_line(why.message)}" if alike else lines(why.text)
            log.error("another failure while stopping%s: %s", f" ({why.where})" if why.where else "", words)
        self.drain("failed")

    def drain(self, reason: str, *, at_once: bool = False) -> None:
        """Let running calls finish, and have no worker receive or start any more; the first ``reason`` counts.

        ``at_once``: ``hasten`` follows.
        """
        if self._shutdown is not None:
            return
        children = self._children
        grace = children.plan.settings.grace
        if reason in _NOTHING_RUNS:
            grace = max(grace, _LAST_STEPS)
        running = sum(reading.running for reading in readings(children.plan, children.board))
        # A user who sent a signal waits now, and may not know for which calls.
        patient = running == 0 or reason not in signal.Signals.__members__
        second = "" if patient else "; a second signal kills them"
        if running and at_once:
            log.warning("stopping (%s): killing the calls that run (%d); their messages come again", reason, running)
        elif running:
            log.log(
                logging.INFO if patient else logging.WARNING,
                "stopping (%s): calls that run (%d) have %g s to end%s", reason, running, grace, second,
            )  # fmt: skip
        elif reason not in _NOTHING_RUNS:
            log.info("stopping (%s): no call runs", reason)
        self.reason = reason
        self._shutdown = Shutdown(time.monotonic(), grace)
        if self._caller is not None and reason not in _NOTHING_RUNS:
            # Results that the caller has not been given go back to their queue now.
            self._events.tell(self._caller, Kind.TAKEN_BACK)
        for slot in children.slots:
            slot.cancel_start()
        for slot, worker in children.workers:
            if not children.boots(slot):
                # A source may already have sent messages, or even have ended.
                self._events.tell(worker.child.channel, Kind.DRAIN, {"until": self._shutdown.began + grace})
            else:
                # A booting worker holds nothing, and its init may take long.
                slot.kill(Cause.CUT)
                worker.child.kill()
        keeper = children.keeper
        if not keeper.booted and keeper.child is not None:
            keeper.child.kill()

    def hasten(self) -> None:
        """Kill the workers that still run."""
        if self._shutdown is not None:
            self._shutdown.hasten(time.monotonic())

    def advance(self, now: float) -> None:
        """Take the steps that are due at ``now`` (monotonic seconds)."""
        if self._shutdown is None:
            return
        workers = self._children.workers
        receiving = sum(not slot.stopped for slot, _ in workers)
        keeper = self._children.keeper.child
        for step in self._shutdown.steps(now, workers=len(workers), receiving=receiving, keeper=keeper is not None):
            if step is Step.RELEASE:
                for _, worker in workers:
                    self._events.tell(worker.child.channel, Kind.RELEASE)
            elif step is Step.KILL_WORKERS:
                if self._shutdown.now_at is None:
                    log.warning("%d workers have not finished in time; killing them", len(workers))
                self._children.kill_workers(Cause.CUT)
            elif step is Step.QUIT_KEEPER:
                self.quitting = True
                self._children.tell_keeper(Kind.QUIT)
            elif step is Step.KILL_KEEPER and keeper is not None:
                if not self.out_of_time:
                    log.warning("the keeper cannot reach the queues; what is held comes back when its leases end")
                self.abandon_keeper()
                keeper.kill()
            elif step is Step.OVER:
                self.end()
