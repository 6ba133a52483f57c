"""The keeper: one process per engine that extends leases and judges those of dead workers.

A thread in a worker could not: it stands still while C code holds the GIL, and it dies with its worker. The keeper
boots first and checks the queues, so that a wrong region or a missing right is one clear error and not one per worker.
"""

from __future__ import annotations

import logging
import math
import os
import random
import select
import time
from contextlib import closing
from dataclasses import replace
from functools import partial

from sqspipes_mp.brokers.base import Completion, Connection, count_requests
from sqspipes_mp.brokers.waiting import once_reachable
from sqspipes_mp.errors import BrokerBusy, SqsPipesError
from sqspipes_mp.host.clock import lease_now
from sqspipes_mp.host.title import set_title
from sqspipes_mp.ipc.birth import Assignment, begin, orphaned
from sqspipes_mp.ipc.channel import EXIT_BOOT, EXIT_FAULT, Channel, Kind
from sqspipes_mp.ipc.leases import Cause, Lease, LeaseState, LeaseTable, id_digest
from sqspipes_mp.ipc.log_line import join
from sqspipes_mp.ipc.report.report import Report, pack_exception
from sqspipes_mp.ipc.request_meter import RequestMeter
from sqspipes_mp.ipc.statistics import (
    KEEPER_BEAT,
    KEEPER_CANCELLED,
    KEEPER_CHARGED,
    KEEPER_DEAD,
    KEEPER_DONE,
    KEEPER_EXTENDED,
    KEEPER_FAILED,
    KEEPER_LEASES_LOST,
    KEEPER_LOST,
    KEEPER_RELEASED,
    KILLED_REASONS,
    HeaderField,
    StageField,
)
from sqspipes_mp.keeper.dead_letters import killed_header, killed_letter
from sqspipes_mp.keeper.extend import due
from sqspipes_mp.keeper.judge import judge
from sqspipes_mp.keeper.queue_counts import BacklogCount, DrainWatch, WaitCount, tell_left, tell_strays
from sqspipes_mp.messages.attempts import is_last, pause
from sqspipes_mp.pipeline.stages import Stage

log = logging.getLogger("sqspipes_mp.keeper")

#: Seconds between two looks at the credentials.
_TEND_EVERY = 30.0
#: Leases per call to extend.
_AT_ONCE = 10
#: Longest rest between two looks, seconds, and as a share of the visibility timeout; a new lease wakes nobody.
_LONGEST_REST, _REST_SHARE = 1.0, 1 / 8
#: States of a call whose failure its worker has counted.
_COUNTED = frozenset({LeaseState.FAILED, LeaseState.CHARGING})
#: The counter of calls that failed with their worker, by the cause of its death.
_CRASHED, _LATE, _FULL = (StageField(KEEPER_FAILED + index) for index in range(len(KILLED_REASONS)))
_KILLED = {Cause.TIMEOUT: _LATE, Cause.HOLD: _LATE, Cause.MEMORY: _FULL, Cause.FULL: _FULL}


def keeper_main(assignment: Assignment, *, boots: bool) -> None:
    """Run a keeper; ``boots``: it is the engine's first, and creates or checks the queues."""
    begin(assignment.birth)
    channel = Channel(assignment.birth.sock)
    plan = assignment.plan
    set_title(plan.pipeline.domain, "keeper")
    assignment.board.set_header(KEEPER_BEAT, time.monotonic_ns())
    try:
        if plan.settings.setup is not None:
            plan.settings.setup()
        join(plan.logs)
        if boots:
            once_reachable(partial(_check_queues, assignment), plan.wait_for_broker, partial(_rest, channel))
        connection = assignment.broker.open(patience=plan.keeper_patience, wallet=assignment.board.wallet)
        count_requests(connection, RequestMeter(assignment.board, assignment.board.slots))
        connection.tend()
    except BaseException as error:
        # A wrong region, a missing queue or right, a failing setup: the engine ends with this error.
        channel.send(Kind.FAILED, {"boot": True}, _boot_report(error).to_bytes())
        os._exit(EXIT_BOOT)
    try:
        channel.send(Kind.READY)
        Keeper(assignment, connection, channel).run()
        connection.close()
    except BaseException as error:
        report = pack_exception(error, stage=None, pid=os.getpid(), message_id=None)
        channel.send(Kind.FAULT, {}, report.to_bytes())
        os._exit(EXIT_FAULT)
    channel.send(Kind.BYE)


def _check_queues(assignment: Assignment) -> None:
    """Create or check the queues, and tell what was left in them."""
    plan = assignment.plan
    with closing(assignment.broker.open()) as connection:
        connection.ensure(plan.pipeline.specs_for(plan.selected), create=plan.settings.create_queues)
        tell_left(plan, connection)
        tell_strays(plan, connection)


def _rest(channel: Channel, seconds: float) -> None:
    """Wait for ``seconds`` of the boot, or for the supervisor's end."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    if poll.poll(seconds * 1000) and channel.recv() is None:
        orphaned()


def _boot_report(error: BaseException) -> Report:
    """Return the report that the caller raises; an error of the package says all in its text, without a traceback."""
    ours = isinstance(error, SqsPipesError)
    if ours:
        error.__traceback__ = error.__cause__ = None
        error.__suppress_context__ = True
    report = pack_exception(error, stage=None, pid=os.getpid(), message_id=None, booting=True)
    return replace(report, notes=(), where="", booting=False) if ours else report


class Keeper:
    """Takes turns: hear the supervisor, extend leases, judge those of the dead, look for drained queues."""

    def __init__(self, assignment: Assignment, connection: Connection, channel: Channel) -> None:
        self._plan = assignment.plan
        self._board = assignment.board
        self._connection = connection
        self._channel = channel
        self._queues = assignment.plan.queue_names
        stages = assignment.plan.pipeline.stages
        #: The stage of each slot.
        self._stages = [stages[seat.stage] for seat in assignment.plan.seats]
        self._visibility = assignment.plan.settings.visibility
        self._longest = assignment.broker.longest_hold
        self._rest = min(_LONGEST_REST, self._visibility * _REST_SHARE)
        self._watch: DrainWatch | None = None
        self._waiting = WaitCount(assignment.plan, assignment.board, connection, self._beat)
        self._backlog = BacklogCount(assignment.plan, assignment.board, connection, self._beat)
        self._tend_at = time.monotonic() + _TEND_EVERY
        self._quit = False

    def run(self) -> None:
        """Take turns until told to quit, and judge the last leases before that."""
        again = time.monotonic()
        while True:
            self._listen(max(0.0, min(again - time.monotonic(), self._rest)))
            self._beat()
            try:
                again = self._extend_due()
                self._judge_dead()
                if self._quit:
                    return
                again = min(again, self._look_for_the_end())
                self._tend()
                again = min(again, self._waiting.look(time.monotonic()), self._backlog.look(time.monotonic()))
            except BrokerBusy as busy:
                # Leases stay due, or unjudged, and the next turn tries again.
                log.info("%s", busy)
                again = time.monotonic() + self._rest / 2

    def _look_for_the_end(self) -> float:
        """Look for drained queues while told to; return when to look again, monotonic seconds."""
        if self._watch is None:
            return math.inf
        self._beat()
        if self._watch.drained(time.monotonic()):
            self._watch = None
            self._channel.send(Kind.DRAINED)
            return math.inf
        return time.monotonic() + self._watch.pause()

    def _tend(self) -> None:
        now = time.monotonic()
        if now >= self._tend_at:
            self._tend_at = now + _TEND_EVERY
            self._beat()
            self._connection.tend()

    def _beat(self) -> None:
        """Note that this process moves, before each call that may take long."""
        self._board.set_header(KEEPER_BEAT, time.monotonic_ns())

    def _listen(self, timeout: float) -> None:
        """Wait for the supervisor for ``timeout`` seconds at most. JUDGE only wakes: each turn looks for the dead."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        while self._channel.waiting or poll.poll(timeout * 1000):
            timeout = 0.0
            frame = self._channel.recv()
            if frame is None:
                orphaned()
            elif frame.kind is Kind.WATCH:
                self._watch = DrainWatch(self._plan, self._board, self._connection, self._beat)
            elif frame.kind is Kind.LOOK:
                self._waiting.looked_at(time.monotonic())
            elif frame.kind is Kind.QUIT:
                self._quit = True

    # -- heartbeats ---------------------------------------------------------------------------------------------

    def _extend_due(self) -> float:
        """Extend the leases that are due; return when to look again, monotonic seconds."""
        now = lease_now()
        ahead = now - time.monotonic()
        again = now + self._visibility / 4
        due_by_seconds: dict[int, list[tuple[LeaseTable, Lease]]] = {}
        for region in self._board.used_regions():
            if region.empty or not region.live:
                continue
            stage = self._stage(region)
            extensions, look = due(
                region.leases(self._queues),
                now,
                visibility=self._visibility,
                first=self._plan.first_lease,
                timeout=stage.task.timeout,
                longest=self._longest,
                ahead=ahead,
                credit=lambda started: self._board.credit(int(started * 1e9)) / 1e9,
            )
            again = min(again, look)
            for extension in extensions:
                due_by_seconds.setdefault(extension.seconds, []).append((region, extension.lease))
        for seconds, leases in due_by_seconds.items():
            # Each extension is noted before the next call, which may fail.
            for start in range(0, len(leases), _AT_ONCE):
                self._extend(leases[start : start + _AT_ONCE], seconds)
        return again - ahead

    def _extend(self, leases: list[tuple[LeaseTable, Lease]], seconds: int) -> None:
        # The worker may have begun to close a lease since the look: read again just before the call.
        current = [(region, lease) for region, lease in leases if self._unchanged(region, lease)]
        if not current:
            return
        self._beat()
        now = lease_now()
        stale = set(self._connection.extend([lease.handle for _, lease in current], seconds))
        for region, lease in current:
            if lease.handle in stale:
                region.lose(lease)
                self._board.add_stage(self._stage(region).index, KEEPER_LEASES_LOST, 1)
            else:
                region.keep(lease, now + seconds)
        self._count(KEEPER_EXTENDED, len(current) - len(stale))
        self._count(KEEPER_LOST, len(stale))

    def _unchanged(self, region: LeaseTable, lease: Lease) -> bool:
        fresh = region.read(lease.index, self._queues)
        return fresh is not None and fresh.generation == lease.generation and fresh.state == lease.state

    def _stage(self, region: LeaseTable) -> Stage:
        return self._stages[region.slot]

    def _count(self, field: HeaderField, amount: int) -> None:
        self._board.set_header(field, self._board.header(field) + amount)

    # -- the dead -----------------------------------------------------------------------------------------------

    def _judge_dead(self) -> None:
        for region in self._board.used_regions():
            if region.to_judge:
                self._judge(region)
                region.mark_judged()

    def _judge(self, region: LeaseTable) -> None:
        cause, exitcode, pid = region.death
        stage = self._stage(region)
        judgement = judge(region.leases(self._queues), cause, region.blamed, known=region.known)
        for lease in judgement.alone:
            # Before any of these messages can be received again.
            self._board.isolate(self._board.slots, id_digest(lease.handle.message_id))
        # On FIFO the message that ran comes first: its group stays closed until it is visible again.
        for lease in judgement.cancel:
            self._beat()
            self._cancel(region, lease, exitcode, pid)
            region.lose(lease)
        for lease in judgement.charge:
            self._beat()
            self._charge(region, lease, exitcode, pid)
            # Should this keeper die before the rest is judged, the next one must not charge this lease again.
            region.lose(lease)
        if judgement.delete:
            self._beat()
            stale = self._connection.complete([Completion(lease.handle) for lease in judgement.delete])
            self._board.add_stage(stage.index, KEEPER_DONE, len(judgement.delete) - len(stale))
        if judgement.release:
            self._beat()
            self._connection.extend([lease.handle for lease in judgement.release], 0.0)
            self._board.add_stage(stage.index, KEEPER_RELEASED, len(judgement.release))
            log.info(
                "%s: %d messages of dead worker %d are back in their queue", stage.name, len(judgement.release), pid
            )

    def _cancel(self, region: LeaseTable, lease: Lease, exitcode: int, pid: int) -> None:
        """Dead-letter a message whose call was cancelled; without its body its next delivery does."""
        if self._dead_letter(region, lease, Cause.CANCEL, exitcode, pid):
            self._board.add_stage(self._stage(region).index, KEEPER_CANCELLED, 1)
            self._board.forget_cancelled(id_digest(lease.handle.message_id))
        else:
            self._connection.extend([lease.handle], 0.0)

    def _dead_letter(self, region: LeaseTable, lease: Lease, cause: Cause, exitcode: int, pid: int) -> bool:
        """Dead-letter a dead worker's message; False: its body is not known here."""
        stage, calls = self._stage(region), self._plan.calls_of(self._stage(region).index)
        body = region.body(lease, calls)
        if body is None or stage.dead is None:
            return False
        if self._plan.counted:
            self._channel.send(Kind.DEAD_LETTERED, killed_header(stage, lease, body, cause, exitcode, pid))
        attributes = region.attributes(lease, calls)
        letter = killed_letter(stage, lease, body, cause, exitcode, pid, region.stack, attributes)
        self._connection.dead_letter([letter])
        return True

    def _charge(self, region: LeaseTable, lease: Lease, exitcode: int, pid: int) -> None:
        stage = self._stage(region)
        blamed = region.blamed
        cause = blamed.cause if blamed is not None and blamed.means(lease) else Cause.CRASH
        if lease.state not in _COUNTED:
            self._board.add_stage(stage.index, _KILLED.get(cause, _CRASHED), 1)
        attempt = lease.charges + 1
        receives = 0 if self._connection.keeps_charges else lease.receives
        last = is_last(attempt, receives, stage.task.max_attempts, held=cause is Cause.HOLD)
        # A message without its body cannot be moved by hand; its next delivery, which has the body, decides.
        if last and self._dead_letter(region, lease, cause, exitcode, pid):
            self._board.add_stage(stage.index, KEEPER_DEAD, 1)
            return
        # A keeper that ends here, or finds the broker busy, judges again and notes the same number again.
        self._board.charge(self._board.slots, id_digest(lease.handle.message_id), attempt)
        # A standard queue's group is a tenant, who blocks nobody.
        group = lease.group if lease.handle.queue.endswith(".fifo") else None
        delay = pause(attempt, group, random.uniform)
        self._connection.extend([lease.handle], delay, attempts=attempt)
        self._board.add_stage(stage.index, KEEPER_CHARGED, 1)
