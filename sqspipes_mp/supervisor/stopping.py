"""How a run ends: why, and step by step until no child is left (supervisor).

``shutdown`` decides which step is due; here it is taken.
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
from sqspipes_mp.ipc.scoreboard import S_BOOTING, STATE
from sqspipes_mp.ipc.summary import readings
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.shutdown import Shutdown, Step

log = logging.getLogger("sqspipes_mp.supervisor")

#: Ends at which no message runs. The workers have that long to come to their own end whatever ``shutdown_grace`` is,
#: seconds: one may be about to say that the last message has failed.
_NOTHING_RUNS, _LAST_STEPS = frozenset({"drained", "ended"}), 5.0


class Stopping:
    """A run's end: nothing until ``drain`` or ``fail``, of which the first counts."""

    def __init__(self, crew: Children, lines: Events, caller: ParentChannel | None) -> None:
        self._crew = crew
        self._lines = lines
        self._caller = caller
        self._shutdown: Shutdown | None = None
        #: Whether nothing is left to wait for.
        self.over = False
        self.reason = ""
        self.report: Report | None = None
        self.error: SqsPipesError | None = None
        #: Whether the keeper was told to finish, and whether it is not to be waited for.
        self.quitting = False
        self.out_of_time = False

    @property
    def begun(self) -> bool:
        return self._shutdown is not None

    def deadline(self) -> float:
        """Return when the next step may be due (monotonic s)."""
        return math.inf if self._shutdown is None else self._shutdown.deadline()

    def fail(self, why: Report | SqsPipesError) -> None:
        """Drain because of an error; the first one is what the caller sees."""
        if self.report is None and self.error is None:
            if isinstance(why, Report):
                self.report = why
            else:
                self.error = why
        elif isinstance(why, Report):
            log.error("another failure while stopping: %s", why.text)
        self.drain("failed")

    def drain(self, reason: str) -> None:
        """Let what runs finish, and receive no more."""
        if self._shutdown is not None:
            return
        crew = self._crew
        grace = crew.plan.settings.grace
        if reason in _NOTHING_RUNS:
            grace = max(grace, _LAST_STEPS)
        running = sum(reading.running for reading in readings(crew.plan, crew.board))
        # Whoever sent a signal waits now, and may not know for what.
        patient = running == 0 or reason not in signal.Signals.__members__
        second = "" if patient else "; a second signal kills them"
        log.log(
            logging.INFO if patient else logging.WARNING,
            "draining (%s): calls that run (%d) have %g s to end%s", reason, running, grace, second,
        )  # fmt: skip
        self.reason = reason
        self._shutdown = Shutdown(time.monotonic(), grace)
        if self._caller is not None and reason not in _NOTHING_RUNS:
            # What it was not given yet goes back to its queue now.
            self._lines.tell(self._caller, Kind.STOPPED)
        for place in crew.places:
            place.restart_at = None
            if place.child is None:
                continue
            if place.child.ready or crew.board.get(place.slot, STATE) != S_BOOTING:
                # Its READY may still be on the way, and a source has made something by then, or is even through.
                self._lines.tell(place.child.channel, Kind.DRAIN)
            else:
                # It holds nothing yet, and its init may take long.
                place.cause = Cause.CUT
                place.child.kill()
        if not crew.keeper_booted and crew.keeper is not None:
            crew.keeper.kill()

    def hasten(self) -> None:
        """Kill now what still runs."""
        if self._shutdown is not None:
            self._shutdown.hasten(time.monotonic())

    def advance(self, now: float) -> None:
        """Take the steps that are due."""
        if self._shutdown is None:
            return
        workers = [place.child for place in self._crew.places if place.child is not None]
        receiving = sum(not child.stopped for child in workers)
        keeper = self._crew.keeper
        for step in self._shutdown.steps(now, workers=len(workers), receiving=receiving, keeper=keeper is not None):
            if step is Step.RELEASE:
                for child in workers:
                    self._lines.tell(child.channel, Kind.RELEASE)
            elif step is Step.KILL_WORKERS:
                log.warning("%d workers have not finished in time; killing them", len(workers))
                self._crew.kill_workers(Cause.CUT)
            elif step is Step.QUIT_KEEPER:
                self.quitting = True
                self._crew.tell_keeper(Kind.QUIT)
            elif step is Step.KILL_KEEPER and keeper is not None:
                if not self.out_of_time:
                    log.warning("the keeper cannot reach the queues; what is held comes back when its leases end")
                self.out_of_time = True
                keeper.kill()
            elif step is Step.OVER:
                self.over = True
