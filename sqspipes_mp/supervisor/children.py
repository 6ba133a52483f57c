"""The engine's children: who sits where, how each is started, and what a death means (supervisor)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.ipc.birth import Assignment, Birth
from sqspipes_mp.ipc.channel import Kind, describe_death, describe_exit
from sqspipes_mp.ipc.leases import Cause, Lease, LeaseState, LeaseTable
from sqspipes_mp.ipc.report.report import Report
from sqspipes_mp.ipc.scoreboard import CALL_STARTED, DONE, INCARNATION, REGION, S_BOOTING, STATE, Scoreboard
from sqspipes_mp.ipc.stack_dump import StackFile
from sqspipes_mp.pipeline.plan import RunPlan, Seat
from sqspipes_mp.pipeline.stages import Stage
from sqspipes_mp.supervisor.child import Child, start
from sqspipes_mp.supervisor.restart import RestartPolicy

log = logging.getLogger("sqspipes_mp.supervisor")

#: How long to wait for the keeper when every region still has to be judged, seconds.
_NO_REGION = 0.05
#: Deaths that are charged to what was running.
_CHARGED = frozenset({Cause.CRASH, Cause.TIMEOUT, Cause.HOLD, Cause.MEMORY, Cause.FULL})
#: What is said of a death where the exit code would only say that it was killed.
_TEXTS = {
    Cause.TIMEOUT: "killed: its call outlived the task's timeout",
    Cause.HOLD: "killed: its call had its message for nearly as long as the queue service allows",
    Cause.MEMORY: "killed: memory limit",
    Cause.FULL: "killed: it had most of the container's memory, which was nearly full",
    Cause.ROOM: "killed to make room: the container's memory was nearly full",
}


@dataclass(frozen=True, slots=True)
class Mains:
    """What the children run; handed in, since a folder never imports another process's folder."""

    worker: Callable[[Assignment], None]
    keeper: Callable[..., None]


@dataclass(slots=True)
class Slot:
    """A slot and who sits there now."""

    slot: int
    seat: Seat
    child: Child | None = None
    region: LeaseTable | None = None
    restart_at: float | None = None
    finished: bool = False
    ended: bool = False
    #: Its worker goes because it had no memory for the messages themselves.
    starved: bool = False
    cause: Cause | None = None
    #: The late call: when it began (monotonic ns; 0: its lease alone tells) and its lease, where it has one of its own.
    late: tuple[int, Lease | None] = (0, None)
    kill_at: float | None = None
    kill_by: float = 0.0
    #: When to look again for how long its messages have been in flight (monotonic s).
    hold_look_at: float = 0.0
    stack: StackFile | None = None
    boot_report: Report | None = None

    def forget_stack(self) -> None:
        """Close what its worker's stack was written to."""
        if self.stack is not None:
            self.stack.close()
            self.stack = None


@dataclass(frozen=True, slots=True)
class Death:
    """What is known of a death: ``clean`` as asked; ``lived`` in seconds; ``done``: messages its stage has completed so
    far; ``charged``: a message goes to its account; ``text`` and ``stack`` (of what it was doing, if known) for people.
    """

    pid: int
    ready: bool
    clean: bool
    lived: float
    done: int
    charged: bool
    text: str
    stack: str


class Children:
    """Keeper and workers."""

    def __init__(self, plan: RunPlan, broker: Broker, board: Scoreboard, context: Any, mains: Mains) -> None:
        self.plan = plan
        self.board = board
        self.keeper: Child | None = None
        self.keeper_booted = False
        self.places = [Slot(slot, seat) for slot, seat in enumerate(plan.seats)]
        self.policies = {index: RestartPolicy() for index in plan.selected}
        self._broker = broker
        #: The broker's ``longest_hold``.
        self.longest_hold = broker.longest_hold
        self._context = context
        self._mains = mains
        #: Descriptors of this process that are no child's business, beside those of the children.
        self.own_fds: list[int] = []

    def name(self, place: Slot) -> str:
        return f"{self.stage(place).name}[{place.seat.index}]"

    def stage(self, place: Slot) -> Stage:
        return self.plan.pipeline.stages[place.seat.stage]

    def worker(self, number: object) -> Child | None:
        """Return the worker with that number, if it still lives; its pid may be another's by now."""
        return next((p.child for p in self.places if p.child is not None and p.child.number == number), None)

    def unjudged(self) -> bool:
        """Tell whether the keeper still has to judge a dead worker's leases."""
        return any(self.board.region(index).to_judge for index in range(self.board.regions))

    @property
    def children(self) -> list[Child]:
        children = [place.child for place in self.places if place.child is not None]
        return [*children, self.keeper] if self.keeper is not None else children

    def start_keeper(self, now: float) -> Child:
        """Fork the keeper; the first one checks the queues."""
        boots = not self.keeper_booted

        def target(birth: Birth) -> tuple[Callable[..., None], tuple[Any, ...]]:
            orders = Assignment(plan=self.plan, broker=self._broker, board=self.board, birth=birth)
            return partial(self._mains.keeper, boots=boots), (orders,)

        self.keeper = start(self._context, target, name="keeper", inherited=self._fds(), now=now)
        return self.keeper

    def start_worker(self, place: Slot, now: float) -> Child | None:
        """Fork a worker for a place; None (and a later try) while no region is free. Raises ``OSError``."""
        region = self.board.free_region()
        if region is None:
            place.restart_at = now + _NO_REGION
            return None
        region.assign(place.slot)
        board = self.board
        board.put(place.slot, REGION, region.index)
        # What its predecessor was is no longer so.
        board.put(place.slot, STATE, S_BOOTING)
        board.put(place.slot, INCARNATION, board.get(place.slot, INCARNATION) + 1)
        place.region, place.restart_at, place.cause, place.kill_at = region, None, None, None
        place.ended = place.starved = False
        try:
            return self._fork_worker(place, region, now)
        except OSError:
            place.forget_stack()
            # Nobody came to hold anything; the keeper frees it.
            region.mark_dead(Cause.CLEAN, 0, 0)
            self.tell_keeper(Kind.JUDGE)
            raise

    def _fork_worker(self, place: Slot, region: LeaseTable, now: float) -> Child:
        board = self.board
        stack = place.stack = StackFile()

        def target(birth: Birth) -> tuple[Callable[..., None], tuple[Any, ...]]:
            orders = Assignment(
                plan=self.plan,
                broker=self._broker,
                board=board,
                birth=birth,
                slot=place.slot,
                seat=place.seat,
                region=region.index,
                stack=stack,
            )
            return self._mains.worker, (orders,)

        place.child = start(self._context, target, name=self.name(place), inherited=self._fds(), now=now)
        return place.child

    def bury_worker(self, place: Slot) -> Death:
        """Reap a dead worker and leave its leases to the keeper."""
        child, region = place.child, place.region
        assert child is not None
        assert region is not None
        pid, ready, left = child.pid, child.ready, child.leaving_since is not None
        lived = time.monotonic() - child.started_at
        code = child.bury()
        place.child = None
        clean = left and place.cause in {None, Cause.CLEAN}
        cause = Cause.CLEAN if clean else place.cause or Cause.CRASH
        charged = cause in _CHARGED and _charges_one(region, cause)
        board = self.board
        done = sum(board.get(other.slot, DONE) for other in self.places if other.seat.stage == place.seat.stage)
        stack = place.stack.read() if place.stack is not None else ""
        place.forget_stack()
        region.mark_dead(cause, code, pid, stack.encode())
        # Its own field, but it is dead for certain: nobody else would clear it.
        board.put(place.slot, CALL_STARTED, 0)
        self.tell_keeper(Kind.JUDGE)
        text = _TEXTS.get(cause, describe_death(code) if ready else describe_exit(code))
        return Death(pid, ready, clean, lived, done, charged, text, stack)

    def tell_keeper(self, kind: Kind) -> None:
        if self.keeper is not None:
            self.keeper.channel.queue(kind)
            self.keeper.channel.flush()

    def kill_workers(self, cause: Cause) -> None:
        for place in self.places:
            if place.child is not None:
                place.cause = place.cause or cause
                place.child.kill()

    def bury_all(self) -> None:
        """Leave no child, whatever brought us here."""
        for child in self.children:
            child.kill()
            child.bury()
        for place in self.places:
            place.child = None
            place.forget_stack()
        self.keeper = None

    def _fds(self) -> tuple[int, ...]:
        """Return what a forked child inherits and must close."""
        fds = list(self.own_fds)
        for child in self.children:
            fds.append(child.channel.fileno())
            if child.own_watch:
                fds.append(child.watch)
        fds += [place.stack.fileno() for place in self.places if place.stack is not None and place.child is not None]
        return tuple(fds)


def _charges_one(region: LeaseTable, cause: Cause) -> bool:
    """Tell whether a message goes to the account of a death: the one it was killed for, or the only one that ran."""
    if cause is not Cause.CRASH:
        return region.blamed is not None
    running = [lease for lease in region.leases(()) if lease.state is LeaseState.RUNNING]
    return len(running) == 1 and not running[0].company
