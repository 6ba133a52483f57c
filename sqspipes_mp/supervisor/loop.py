"""The supervisor: one thread, one wait, no network. Runs where ``Engine.run`` was called.

::

    in this process                          in the children
    ───────────────                          ───────────────
    wakeup socket  ◀── signals, stop()
    pidfd          ◀── the kernel: it died   worker, keeper
    channel        ◀── READY, FAILED, FAULT, RESULT, STEP, DEAD_LETTERED, STOPPED, ENDED, RECYCLE, BYE; DRAINED (keeper)
    channel        ──▶ DRAIN, RELEASE, ACK, LET_GO, REPLACE (workers); WATCH, JUDGE, LOOK, QUIT (keeper)
    scoreboard     ◀── counters, running calls, leases

The supervisor decides with ``slot``, ``restart`` and ``shutdown``, which are pure. It hears through ``events`` (signals
and the caller in ``stop_requests``), acts through ``children`` and ends by ``stopping``. It blocks in one wait alone,
whose timeout is the next deadline.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict
from typing import Any, Protocol

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.errors import (
    ConfigError,
    RestartLimit,
    StartFailed,
    StartRefused,
    TaskTimeout,
    WorkerLost,
)
from sqspipes_mp.ipc.channel import Frame, Kind, ParentChannel, describe_exit
from sqspipes_mp.ipc.leases import Cause
from sqspipes_mp.ipc.outcome import Outcome
from sqspipes_mp.ipc.report.dead_log import tell_dead
from sqspipes_mp.ipc.report.report import Report
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.summary import summarize
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.pipeline.source_leftovers import left_note
from sqspipes_mp.supervisor.cancelling import Cancelling
from sqspipes_mp.supervisor.child import PASSING, Child
from sqspipes_mp.supervisor.children import Children, Death, Mains
from sqspipes_mp.supervisor.control import Control
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.http_process import HttpProcess, open_http
from sqspipes_mp.supervisor.keeper_slot import KeeperSlot, Loss
from sqspipes_mp.supervisor.orders import Orders
from sqspipes_mp.supervisor.pausing import Pausing
from sqspipes_mp.supervisor.registration import Registration, describe
from sqspipes_mp.supervisor.restart import BOOT_FAILURES, START_PATIENCE, WINDOW, GiveUp, RestartAt, Starts
from sqspipes_mp.supervisor.scaling import Scaling
from sqspipes_mp.supervisor.slot import Slot
from sqspipes_mp.supervisor.stop_requests import Requests, Wakeup
from sqspipes_mp.supervisor.stopping import Stopping
from sqspipes_mp.supervisor.vitals import Vitals
from sqspipes_mp.supervisor.watchdog import Watchdog

log = logging.getLogger("sqspipes_mp.supervisor")

#: Seconds by which a wait ends too late where the whole process was stopped meanwhile.
_STOPPED = 0.5
#: Causes of a death that was asked for; where a worker is expected, the next one starts at once.
_ASKED = frozenset({Cause.CLEAN, Cause.CUT, Cause.CANCEL})
#: The keeper's key among the starts that the system refused; a worker's is its slot's index.
_KEEPER = -1


class Ticking(Protocol):
    """Work that a process does now and then while a run goes on: showing its progress."""

    #: When the work is due next, monotonic seconds.
    due: float

    def tick(self, now: float) -> None:
        """Do the work where it is due at ``now`` (monotonic seconds)."""


class Supervisor:
    """One run."""

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
        orders: socket.socket | None = None,
    ) -> None:
        """Prepare a run; no child is started.

        Args:
            plan: the run's.
            broker: where the queues are.
            board: a fresh scoreboard.
            context: the multiprocessing context that starts the children.
            mains: the functions that the children run.
            wakeup: turns signals and ``stop()`` into bytes.
            caller: the channel to the process that iterates; None where this process is the caller.
            progress: the display of the run's progress, where this process is the caller.
            orders: the supervisor's end of the caller's private line for orders; closed at the end.
        """
        self._plan = plan
        self._board = board
        self._children = Children(plan, broker, board, context, mains)
        self._events = Events()
        self._watchdog = Watchdog(self._children, self._events)
        self._stopping = Stopping(self._children, self._events, caller)
        self._requests = Requests(self._children, self._events, self._stopping, wakeup, caller)
        self._vitals = Vitals(self._children)
        self._pausing = Pausing(self._children, self._events, self._stopping)
        self._scaling = Scaling(self._children, self._events, self._stopping, self._start_worker)
        self._cancelling = Cancelling(self._children)
        self._orders = Orders(
            self._children, self._events, self._requests, self._pausing, self._scaling, self._cancelling
        )
        self._control = Control(self._events, self._orders.carry)
        if orders is not None:
            self._control.adopt(orders)
        #: None: the run serves no HTTP.
        self._http: HttpProcess | None = None
        self._caller = caller
        self._progress = progress
        self._broker = broker
        self._starts = Starts()
        self._began = time.monotonic()

    def run(self) -> Outcome:
        """Start every child, watch them, stop them; no child is left, whatever happens."""
        stopping = self._stopping
        registration = None
        with self._requests.heard():
            try:
                self._listen()
                if not stopping.over:
                    registration = self._register()
                    self._start_keeper()
                self._turn_until_over()
            except BaseException as error:
                # A handler of the host's has raised (SIGALRM's, say). What is held goes back before that goes on.
                stopping.drain(type(error).__name__, at_once=True)
                stopping.hasten()
                self._turn_until_over()
                raise
            finally:
                self._children.reap_all()
                if self._http is not None:
                    self._http.close()
                self._control.close()
                if registration is not None:
                    registration.leave()
                self._events.close()
        seconds = time.monotonic() - self._began
        summary = summarize(self._plan, self._board, stopping.reason, seconds)
        log.info(
            "stopped (%s) after %.1f s: %s", stopping.reason, seconds, "; ".join(map(str, summary.stages)),
            extra={"domain": self._plan.pipeline.domain, "summary": asdict(summary)},
        )  # fmt: skip
        source = self._plan.source
        note = left_note(self._plan) if source is not None and summary[source.name].done else None
        return Outcome(summary, stopping.report, stopping.error, self._requests.signal, note)

    def _listen(self) -> None:
        """Open the socket of the HTTP process; a run that was to have one, and cannot, is over."""
        try:
            self._http = open_http(self._plan.http, self._board, self._events)
        except ConfigError as error:
            self._stopping.fail(error)
            self._stopping.end()

    def _register(self) -> Registration | None:
        """Tell of this run in the statistics and in the registry, take orders there, and begin to serve HTTP."""
        caller = os.getpid() if self._caller is None else os.getppid()
        http = None if self._http is None else self._http.address
        about = json.dumps(describe(self._plan, self._board, self._broker.describe(), caller, http))
        self._board.describe(about)
        registration = Registration.enter(self._board.run_id, about)
        if registration is not None:
            self._control.listen(registration)
            registration.publish()
        if self._http is not None:
            self._http.begin("" if registration is None else registration.path)
        return registration

    def _turn_until_over(self) -> None:
        while not self._stopping.over:
            self._turn()

    def _turn(self) -> None:
        now = time.monotonic()
        until = max(now, self._deadline(now))
        self._events.wait(until - now)
        began, now = now, time.monotonic()
        # What is credited already.
        until += (stopped := self._requests.take_stopped())
        began += stopped
        if now - until > _STOPPED:
            # Ctrl-Z and the like stop the whole process group, so the calls have stood still as well.
            self._board.stood_still(int(now * 1e9), int((now - began) * 1e9))
        if self._children.keeper.start_due(now):
            self._start_keeper()
        for slot in list(self._children.slots):
            if slot.start_due(now):
                self._start_worker(slot)
        self._watchdog.look(now)
        self._vitals.look(now, ending=self._stopping.begun)
        self._control.look(now)
        self._orders.look(now)
        self._pausing.look(now)
        self._scaling.look(now)
        if self._http is not None:
            self._http.look(now)
        if self._progress is not None:
            self._progress.tick(now)
        self._stopping.advance(time.monotonic())

    def _deadline(self, now: float) -> float:
        """Return when the wait ends at the latest, monotonic seconds."""
        times = [self._watchdog.deadline(now), self._stopping.deadline(), self._vitals.deadline()]
        times += [self._control.deadline(), self._orders.deadline(), self._pausing.deadline(), self._scaling.deadline()]
        starts = [self._children.keeper.restart_at, *(slot.restart_at for slot in self._children.slots)]
        times += [start for start in starts if start is not None]
        if self._http is not None:
            times.append(self._http.deadline())
        if self._progress is not None:
            times.append(self._progress.due)
        return min(times)

    # -- starting -----------------------------------------------------------------------------------------------

    def _start_keeper(self) -> None:
        slot = self._children.keeper
        slot.cancel_start()
        try:
            keeper = self._children.start_keeper(time.monotonic())
        except OSError as error:
            self._not_started(slot, _KEEPER, "the keeper", error)
            return
        self._starts.started(_KEEPER)
        self._events.adopt(keeper, self._keeper_died, lambda frame: self._on_keeper(keeper, frame))
        if slot.booted:
            self._tell_watching(keeper)
        if self._stopping.quitting:
            self._events.tell(keeper.channel, Kind.QUIT)

    def _start_worker(self, slot: Slot) -> None:
        slot.cancel_start()
        try:
            child = self._children.start_worker(slot, time.monotonic())
        except OSError as error:
            if not self._scaling.failed(slot, str(error)):
                self._not_started(slot, slot.index, slot.name, error)
            return
        if child is not None:
            self._vitals.started(slot, slot.started_at)
            self._events.adopt(
                child,
                lambda: self._worker_died(slot),
                lambda frame: self._on_worker(slot, child, frame),
            )

    def _not_started(self, slot: Slot | KeeperSlot, key: int, name: str, error: OSError) -> None:
        """Plan another start where the error may pass, or stop."""
        # Not the error itself: its frames hold the scoreboard, and a log handler that keeps records would keep that.
        why = str(error)
        if error.errno in PASSING:
            self._refused(slot, key, name, why)
            return
        log.error("%s could not be started: %s; stopping", name, why)
        self._stopping.fail(StartFailed(name, why))
        if not self._children.keeper.booted:
            self._stopping.end()

    def _refused(self, slot: Slot | KeeperSlot, key: int, name: str, why: str) -> None:
        """Plan another start of a child that the system let not start, or stop."""
        decision = self._starts.refused(time.monotonic(), key, alive=bool(self._children.workers))
        if isinstance(decision, RestartAt):
            log.warning("%s could not be started: %s; trying again in %.1f s", name, why, decision.delay)
            slot.plan_start(decision.when)
            return
        log.error("%s could not be started: %s; stopping", name, why)
        self._stopping.fail(StartRefused(name, START_PATIENCE, why))
        if not self._children.keeper.booted:
            self._stopping.end()

    # -- hearing ------------------------------------------------------------------------------------------------

    def _on_keeper(self, keeper: Child, frame: Frame) -> None:
        slot = self._children.keeper
        if frame.kind is Kind.READY:
            if slot.got_ready():
                self._queues_checked(keeper)
        elif frame.kind is Kind.DRAINED and self._plan.counted:
            self._requests.watched()
            self._pass_on(frame, keeper)
        elif frame.kind is Kind.DRAINED:
            self._stopping.drain("drained")
        elif frame.kind is Kind.DEAD_LETTERED:
            self._pass_on(frame, keeper)
        elif frame.kind in {Kind.FAULT, Kind.FAILED}:
            if slot.booted:
                # The broker would refuse the next keeper too.
                self._stopping.abandon_keeper()
            self._stopping.fail(Report.from_bytes(frame.blob))
        elif frame.kind is Kind.BYE:
            slot.leaves(time.monotonic())

    def _queues_checked(self, keeper: Child) -> None:
        """Start the workers: the engine's first keeper is ready."""
        self._tell_watching(keeper)
        if not self._stopping.begun:
            for slot in list(self._children.slots):
                self._start_worker(slot)

    def _tell_watching(self, keeper: Child) -> None:
        if self._requests.watching or self._plan.until == "drained":
            self._events.tell(keeper.channel, Kind.WATCH)

    def _on_worker(self, slot: Slot, child: Child, frame: Frame) -> None:
        if frame.kind is Kind.READY:
            slot.got_ready()
            self._starts.started(slot.index)
            self._children.policies[slot.seat.stage].booted()
            self._watchdog.ready(slot, child)
            self._vitals.changed()
            self._scaling.ready(slot)
        elif frame.kind is Kind.FAILED and "refused" in frame.header:
            slot.start_refused(str(frame.header["refused"]))
        elif frame.kind is Kind.FAILED and frame.header.get("boot"):
            slot.boot_failed(Report.from_bytes(frame.blob))
        elif frame.kind in {Kind.FAILED, Kind.FAULT}:
            self._stopping.fail(Report.from_bytes(frame.blob))
        elif frame.kind in {Kind.RESULT, Kind.STEP, Kind.DEAD_LETTERED}:
            self._pass_on(frame, child)
        elif frame.kind is Kind.STOPPED:
            slot.stopped_receiving()
        elif frame.kind is Kind.ENDED:
            slot.source_ended()
        elif frame.kind is Kind.RECYCLE:
            reason = "max_tasks" if frame.header.get("reason") == "max_tasks_per_worker" else "memory"
            slot.wants_replacement(starved=bool(frame.header.get("starved")), reason=reason)
            log.info("%s (pid %d) is being replaced: %s", slot.name, child.pid, frame.header.get("reason"))
        elif frame.kind is Kind.BYE:
            slot.leaves(time.monotonic())
        elif frame.kind is Kind.STACK_TOLD:
            self._orders.on_stack(child, frame)
        elif frame.kind is Kind.PAUSED:
            self._pausing.on_paused(slot.seat.stage, child, frame)

    def _pass_on(self, frame: Frame, child: Child) -> None:
        if self._caller is not None:
            self._events.tell(self._caller, frame.kind, {**frame.header, "child": child.number}, frame.blob)

    # -- deaths -------------------------------------------------------------------------------------------------

    def _keeper_died(self) -> None:
        keeper = self._children.keeper.child
        assert keeper is not None
        text = describe_exit(keeper.reap())
        loss = self._children.keeper.died()
        if loss is Loss.NONE or self._stopping.out_of_time:
            return
        if loss is Loss.AT_BOOT:
            if not self._stopping.begun:
                self._stopping.fail(self._children.boot_error("the keeper", keeper.pid, text))
            self._stopping.end()
        elif loss is Loss.TOO_MANY:
            self._stopping.fail(self._children.boot_error("the keeper", keeper.pid, text))
        elif self._children.unjudged() or not self._stopping.quitting:
            log.warning("the keeper (pid %d) was lost: %s; restarting it", keeper.pid, text)
            self._start_keeper()

    def _worker_died(self, slot: Slot) -> None:
        assert slot.worker is not None
        self._vitals.dead(slot, slot.worker)
        self._cancelling.dead(slot, slot.worker)
        self._pausing.gone(slot.seat.stage, slot.worker.child)
        death = self._children.reap_worker(slot)
        self._watchdog.gone(slot)
        self._vitals.changed()
        if not slot.expected:
            self._children.drop(slot)
            if death.cause not in _ASKED:
                log.warning("%s (pid %d), one too many, was lost: %s", slot.name, death.pid, death.text)
            return
        if death.cause in _ASKED:
            if slot.finished:
                self._maybe_ended()
            elif not self._stopping.begun:
                self._replace(slot, death)
            return
        if death.stack:
            log.warning("%s (pid %d) was doing this:\n%s", slot.name, death.pid, death.stack.rstrip())
        if not self._stopping.begun:
            if not death.ready and self._scaling.failed(slot, _reason(slot, death)):
                return
            if slot.refused is not None:
                self._refused(slot, slot.index, slot.name, slot.refused)
            else:
                self._restart(slot, death)
        elif death.cause is not Cause.CUT:
            _tell_lost(slot, death, " while draining: %s", death.text)

    def _restart(self, slot: Slot, death: Death) -> None:
        """Plan the successor of a worker that was lost, or stop."""
        self._vitals.restarted(slot, death)
        decision = self._children.policies[slot.seat.stage].died(
            time.monotonic(), ready=death.ready, lived=death.lived, done=death.done, charged=death.charged
        )
        if isinstance(decision, GiveUp):
            if death.ready:
                _tell_lost(slot, death, ": %s", death.text)
            self._give_up(slot, death, decision)
            return
        slot.plan_start(decision.when)
        if death.ready:
            _tell_lost(slot, death, ": %s; restart in %.1f s", death.text, decision.delay)
            return
        booting = f"failed to boot ({slot.boot_report.type_name})" if slot.boot_report else "died before it was ready"
        log.warning("%s (pid %d) %s: %s; restart in %.1f s", slot.name, death.pid, booting, death.text, decision.delay)

    def _replace(self, slot: Slot, death: Death) -> None:
        """Start the successor of a worker that left as planned: at once, unless it would have no memory either."""
        self._vitals.restarted(slot, death)
        policy = self._children.policies[slot.seat.stage]
        later = policy.starved(time.monotonic(), lived=death.lived, done=death.done) if slot.starved else None
        if later is None:
            self._start_worker(slot)
            return
        slot.plan_start(later.when)
        log.warning("%s has no memory for its messages; its next worker starts in %.1f s", slot.name, later.delay)

    def _give_up(self, slot: Slot, death: Death, decision: GiveUp) -> None:
        stage = slot.stage.name
        if decision.booting:
            log.error("stage %s: %d boot failures in a row; stopping", stage, BOOT_FAILURES)
            role = f"a worker of stage {stage!r}"
            self._stopping.fail(slot.boot_report or self._children.boot_error(role, death.pid, death.text))
        else:
            log.error("stage %s: %d workers died within %g s; stopping", stage, decision.deaths, WINDOW)
            self._stopping.fail(RestartLimit(stage, decision.deaths, WINDOW, death.text))

    def _maybe_ended(self) -> None:
        """End the run where every worker was a source's, and all sources have ended."""
        if self._plan.until is None and all(slot.finished for slot in self._children.slots if slot.expected):
            self._stopping.drain("ended")


def _reason(slot: Slot, death: Death) -> str:
    """Return why a worker did not boot, for people."""
    return slot.boot_report.type_name if slot.boot_report else death.text


def _tell_lost(slot: Slot, death: Death, text: str, *args: object) -> None:
    """Log the loss of a worker for people and error reporters."""
    name, lease = slot.stage.name, death.lease
    error = (TaskTimeout if death.cause is Cause.TIMEOUT else WorkerLost)(name, death.pid, death.text)
    tell_dead(
        f"%s (pid %d) was lost{text}", slot.name, death.pid, *args, error=error, stage=name,
        ident=None if lease is None else lease.handle.message_id, attempt=None if lease is None else lease.charges + 1,
    )  # fmt: skip
