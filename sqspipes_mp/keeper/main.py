"""The keeper: one process per engine that keeps leases alive and gives back what the dead held.

A thread in a worker could not: it stops while C code holds the GIL, and a dead worker has no threads. The keeper
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

from sqspipes_mp.brokers.base import Completion, Connection
from sqspipes_mp.errors import BrokerBusy, SqsPipesError
from sqspipes_mp.host.clock import lease_now
from sqspipes_mp.ipc.birth import Assignment, begin, orphaned
from sqspipes_mp.ipc.channel import EXIT_BOOT, EXIT_FAULT, Channel, Kind
from sqspipes_mp.ipc.leases import Cause, Lease, LeaseTable, id_digest
from sqspipes_mp.ipc.report.report import Report, pack_exception
from sqspipes_mp.ipc.scoreboard import (
    KEEPER_BEAT,
    KEEPER_CHARGED,
    KEEPER_DEAD,
    KEEPER_EXTENDED,
    KEEPER_LOST,
    KEEPER_RELEASED,
    HeaderField,
)
from sqspipes_mp.keeper.counts import WaitCount, tell_left, tell_strays
from sqspipes_mp.keeper.drained import DrainWatch
from sqspipes_mp.keeper.extend import due
from sqspipes_mp.keeper.judge import judge
from sqspipes_mp.keeper.letters import killed_header, killed_letter
from sqspipes_mp.messages.attempts import is_last, pause
from sqspipes_mp.pipeline.stages import Stage

log = logging.getLogger("sqspipes_mp.keeper")

#: Seconds between two looks at the credentials.
_TEND_EVERY = 30.0
#: Leases per call to extend.
_AT_ONCE = 10
#: Longest rest between two looks, seconds, and as a share of the visibility timeout: new leases wake nobody.
_LONGEST_REST, _REST_SHARE = 1.0, 1 / 8


def keeper_main(orders: Assignment, *, boots: bool) -> None:
    """Run the keeper; ``boots``: it is the engine's first, and checks the queues."""
    begin(orders.birth)
    channel = Channel(orders.birth.sock)
    plan = orders.plan
    orders.board.set_header(KEEPER_BEAT, time.monotonic_ns())
    try:
        if plan.settings.setup is not None:
            plan.settings.setup()
        if boots:
            with closing(orders.broker.open()) as connection:
                connection.ensure(plan.pipeline.specs_for(plan.selected), create=plan.settings.create_queues)
                tell_left(plan, connection)
                tell_strays(plan, connection)
        connection = orders.broker.open(patience=plan.keeper_patience, wallet=orders.board.wallet)
        connection.tend()
    except BaseException as error:
        # A wrong region, a missing queue or right, a failing setup: the engine ends with this very error.
        channel.send(Kind.FAILED, {"boot": True}, _boot_report(error).to_bytes())
        os._exit(EXIT_BOOT)
    try:
        channel.send(Kind.READY)
        Keeper(orders, connection, channel).run()
        connection.close()
    except BaseException as error:
        report = pack_exception(error, stage=None, pid=os.getpid(), message_id=None)
        channel.send(Kind.FAULT, {}, report.to_bytes())
        os._exit(EXIT_FAULT)
    channel.send(Kind.BYE)


def _boot_report(error: BaseException) -> Report:
    """Return what the caller is to raise; the package's own errors say all in their text, wherever they arose."""
    ours = isinstance(error, SqsPipesError)
    if ours:
        error.__traceback__ = error.__cause__ = None
        error.__suppress_context__ = True
    report = pack_exception(error, stage=None, pid=os.getpid(), message_id=None, booting=True)
    return replace(report, notes=(), where="", booting=False) if ours else report


class Keeper:
    """Turns: take orders, extend what is due, judge the dead, look for drained queues."""

    def __init__(self, orders: Assignment, connection: Connection, channel: Channel) -> None:
        self._plan = orders.plan
        self._board = orders.board
        self._connection = connection
        self._channel = channel
        self._queues = orders.plan.queue_names
        self._visibility = orders.plan.settings.visibility
        self._longest = orders.broker.longest_hold
        self._rest = min(_LONGEST_REST, self._visibility * _REST_SHARE)
        self._watch: DrainWatch | None = None
        self._waiting = WaitCount(orders.plan, orders.board, connection, self._beat)
        self._tend_at = time.monotonic() + _TEND_EVERY
        self._quit = False

    def run(self) -> None:
        """Turn until told to quit; what is left to judge then is judged first."""
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
                again = min(again, self._waiting.look(time.monotonic()))
            except BrokerBusy as busy:
                # What is due stays due, and what is to be judged unjudged: the next turn tries again.
                log.info("%s", busy)
                again = time.monotonic() + self._rest / 2

    def _look_for_the_end(self) -> float:
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
        """Say that this process moves, before each call that may take a while."""
        self._board.set_header(KEEPER_BEAT, time.monotonic_ns())

    def _listen(self, timeout: float) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        while self._channel.waiting or poll.poll(timeout * 1000):
            timeout = 0.0
            frame = self._channel.recv()
            if frame is None:
                orphaned()
            elif frame.kind is Kind.WATCH:
                self._watch = DrainWatch(self._plan, self._board, self._connection, self._beat)
            elif frame.kind is Kind.QUIT:
                self._quit = True

    # -- heartbeats ---------------------------------------------------------------------------------------------

    def _extend_due(self) -> float:
        """Extend what is due; return when to look again (monotonic s)."""
        now = lease_now()
        ahead = now - time.monotonic()
        again = now + self._visibility / 4
        due_by_seconds: dict[int, list[tuple[LeaseTable, Lease]]] = {}
        for index in range(self._board.regions):
            region = self._board.region(index)
            if not region.live:
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
            # Call by call, so that what was extended is noted though the next call may fail.
            for start in range(0, len(leases), _AT_ONCE):
                self._extend(leases[start : start + _AT_ONCE], seconds)
        return again - ahead

    def _extend(self, leases: list[tuple[LeaseTable, Lease]], seconds: int) -> None:
        # Between the look and the call its worker may have begun to close a lease: ask again just before.
        current = [(region, lease) for region, lease in leases if self._unchanged(region, lease)]
        if not current:
            return
        self._beat()
        now = lease_now()
        stale = set(self._connection.extend([lease.handle for _, lease in current], seconds))
        for region, lease in current:
            if lease.handle in stale:
                region.lose(lease)
            else:
                region.keep(lease, now + seconds)
        self._count(KEEPER_EXTENDED, len(current) - len(stale))
        self._count(KEEPER_LOST, len(stale))

    def _unchanged(self, region: LeaseTable, lease: Lease) -> bool:
        fresh = region.read(lease.index, self._queues)
        return fresh is not None and fresh.generation == lease.generation and fresh.state == lease.state

    def _stage(self, region: LeaseTable) -> Stage:
        return self._plan.pipeline.stages[self._plan.seats[region.slot].stage]

    def _count(self, field: HeaderField, amount: int) -> None:
        self._board.set_header(field, self._board.header(field) + amount)

    # -- the dead -----------------------------------------------------------------------------------------------

    def _judge_dead(self) -> None:
        for index in range(self._board.regions):
            region = self._board.region(index)
            if region.to_judge:
                self._judge(region)
                region.mark_judged()

    def _judge(self, region: LeaseTable) -> None:
        cause, exitcode, pid = region.death
        stage = self._stage(region)
        verdict = judge(region.leases(self._queues), cause, region.blamed)
        for lease in verdict.alone:
            # Before any of them can be received again.
            self._board.isolate(self._board.slots, id_digest(lease.handle.message_id))
        # On FIFO the running one comes first: its group stays closed until it is visible again.
        for lease in verdict.charge:
            self._beat()
            self._charge(region, lease, exitcode, pid)
            # Judged: should this keeper die before the rest is, the next one must not charge it again.
            region.lose(lease)
        if verdict.delete:
            self._beat()
            self._connection.complete([Completion(lease.handle) for lease in verdict.delete])
        if verdict.release:
            self._beat()
            self._connection.extend([lease.handle for lease in verdict.release], 0.0)
            self._board.add_stage(stage.index, KEEPER_RELEASED, len(verdict.release))
            log.info("%s: %d messages of dead worker %d are back in their queue", stage.name, len(verdict.release), pid)

    def _charge(self, region: LeaseTable, lease: Lease, exitcode: int, pid: int) -> None:
        stage = self._stage(region)
        blamed = region.blamed
        cause = blamed.cause if blamed is not None and blamed.means(lease) else Cause.CRASH
        attempt = lease.charges + 1
        body = region.body(lease, self._plan.calls)
        receives = 0 if self._connection.keeps_charges else lease.receives
        last = is_last(attempt, receives, stage.task.max_attempts, held=cause is Cause.HOLD)
        # Without its body it cannot be moved by hand; the next delivery, which will have one, decides.
        if last and body is not None and stage.dead is not None:
            if self._plan.counted:
                self._channel.send(Kind.DEAD_LETTERED, killed_header(stage, lease, body, cause, exitcode, pid))
            attributes = region.attributes(lease, self._plan.calls)
            letter = killed_letter(stage, lease, body, cause, exitcode, pid, region.stack, attributes)
            self._connection.dead_letter([letter])
            self._board.add_stage(stage.index, KEEPER_DEAD, 1)
            return
        # A keeper that ends here, or finds the broker busy, judges again and notes the same number again.
        self._board.charge(self._board.slots, id_digest(lease.handle.message_id), attempt)
        delay = pause(attempt, lease.group, random.uniform)
        self._connection.extend([lease.handle], delay, attempts=attempt)
        self._board.add_stage(stage.index, KEEPER_CHARGED, 1)
