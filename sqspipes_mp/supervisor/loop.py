"""The supervisor: one thread, one wait, no network. Runs where ``Engine.run`` was called.

::

    in this process                          in the children
    ───────────────                          ───────────────
    wakeup socket  ◀── signals, stop()
    pidfd          ◀── the kernel: it died   worker, keeper
    channel        ◀── READY, FAILED, FAULT, RESULT, STOPPED, ENDED, RECYCLE, BYE; DRAINED (keeper)
    channel        ──▶ DRAIN, RELEASE, ACK, RECYCLE (workers); WATCH, JUDGE, QUIT (keeper)
    scoreboard     ◀── counters, running calls, leases

It decides with ``restart`` and ``shutdown``, which are pure, hears through ``switchboard``, acts through ``crew``,
and never blocks but in the one wait, whose timeout is the next deadline.
"""

from __future__ import annotations

import logging
import signal
import time
from typing import Any

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.control import Frame, Kind, ParentChannel, describe_exit
from sqspipes_mp.errors import BootError, RestartLimit, SqsPipesError, StartRefused
from sqspipes_mp.plan import RunPlan
from sqspipes_mp.progress import Progress
from sqspipes_mp.region import Cause
from sqspipes_mp.report import Report
from sqspipes_mp.scoreboard import S_BOOTING, STATE, Scoreboard
from sqspipes_mp.summary import summarize
from sqspipes_mp.supervisor.child import Child
from sqspipes_mp.supervisor.crew import Crew, Death, Mains, Place
from sqspipes_mp.supervisor.outcome import Outcome
from sqspipes_mp.supervisor.restart import BOOT_FAILURES, START_PATIENCE, WINDOW, GiveUp, RestartAt, Starts
from sqspipes_mp.supervisor.shutdown import SECOND_AFTER, Shutdown, Step
from sqspipes_mp.supervisor.signals import STOP, Wakeup, watching
from sqspipes_mp.supervisor.switchboard import Switchboard
from sqspipes_mp.supervisor.watchdog import Watchdog

log = logging.getLogger("sqspipes_mp.supervisor")

#: Lost keepers in a row (none of them ready) after which the engine stops.
_KEEPER_FAILURES = 5
#: Where refused starts of the keeper are counted, beside those of the workers' slots.
_KEEPER_SEAT = -1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
        progress: Progress | None = None,
    ) -> None:
        self._plan = plan
        self._board = board
        self._crew = Crew(plan, broker, board, context, mains)
        self._lines = Switchboard()
        self._watchdog = Watchdog(self._crew, self._lines)
        self._wakeup = wakeup
        self._caller = caller
        self._progress = progress
        self._shutdown: Shutdown | None = None
        self._over = False
        self._reason = ""
        self._signal: int | None = None
        self._signal_at = 0.0
        self._report: Report | None = None
        self._error: SqsPipesError | None = None
        self._quitting = False
        self._out_of_time = False
        self._keeper_failures = 0
        #: Whether the caller waits for every queue to be empty (map).
        self._watching = False
        self._keeper_at: float | None = None
        self._starts = Starts()
        self._began = time.monotonic()

    def run(self) -> Outcome:
        """Start everything, watch it, stop it; whatever happens, no child is left."""
        crew, lines = self._crew, self._lines
        # A terminal's Ctrl-C is the iterating caller's to take; it closes its iterator.
        with watching(self._wakeup, _SIGNALS if self._caller is None else (signal.SIGTERM,)):
            lines.connect(self._wakeup.reader, self._on_wakeup)
            if self._caller is not None:
                lines.connect(self._caller, self._on_caller)
                # From now on signals are heard.
                lines.tell(self._caller, Kind.HELLO)
                crew.own_fds.append(self._caller.fileno())
            crew.own_fds += [*self._wakeup.fds(), *lines.fds()]
            try:
                self._start_keeper()
                while not self._over:
                    self._turn()
            finally:
                self._bury_all()
                lines.close()
        seconds = time.monotonic() - self._began
        summary = summarize(self._plan, self._board, self._reason, seconds)
        log.info("stopped (%s) after %.1f s: %s", self._reason, seconds, "; ".join(map(str, summary.stages)))
        return Outcome(summary, self._report, self._error, self._signal)

    def _turn(self) -> None:
        now = time.monotonic()
        times = [self._watchdog.deadline(now)]
        times += [place.restart_at for place in self._crew.places if place.restart_at is not None]
        if self._keeper_at is not None:
            times.append(self._keeper_at)
        if self._shutdown is not None:
            times.append(self._shutdown.deadline())
        if self._progress is not None:
            times.append(self._progress.due)
        self._lines.wait(min(times) - now)
        now = time.monotonic()
        if self._keeper_at is not None and self._keeper_at <= now:
            self._start_keeper()
        for place in self._crew.places:
            if place.restart_at is not None and place.restart_at <= now:
                place.restart_at = None
                self._start_worker(place)
        self._watchdog.look(now)
        if self._progress is not None:
            self._progress.tick(now)
        self._advance(time.monotonic())

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
        if self._crew.keeper_booted and (self._watching or self._plan.until is not None):
            self._lines.tell(keeper.channel, Kind.WATCH)
        if self._quitting:
            self._lines.tell(keeper.channel, Kind.QUIT)

    def _start_worker(self, place: Place) -> None:
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
        self._fail(StartRefused(name, START_PATIENCE, why))
        self._over = self._over or not self._crew.keeper_booted
        return None

    # -- hearing ------------------------------------------------------------------------------------------------

    def _on_keeper(self, keeper: Child, frame: Frame) -> None:
        if frame.kind is Kind.READY:
            keeper.ready = True
            self._keeper_failures = 0
            if not self._crew.keeper_booted:
                self._keeper_booted(keeper)
        elif frame.kind is Kind.DRAINED and self._plan.counted:
            self._watching = False
            self._pass_on(frame, keeper)
        elif frame.kind is Kind.DRAINED:
            self._drain("drained")
        elif frame.kind is Kind.BURIED:
            self._pass_on(frame, keeper)
        elif frame.kind in {Kind.FAULT, Kind.FAILED}:
            # The next one would be refused too.
            self._out_of_time = self._out_of_time or self._crew.keeper_booted
            self._fail(Report.from_bytes(frame.blob))
        elif frame.kind is Kind.BYE:
            keeper.leaving_since = time.monotonic()

    def _keeper_booted(self, keeper: Child) -> None:
        self._crew.keeper_booted = True
        if self._watching or self._plan.until is not None:
            self._lines.tell(keeper.channel, Kind.WATCH)
        if self._shutdown is None:
            for place in self._crew.places:
                self._start_worker(place)

    def _on_worker(self, place: Place, child: Child, frame: Frame) -> None:
        if frame.kind is Kind.READY:
            child.ready = True
            self._crew.policies[place.seat.stage].booted()
            self._watchdog.ready(place)
        elif frame.kind is Kind.FAILED and frame.header.get("boot"):
            place.boot_report = Report.from_bytes(frame.blob)
        elif frame.kind in {Kind.FAILED, Kind.FAULT}:
            self._fail(Report.from_bytes(frame.blob))
        elif frame.kind in {Kind.RESULT, Kind.STEP, Kind.BURIED}:
            self._pass_on(frame, child)
        elif frame.kind is Kind.STOPPED:
            child.stopped = True
        elif frame.kind is Kind.ENDED:
            place.ended = True
        elif frame.kind is Kind.RECYCLE:
            log.info("%s (pid %d) is being replaced: %s", self._crew.name(place), child.pid, frame.header.get("reason"))
        elif frame.kind is Kind.BYE:
            child.leaving_since = time.monotonic()

    def _pass_on(self, frame: Frame, child: Child) -> None:
        if self._caller is not None:
            self._lines.tell(self._caller, frame.kind, {**frame.header, "child": child.number}, frame.blob)

    def _on_caller(self) -> None:
        assert self._caller is not None
        for frame in self._caller.read():
            if frame.kind is Kind.ACK:
                child = self._crew.worker(frame.header["child"])
                if child is not None:
                    self._lines.tell(child.channel, Kind.ACK, {"numbers": frame.header["numbers"]})
            elif frame.kind is Kind.DRAIN:
                self._signal = frame.header.get("signal")
                self._drain(str(frame.header.get("reason", "closed")))
            elif frame.kind is Kind.WATCH:
                self._watching = True
                self._crew.tell_keeper(Kind.WATCH)
            elif frame.kind is Kind.QUIT:
                self._hasten()
        if self._caller.eof:
            self._lines.hang_up(self._caller)
            self._drain("the caller is gone")
            self._hasten()
        else:
            self._lines.send(self._caller)

    def _on_wakeup(self) -> None:
        for byte in self._wakeup.take():
            if byte == STOP:
                self._drain("stopped")
            elif byte in _SIGNALS:
                # The iterating caller passes its SIGTERM on, and may not be the only one to send it.
                if self._signal is not None and self._caller is None:
                    if time.monotonic() < self._signal_at + SECOND_AFTER:
                        continue
                    log.warning("%s: killing what still runs", signal.Signals(byte).name)
                    self._hasten()
                    continue
                self._signal, self._signal_at = byte, time.monotonic()
                self._drain(signal.Signals(byte).name)

    # -- deaths -------------------------------------------------------------------------------------------------

    def _keeper_died(self, keeper: Child) -> None:
        code = keeper.bury()
        self._crew.keeper = None
        if keeper.leaving_since is not None or self._out_of_time:
            return
        text = describe_exit(code)
        if not self._crew.keeper_booted:
            if self._shutdown is None:
                self._fail(BootError("the keeper", keeper.pid, text))
            self._over = True
            return
        self._keeper_failures += 1
        if self._keeper_failures > _KEEPER_FAILURES:
            self._fail(BootError("the keeper", keeper.pid, text))
            return
        if self._quitting and not self._crew.unjudged():
            return
        log.warning("the keeper (pid %d) was lost: %s; restarting it", keeper.pid, text)
        self._start_keeper()

    def _worker_died(self, place: Place) -> None:
        death = self._crew.bury_worker(place)
        self._watchdog.gone(place)
        name = self._crew.name(place)
        if death.stack and not death.clean:
            log.warning("%s (pid %d) was doing this:\n%s", name, death.pid, death.stack.rstrip())
        if death.clean:
            place.finished = place.ended
            if place.finished:
                self._maybe_ended()
            elif self._shutdown is None:
                self._start_worker(place)
            return
        if self._shutdown is not None:
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

    def _give_up(self, place: Place, death: Death, decision: GiveUp) -> None:
        stage = self._crew.stage(place).name
        if decision.booting:
            log.error("stage %s: %d boot failures in a row; stopping", stage, BOOT_FAILURES)
            self._fail(place.boot_report or BootError(f"a worker of stage {stage!r}", death.pid, death.text))
        else:
            log.error("stage %s: %d workers died within %g s; stopping", stage, decision.deaths, WINDOW)
            self._fail(RestartLimit(stage, decision.deaths, WINDOW, death.text))

    def _maybe_ended(self) -> None:
        """End a run whose every worker was a source that ended: nothing is left to do here."""
        if self._plan.until is None and all(place.finished for place in self._crew.places):
            self._drain("ended")

    # -- stopping -----------------------------------------------------------------------------------------------

    def _fail(self, why: Report | SqsPipesError) -> None:
        """Drain because of an error; the first one is what the caller sees."""
        if self._report is None and self._error is None:
            if isinstance(why, Report):
                self._report = why
            else:
                self._error = why
        elif isinstance(why, Report):
            log.error("another failure while stopping: %s", why.text)
        self._drain("failed")

    def _drain(self, reason: str) -> None:
        if self._shutdown is not None:
            return
        grace = self._plan.settings.grace
        log.info("draining (%s): running messages have %g s", reason, grace)
        self._reason = reason
        self._shutdown = Shutdown(time.monotonic(), grace)
        if self._caller is not None and reason not in {"drained", "ended"}:
            # What it was not given yet goes back to its queue now.
            self._lines.tell(self._caller, Kind.STOPPED)
        for place in self._crew.places:
            place.restart_at = None
            if place.child is None:
                continue
            if place.child.ready or self._board.get(place.slot, STATE) != S_BOOTING:
                # Its READY may still be on the way, and a source has made something by then, or is even through.
                self._lines.tell(place.child.channel, Kind.DRAIN)
            else:
                # It holds nothing yet, and its init may take long.
                place.cause = Cause.CUT
                place.child.kill()
        if not self._crew.keeper_booted and self._crew.keeper is not None:
            self._crew.keeper.kill()

    def _hasten(self) -> None:
        if self._shutdown is not None:
            self._shutdown.hasten(time.monotonic())

    def _advance(self, now: float) -> None:
        """Take the steps of the shutdown that are due."""
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
                self._quitting = True
                self._crew.tell_keeper(Kind.QUIT)
            elif step is Step.KILL_KEEPER and keeper is not None:
                if not self._out_of_time:
                    log.warning("the keeper cannot reach the queues; what is held comes back when its leases end")
                self._out_of_time = True
                keeper.kill()
            elif step is Step.OVER:
                self._over = True

    def _bury_all(self) -> None:
        """Leave no child, whatever brought us here."""
        for child in self._crew.children:
            child.kill()
            child.bury()
        for place in self._crew.places:
            place.child = None
            if place.stack is not None:
                place.stack.close()
                place.stack = None
        self._crew.keeper = None
