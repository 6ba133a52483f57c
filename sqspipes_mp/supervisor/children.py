"""The engine's children: the keeper, the workers in their slots, their starts and their deaths (supervisor)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.errors import BootError
from sqspipes_mp.ipc.birth import Assignment, Birth
from sqspipes_mp.ipc.channel import Kind, describe_death, describe_exit
from sqspipes_mp.ipc.leases import Cause, Lease, LeaseState, LeaseTable, crashed_in
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.stack_dump import StackFile
from sqspipes_mp.ipc.statistics import (
    CALL_STARTED,
    DONE,
    EXPECTED,
    INCARNATION,
    PID,
    REGION,
    S_BOOTING,
    SEAT,
    SEATS,
    STAGE,
    STATE,
    lane_started,
)
from sqspipes_mp.pipeline.plan import RunPlan, Seat
from sqspipes_mp.supervisor.child import Child, start
from sqspipes_mp.supervisor.keeper_slot import KeeperSlot
from sqspipes_mp.supervisor.restart import RestartPolicy
from sqspipes_mp.supervisor.slot import Slot, Worker

log = logging.getLogger("sqspipes_mp.supervisor")

#: Seconds until a worker's start is tried again while the keeper still has to judge every region.
_NO_REGION = 0.05
#: Causes for which a message that ran is charged.
_CHARGED = frozenset({Cause.CRASH, Cause.TIMEOUT, Cause.HOLD, Cause.MEMORY, Cause.FULL})
#: The text for a death whose exit code would only say that the worker was killed.
_TEXTS = {
    Cause.TIMEOUT: "killed: its call outlived the task's timeout",
    Cause.HOLD: "killed: its call had its message for nearly as long as the queue service allows",
    Cause.MEMORY: "killed: memory limit",
    Cause.FULL: "killed: it had most of the container's memory, which was nearly full",
    Cause.CANCEL: "killed: its call was cancelled on demand (sqspipes-mp cancel, say)",
    Cause.ROOM: "killed to make room: the container's memory was nearly full",
}


@dataclass(frozen=True, slots=True)
class Mains:
    """The functions that children run; handed in, since a folder never imports another process's folder."""

    worker: Callable[[Assignment], None]
    keeper: Callable[..., None]


@dataclass(frozen=True, slots=True)
class Death:
    """A worker's death."""

    pid: int
    #: Whether the worker had said READY.
    ready: bool
    #: CLEAN: the worker left as asked.
    cause: Cause
    #: Seconds since the worker's start.
    lived: float
    #: Messages that all workers of the stage have completed so far.
    done: int
    #: Whether a message is charged with the death.
    charged: bool
    #: The cause, for people.
    text: str
    #: The stack of the worker's call, for people; empty where it is not known.
    stack: str
    #: The charged message's lease, where it can be read.
    lease: Lease | None = None


class Children:
    """Keeper and workers."""

    def __init__(self, plan: RunPlan, broker: Broker, board: Scoreboard, context: Any, mains: Mains) -> None:
        self.plan = plan
        self.board = board
        self.keeper = KeeperSlot()
        #: The slots that are to have a worker, or still have one.
        self.slots: list[Slot] = []
        for stage in plan.selected:
            for index in plan.slots(stage)[: plan.workers[stage]]:
                self.add(stage, index)
        self.policies = {index: RestartPolicy() for index in plan.selected}
        self._broker = broker
        #: The broker's ``longest_hold``.
        self.longest_hold = broker.longest_hold
        self._context = context
        self._mains = mains
        #: Descriptors of the supervisor that a forked child closes, beside those of its other children.
        self.own_fds: list[int] = []

    def boot_error(self, role: str, pid: int, cause: str) -> BootError:
        """Return the error for a child that died before it was ready and could not say why."""
        return BootError(role, pid, cause, forked=self._context.get_start_method() == "fork")

    def add(self, stage: int, index: int) -> Slot:
        """Have a worker expected in a slot of a stage; ``index``: the slot's number."""
        slot = next((slot for slot in self.slots if slot.index == index), None)
        if slot is None:
            seat, whole = Seat(stage, index - self.plan.slots(stage).start), self.plan.pipeline.stages[stage]
            slot = Slot(index, seat, whole, f"{whole.name}[{seat.index}]")
            self.slots.append(slot)
            self.slots.sort(key=lambda each: each.index)
            board = self.board
            board.put(index, STAGE, stage + 1)
            board.put(index, SEAT, seat.index)
            board.set_stage(stage, SEATS, max(board.stage(stage, SEATS), seat.index + 1))
        slot.expect(worker=True)
        self.board.put(index, EXPECTED, 1)
        return slot

    def retire(self, slot: Slot) -> None:
        """Have no worker expected in a slot any more."""
        slot.expect(worker=False)
        self.board.put(slot.index, EXPECTED, 0)
        self.drop(slot)

    def drop(self, slot: Slot) -> None:
        """Forget a slot where no worker is expected, and none is any more."""
        if not slot.expected and slot.worker is None and slot in self.slots:
            self.slots.remove(slot)

    def of_stage(self, stage: int) -> list[Slot]:
        """Return the slots of a stage that are to have a worker, or still have one."""
        return [slot for slot in self.slots if slot.seat.stage == stage]

    @property
    def workers(self) -> list[tuple[Slot, Worker]]:
        """Return the living workers with their slots."""
        return [(slot, slot.worker) for slot in self.slots if slot.worker is not None]

    @property
    def leaving(self) -> list[tuple[Child, float]]:
        """Return the living children that said BYE, and when each did (monotonic seconds)."""
        places = [(slot.worker.child, slot.leaving_since) for slot in self.slots if slot.worker is not None]
        if self.keeper.child is not None:
            places.append((self.keeper.child, self.keeper.leaving_since))
        return [(child, since) for child, since in places if since is not None]

    def worker(self, number: object) -> Child | None:
        """Return the living worker with ``Child.number``; a pid could meanwhile be another process's."""
        return next((worker.child for _, worker in self.workers if worker.child.number == number), None)

    def unjudged(self) -> bool:
        """Tell whether the keeper still has to judge a dead worker's leases."""
        return any(region.to_judge for region in self.board.used_regions())

    def start_keeper(self, now: float) -> Child:
        """Start a keeper at ``now`` (monotonic seconds); the first one checks the queues. Raises ``OSError``."""
        boots = not self.keeper.booted

        def target(birth: Birth) -> tuple[Callable[..., None], tuple[Any, ...]]:
            assignment = Assignment(plan=self.plan, broker=self._broker, board=self.board, birth=birth)
            return partial(self._mains.keeper, boots=boots), (assignment,)

        child = start(self._context, target, name="keeper", inherited=self._fds())
        self.keeper.started(child, now)
        return child

    def start_worker(self, slot: Slot, now: float) -> Child | None:
        """Start a worker at ``now`` (monotonic seconds). Raises ``OSError``.

        Where no region is free, the start is planned for later, and None is returned.
        """
        region = self.board.free_region(slot.seat.stage)
        if region is None:
            slot.plan_start(now + _NO_REGION)
            return None
        region.assign(slot.index)
        board = self.board
        board.put(slot.index, REGION, region.index)
        # The predecessor's state, which would pass for the new worker's.
        board.put(slot.index, STATE, S_BOOTING)
        board.put(slot.index, INCARNATION, board.get(slot.index, INCARNATION) + 1)
        try:
            worker = self._fork_worker(slot, region)
        except OSError:
            # No worker has held a lease; the keeper frees the region.
            region.mark_dead(Cause.CLEAN, 0, 0)
            self.tell_keeper(Kind.JUDGE)
            raise
        slot.started(worker, now)
        return worker.child

    def _fork_worker(self, slot: Slot, region: LeaseTable) -> Worker:
        stack = StackFile()

        def target(birth: Birth) -> tuple[Callable[..., None], tuple[Any, ...]]:
            assignment = Assignment(
                plan=self.plan,
                broker=self._broker,
                board=self.board,
                birth=birth,
                slot=slot.index,
                seat=slot.seat,
                region=region.index,
                stack=stack,
            )
            return self._mains.worker, (assignment,)

        try:
            return Worker(start(self._context, target, name=slot.name, inherited=self._fds()), region, stack)
        except BaseException:
            stack.close()
            raise

    def reap_worker(self, slot: Slot) -> Death:
        """Reap a dead worker and leave its leases to the keeper."""
        worker, ready = slot.worker, slot.ready
        assert worker is not None
        child, region = worker.child, worker.region
        lived = time.monotonic() - slot.started_at
        code = child.reap()
        known = slot.knows_call
        cause = slot.died()
        charged = cause in _CHARGED and _charges_one(region, cause)
        lease = _charged_lease(region, cause) if charged else None
        board = self.board
        done = sum(board.get(other, DONE) for other in board.used(slot.seat.stage))
        stack = worker.stack.read()
        worker.stack.close()
        region.mark_dead(cause, code, child.pid, stack.encode(), known=known)
        # The worker's own fields; it is reaped, so the supervisor clears them.
        board.put(slot.index, CALL_STARTED, 0)
        for lane in range(board.shape.lanes):
            board.put(slot.index, lane_started(lane), 0)
        if not slot.expected:
            board.put(slot.index, PID, 0)
        self.tell_keeper(Kind.JUDGE)
        text = _TEXTS.get(cause, describe_death(code) if ready else describe_exit(code))
        return Death(child.pid, ready, cause, lived, done, charged, text, stack, lease)

    def boots(self, slot: Slot) -> bool:
        """Tell whether a slot's worker boots, so that it holds nothing; its READY may still be on the way."""
        return not slot.ready and self.board.get(slot.index, STATE) == S_BOOTING

    def tell_keeper(self, kind: Kind) -> None:
        """Send the keeper a frame without a header; nothing where no keeper lives."""
        if self.keeper.child is not None:
            self.keeper.child.channel.queue(kind)
            self.keeper.child.channel.flush()

    def kill_workers(self, cause: Cause) -> None:
        """Kill every worker."""
        for slot, worker in self.workers:
            slot.kill(cause)
            worker.child.kill()

    def reap_all(self) -> None:
        """Kill and reap every child: no run leaves one behind."""
        for slot, worker in self.workers:
            worker.child.kill()
            worker.child.reap()
            worker.stack.close()
            slot.died()
        if self.keeper.child is not None:
            self.keeper.child.kill()
            self.keeper.child.reap()
            self.keeper.died()

    def _fds(self) -> tuple[int, ...]:
        """Return the descriptors that a forked child inherits and has to close."""
        children = [worker.child for _, worker in self.workers]
        if self.keeper.child is not None:
            children.append(self.keeper.child)
        fds = [*self.own_fds, *(worker.stack.fileno() for _, worker in self.workers)]
        for child in children:
            fds.append(child.channel.fileno())
            if child.own_watch:
                fds.append(child.watch)
        return tuple(fds)


def _charged_lease(region: LeaseTable, cause: Cause) -> Lease | None:
    """Return the lease of the message that is charged with a death."""
    blamed = region.blamed
    if blamed is None:
        return crashed_in(_running(region)) if cause is Cause.CRASH else None
    lease = region.read(blamed.index, ())
    return lease if lease is not None and blamed.means(lease) else None


def _running(region: LeaseTable) -> list[Lease]:
    return [lease for lease in region.leases(()) if lease.state is LeaseState.RUNNING]


def _charges_one(region: LeaseTable, cause: Cause) -> bool:
    """Tell whether a message is charged with a death: the one to blame for it, or the only one that ran."""
    if cause is not Cause.CRASH:
        return region.blamed is not None
    return crashed_in(_running(region)) is not None
