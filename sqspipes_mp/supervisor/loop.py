"""The supervisor: one thread, one wait, no network. Runs where ``Engine.run`` was called.

::

    in this process                          in the children
    ───────────────                          ───────────────
    wakeup socket  ◀── signals, stop()
    pidfd          ◀── the kernel: it died   worker, keeper
    channel        ◀── READY, FAILED, FAULT, RESULT, STOPPED, ENDED, RECYCLE, BYE; DRAINED (keeper)
    channel        ──▶ DRAIN, RELEASE, ACK, RECYCLE (workers); WATCH, JUDGE, QUIT (keeper)
    scoreboard     ◀── counters, running calls, leases

It decides with ``restart`` and ``shutdown``, which are pure, hears through ``events`` (children here, everybody else in
``requests``), acts through ``children``, ends by ``stopping``, and never blocks but in the one wait, whose timeout is
the next deadline.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.errors import BootError, RestartLimit, StartRefused
from sqspipes_mp.ipc.channel import Frame, Kind, ParentChannel, describe_exit
from sqspipes_mp.ipc.leases import Cause
from sqspipes_mp.ipc.outcome import Outcome
from sqspipes_mp.ipc.report.report import Report
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.summary import summarize
from sqspipes_mp.pipeline.leftovers import left_note
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.supervisor.child import Child
from sqspipes_mp.supervisor.children import Children, Death, Mains, Slot
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.requests import Requests
from sqspipes_mp.supervisor.restart import BOOT_FAILURES, START_PATIENCE, WINDOW, GiveUp, RestartAt, Starts
from sqspipes_mp.supervisor.signals import Wakeup, watching
from sqspipes_mp.supervisor.stopping import Stopping
from sqspipes_mp.supervisor.watchdog import Watchdog

log = logging.getLogger("sqspipes_mp.supervisor")

#: Seconds after which a wait that ends too late means that this process was stopped.
_STOPPED = 0.5
#: Lost keepers in a row (none of them ready) after which the engine stops.
_KEEPER_FAILURES = 5
#: Where refused starts of the keeper are counted, beside those of the workers' slots.
_KEEPER_SEAT = -1


class Ticking(Protocol):
    """What is done now and then while a run goes on: showing its progress. ``due``: when next (monotonic s)."""

    due: float

    def tick(self, now: float) -> None:
        """Do it where it is due."""


class Supervisor:
    """One run. ``caller``: the line to the process that iterates, where that is another one; ``progress``: what shows
    it to people, here only where the caller waits here.
    """

    def __init__(
        self,
        plan: RunPlan,
        broker: Broker,
        board: Scoreboard,
        context: Any,
        mains: Mains,
        wakeup: Wakeup,
        caller: ParentChannel | None = None,
        progress: Ticking | None = None,
    ) -> None:
        self._plan = plan
        self._board = board
        self._crew = Children(plan, broker, board, context, mains)
        self._lines = Events()
        self._watchdog = Watchdog(self._crew, self._lines)
        self._ending = Stopping(self._crew, self._lines, caller)
        self._orders = Requests(self._crew, self._lines, self._ending, wakeup, caller)
        self._wakeup = wakeup
        self._caller = caller
        self._progress = progress
        self._keeper_failures = 0
        self._keeper_at: float | None = None
        self._starts = Starts()
        self._began = time.monotonic()

    def run(self) -> Outcome:
        """Start everything, watch it, stop it; whatever happens, no child is left."""
        ending = self._ending
        with watching(self._wakeup, self._orders.signals):
            self._orders.connect()
            try:
                self._start_keeper()
                while not ending.over:
                    self._turn()
            finally:
                self._crew.bury_all()
                self._lines.close()
        seconds = time.monotonic() - self._began
        summary = summarize(self._plan, self._board, ending.reason, seconds)
        log.info("stopped (%s) after %.1f s: %s", ending.reason, seconds, "; ".join(map(str, summary.stages)))
        source = self._plan.source
        note = left_note(self._plan) if source is not None and summary[source.name].done else None
        return Outcome(summary, ending.report, ending.error, self._orders.signal, note)

    def _turn(self) -> None:
        now = time.monotonic()
        times = [self._watchdog.deadline(now), self._ending.deadline()]
        times += [place.restart_at for place in self._crew.places if place.restart_at is not None]
        if self._keeper_at is not None:
            times.append(self._keeper_at)
        if self._progress is not None:
            times.append(self._progress.due)
        until = max(now, min(times))
        self._lines.wait(until - now)
        began, now = now, time.monotonic()
        if now - until > _STOPPED:
            # Whoever stopped this process (Ctrl-Z does it to the whole group) has stopped the calls, too.
            self._board.stood_still(int(now * 1e9), int((now - began) * 1e9))
        if self._keeper_at is not None and self._keeper_at <= now:
            self._start_keeper()
        for place in self._crew.places:
            if place.restart_at is not None and place.restart_at <= now:
                place.restart_at = None
                self._start_worker(place)
        self._watchdog.look(now)
        if self._progress is not None:
            self._progress.tick(now)
        self._ending.advance(time.monotonic())

    # -- starting -----------------------------------------------------------------------------------------------

    def _start_keeper(self) -> None:
        self._keeper_at = None
        try:
            keeper = self._crew.start_keeper(time.monotonic())
        except OSError as error:
            self._keeper_at = self._refused(_KEEPER_SEAT, "the keeper", error)
            return
        self._starts.started(_KEEPER_SEAT)
        self._lines.adopt(keeper, lambda: self._keeper_died(keeper), lambda frame: self._on_keeper(keeper, frame))
        if self._crew.keeper_booted:
            self._tell_watching(keeper)
        if self._ending.quitting:
            self._lines.tell(keeper.channel, Kind.QUIT)

    def _start_worker(self, place: Slot) -> None:
        try:
            child = self._crew.start_worker(place, time.monotonic())
        except OSError as error:
            place.restart_at = self._refused(place.slot, self._crew.name(place), error)
            return
        if child is not None:
            self._starts.started(place.slot)
            self._lines.adopt(
                child,
                lambda: self._worker_died(place),
                lambda frame: self._on_worker(place, child, frame),
            )

    def _refused(self, seat: int, name: str, error: OSError) -> float | None:
        """Take note that the system let a child not start; return when to try again."""
        # Not the error itself: its frames hold the scoreboard, and whoever keeps the log's records would keep that.
        why = str(error)
        alive = any(place.child is not None for place in self._crew.places)
        decision = self._starts.refused(time.monotonic(), seat, alive=alive)
        if isinstance(decision, RestartAt):
            log.warning("%s could not be started: %s; trying again in %.1f s", name, why, decision.delay)
            return decision.when
        log.error("%s could not be started: %s; stopping", name, why)
        self._ending.fail(StartRefused(name, START_PATIENCE, why))
        self._ending.over = self._ending.over or not self._crew.keeper_booted
        return None

    # -- hearing ------------------------------------------------------------------------------------------------

    def _on_keeper(self, keeper: Child, frame: Frame) -> None:
        if frame.kind is Kind.READY:
            keeper.ready = True
            self._keeper_failures = 0
            if not self._crew.keeper_booted:
                self._keeper_booted(keeper)
        elif frame.kind is Kind.DRAINED and self._plan.counted:
            self._orders.watching = False
            self._pass_on(frame, keeper)
        elif frame.kind is Kind.DRAINED:
            self._ending.drain("drained")
        elif frame.kind is Kind.BURIED:
            self._pass_on(frame, keeper)
        elif frame.kind in {Kind.FAULT, Kind.FAILED}:
            # The next one would be refused too.
            self._ending.out_of_time = self._ending.out_of_time or self._crew.keeper_booted
            self._ending.fail(Report.from_bytes(frame.blob))
        elif frame.kind is Kind.BYE:
            keeper.leaving_since = time.monotonic()

    def _keeper_booted(self, keeper: Child) -> None:
        self._crew.keeper_booted = True
        self._tell_watching(keeper)
        if not self._ending.begun:
            for place in self._crew.places:
                self._start_worker(place)

    def _tell_watching(self, keeper: Child) -> None:
        if self._orders.watching or self._plan.until is not None:
            self._lines.tell(keeper.channel, Kind.WATCH)

    def _on_worker(self, place: Slot, child: Child, frame: Frame) -> None:
        if frame.kind is Kind.READY:
            child.ready = True
            self._crew.policies[place.seat.stage].booted()
            self._watchdog.ready(place)
        elif frame.kind is Kind.FAILED and frame.header.get("boot"):
            place.boot_report = Report.from_bytes(frame.blob)
        elif frame.kind in {Kind.FAILED, Kind.FAULT}:
            self._ending.fail(Report.from_bytes(frame.blob))
        elif frame.kind in {Kind.RESULT, Kind.STEP, Kind.BURIED}:
            self._pass_on(frame, child)
        elif frame.kind is Kind.STOPPED:
            child.stopped = True
        elif frame.kind is Kind.ENDED:
            place.ended = True
        elif frame.kind is Kind.RECYCLE:
            place.starved = bool(frame.header.get("starved"))
            log.info("%s (pid %d) is being replaced: %s", self._crew.name(place), child.pid, frame.header.get("reason"))
        elif frame.kind is Kind.BYE:
            child.leaving_since = time.monotonic()

    def _pass_on(self, frame: Frame, child: Child) -> None:
        if self._caller is not None:
            self._lines.tell(self._caller, frame.kind, {**frame.header, "child": child.number}, frame.blob)

    # -- deaths -------------------------------------------------------------------------------------------------

    def _keeper_died(self, keeper: Child) -> None:
        code = keeper.bury()
        self._crew.keeper = None
        if keeper.leaving_since is not None or self._ending.out_of_time:
            return
        text = describe_exit(code)
        if not self._crew.keeper_booted:
            if not self._ending.begun:
                self._ending.fail(BootError("the keeper", keeper.pid, text))
            self._ending.over = True
            return
        self._keeper_failures += 1
        if self._keeper_failures > _KEEPER_FAILURES:
            self._ending.fail(BootError("the keeper", keeper.pid, text))
            return
        if self._ending.quitting and not self._crew.unjudged():
            return
        log.warning("the keeper (pid %d) was lost: %s; restarting it", keeper.pid, text)
        self._start_keeper()

    def _worker_died(self, place: Slot) -> None:
        death = self._crew.bury_worker(place)
        self._watchdog.gone(place)
        name = self._crew.name(place)
        if death.stack and not death.clean:
            log.warning("%s (pid %d) was doing this:\n%s", name, death.pid, death.stack.rstrip())
        if death.clean:
            place.finished = place.ended
            if place.finished:
                self._maybe_ended()
            elif not self._ending.begun:
                self._replace(place, death)
            return
        if self._ending.begun:
            if place.cause is not Cause.CUT:
                log.warning("%s (pid %d) was lost while draining: %s", name, death.pid, death.text)
            return
        policy = self._crew.policies[place.seat.stage]
        decision = policy.died(
            time.monotonic(), ready=death.ready, lived=death.lived, done=death.done, charged=death.charged
        )
        if isinstance(decision, GiveUp):
            self._give_up(place, death, decision)
            return
        place.restart_at = decision.when
        booting = f"failed to boot ({place.boot_report.type_name})" if place.boot_report else "died before it was ready"
        what = f"was lost: {death.text}" if death.ready else f"{booting}: {death.text}"
        log.warning("%s (pid %d) %s; restart in %.1f s", name, death.pid, what, decision.delay)

    def _replace(self, place: Slot, death: Death) -> None:
        """Start the successor of a worker that went as planned: at once, but for one that would fare no better."""
        policy = self._crew.policies[place.seat.stage]
        later = policy.starved(time.monotonic(), lived=death.lived, done=death.done) if place.starved else None
        if later is None:
            self._start_worker(place)
            return
        place.restart_at = later.when
        name = self._crew.name(place)
        log.warning("%s has no memory for its messages; its next worker starts in %.1f s", name, later.delay)

    def _give_up(self, place: Slot, death: Death, decision: GiveUp) -> None:
        stage = self._crew.stage(place).name
        if decision.booting:
            log.error("stage %s: %d boot failures in a row; stopping", stage, BOOT_FAILURES)
            self._ending.fail(place.boot_report or BootError(f"a worker of stage {stage!r}", death.pid, death.text))
        else:
            log.error("stage %s: %d workers died within %g s; stopping", stage, decision.deaths, WINDOW)
            self._ending.fail(RestartLimit(stage, decision.deaths, WINDOW, death.text))

    def _maybe_ended(self) -> None:
        """End a run whose every worker was a source that ended: nothing is left to do here."""
        if self._plan.until is None and all(place.finished for place in self._crew.places):
            self._ending.drain("ended")
