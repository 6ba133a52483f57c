"""Kills or replaces workers with late calls or too much memory, and a stalled keeper (supervisor)."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time

from sqspipes_mp.host.clock import lease_now
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import Cause, Lease, LeaseState, killed_at
from sqspipes_mp.ipc.stack_dump import DUMP
from sqspipes_mp.ipc.statistics import CALL_MEMORY, CALL_STARTED, KEEPER_BEAT, WATCHES_MEMORY
from sqspipes_mp.supervisor.child import Child
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.memory import (
    KILL_AT,
    LOOK_EVERY,
    REPLACE_AT,
    SETTLE,
    Fill,
    MemoryWatch,
    has_large_part,
    has_most,
    pressure,
)
from sqspipes_mp.supervisor.slot import Call, Slot, Worker

log = logging.getLogger("sqspipes_mp.supervisor")

#: Seconds that a replaced keeper has to boot.
_KEEPER_BOOT = 60.0
#: Seconds that a child has to exit after it said BYE; threads of the user's may not end.
_BYE_GRACE = 2.0
#: Longest time between two looks for messages that have been in flight for nearly as long as they can: seconds, and a
#: share of that time. A call that begins after a look is killed at most so much late.
_HOLD_LOOK, _HOLD_SHARE = 60.0, 1 / 40
#: The warning before the container's memory is full: percent, and the measure.
_FULL = "the container's memory is %.0f%% full; %s"

#: The warning before the kill of a call for SQS's limit, with the cure.
_HELD = (
    "%s (pid %d): a call has had its message for nearly %g h, the longest that SQS lets one be in flight; killing it: "
    "others would get the message and run it again, for ever. Make its calls shorter (one message for each part of "
    "the work, or a stage for each step), return Continue(state) from them once current_message().stopping is True, or "
    "use SQLite, which has no such limit"
)


class Watchdog:
    """Looks at the scoreboard once per turn, and has workers killed or replaced."""

    def __init__(self, children: Children, events: Events) -> None:
        self._children = children
        self._board = children.board
        self._events = events
        self._contained = pressure() is not None
        self._memory = MemoryWatch(children.plan, contained=self._contained)
        self._board.set_header(WATCHES_MEMORY, int(self._memory.wanted or self._contained))
        self._contain_at = self._settled_at = 0.0
        #: ``Child.number`` of the worker that was last asked to make room; it leaves after its message.
        self._asked: int | None = None
        self._told_in_vain = False
        # A stalled keeper is replaced before leases end: each is extended when half of it is left.
        self._patience = 2 * children.plan.keeper_patience

    def deadline(self, now: float) -> float:
        """Return when to look again at the latest; ``now`` and the deadline are monotonic seconds."""
        times = [now + self._patience / 2]
        if self._memory.wanted or self._contained:
            times.append(now + LOOK_EVERY)
        times += [since + _BYE_GRACE for _, since in self._children.leaving]
        for slot, _ in self._children.workers:
            timeout = slot.stage.task.timeout
            if self._children.longest_hold is not None and slot.hold_look_at > now:
                times.append(slot.hold_look_at)
            if slot.kill_at is not None:
                times.append(slot.kill_at)
            elif timeout is not None:
                # A call's begin wakes nobody: look often enough to notice one, then exactly when it is due.
                started = self._board.get(slot.index, CALL_STARTED)
                times.append(min(now + timeout / 4, self._late_at(started, timeout) if started else math.inf))
        return min(times)

    def look(self, now: float) -> None:
        """Take the measures that are due at ``now`` (monotonic seconds)."""
        self._mind_keeper(now)
        if self._contained and now >= self._contain_at:
            self._mind_container(now)
        for slot, worker in self._children.workers:
            self._mind_call(slot, worker, now)
            self._mind_hold(slot, worker, now)
            if slot.kill_due(now):
                self._kill_late(slot, worker, now)
            if self._memory.wanted:
                self._mind_memory(slot, worker, now)
        for child, since in self._children.leaving:
            if now >= since + _BYE_GRACE:
                child.kill()

    def ready(self, slot: Slot, child: Child) -> None:
        """Take note that a worker has booted."""
        self._memory.ready(slot.index, child.pid)

    def gone(self, slot: Slot) -> None:
        """Take note that a slot's worker is dead."""
        self._memory.gone(slot.index)

    # -- calls that run too long --------------------------------------------------------------------------------

    def _mind_call(self, slot: Slot, worker: Worker, now: float) -> None:
        timeout = slot.stage.task.timeout
        started = self._board.get(slot.index, CALL_STARTED)
        if timeout is None or not started or slot.cause is not None or now < self._late_at(started, timeout):
            return
        call = Call(Cause.TIMEOUT, started, self._blame(slot, worker, started, Cause.TIMEOUT))
        if not self._still_runs(slot, worker, call):
            # The call ended meanwhile, and its worker has seen by its own clock that it was late.
            return
        log.warning("%s (pid %d): a call ran over %g s; killing it", slot.name, worker.child.pid, timeout)
        self._ask_for_stack(slot, worker, call)

    def _mind_hold(self, slot: Slot, worker: Worker, now: float) -> None:
        """Kill a call whose message cannot be kept from other receivers any longer: they would run it again."""
        longest = self._children.longest_hold
        if longest is None or slot.cause is not None or now < slot.hold_look_at:
            return
        again = now + min(_HOLD_LOOK, longest * _HOLD_SHARE)
        slot.look_for_hold(again)
        running = [lease for lease in worker.region.leases(()) if lease.state is LeaseState.RUNNING]
        if not running:
            return
        oldest = min(running, key=lambda lease: lease.received_at)
        left = killed_at(oldest, longest) - lease_now()
        if left > 0:
            slot.look_for_hold(min(again, now + left))
            return
        if not oldest.company:
            worker.region.blame(oldest, Cause.HOLD)
        log.warning(_HELD, slot.name, worker.child.pid, longest / 3600)
        self._ask_for_stack(slot, worker, Call(Cause.HOLD, 0, oldest))

    def _ask_for_stack(self, slot: Slot, worker: Worker, call: Call) -> None:
        """Ask a worker for its stack; the worker is killed soon after."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.child.pid, DUMP)
        slot.call_is_late(call, time.monotonic())

    def _late_at(self, started: int, timeout: float) -> float:
        """Return when a call that began at ``started`` (monotonic ns) is late, monotonic seconds."""
        return (started + self._board.credit(started)) / 1e9 + timeout

    def _kill_late(self, slot: Slot, worker: Worker, now: float) -> None:
        """Kill a worker whose call is late, once its stack is whole, or it has had long enough."""
        assert slot.late is not None
        if not worker.stack.whole and slot.put_off_kill(now):
            return
        if not self._still_runs(slot, worker, slot.late):
            # The signal that asks for a stack makes some C calls return early. The worker has failed the late call, and
            # may run another one, which must not be charged.
            slot.call_came_back()
            log.warning(
                "%s (pid %d): the late call came back by itself; it does not count. It was doing this:\n%s",
                slot.name, worker.child.pid, worker.stack.read().rstrip(),
            )  # fmt: skip
            worker.stack.clear()
        else:
            worker.child.kill()

    def _blame(self, slot: Slot, worker: Worker, started: int, cause: Cause) -> Lease | None:
        """Mark the call that began at ``started`` (monotonic ns) as the one to blame, and return its lease.

        None: the call has no message of its own, so that no single message is to blame.
        """
        running = [lease for lease in worker.region.leases(()) if lease.state is LeaseState.RUNNING]
        # Threads run several calls. One that began earlier may be over while its outputs are encoded, so the call's
        # lease is the last that began before the call.
        begun = [lease for lease in running if lease.started_at <= started / 1e9]
        lease = max(begun, key=lambda lease: lease.started_at) if begun else None
        if lease is None or lease.company or self._board.get(slot.index, CALL_STARTED) != started:
            return None
        worker.region.blame(lease, cause)
        return lease

    def _still_runs(self, slot: Slot, worker: Worker, call: Call) -> bool:
        """Tell whether the call runs still; the worker may have begun another one."""
        same = not call.started or self._board.get(slot.index, CALL_STARTED) == call.started
        return same and (call.lease is None or worker.region.runs(call.lease))

    # -- memory -------------------------------------------------------------------------------------------------

    def _mind_memory(self, slot: Slot, worker: Worker, now: float) -> None:
        started, before = self._call(slot)
        measure = self._memory.look(slot.index, slot.seat.stage, now, before)
        if measure == "replace":
            self._events.tell(worker.child.channel, Kind.REPLACE, {"reason": "max_memory"})
        elif measure == "kill" and slot.cause is None:
            call = Call(Cause.MEMORY, started, self._blame(slot, worker, started, Cause.MEMORY))
            if not self._still_runs(slot, worker, call):
                # Neither this call, which is over, nor the worker's next one must be charged. The next look asks for a
                # replacement.
                worker.region.spare()
                return
            slot.kill(Cause.MEMORY, known=call.known)
            log.warning("%s (pid %d) is far over its max_memory; killing it", slot.name, worker.child.pid)
            worker.child.kill()

    def _call(self, slot: Slot) -> tuple[int, int | None]:
        """Return when a worker's running call began (monotonic ns), and the worker's bytes then; 0, None: no call."""
        started = self._board.get(slot.index, CALL_STARTED)
        return started, self._board.get(slot.index, CALL_MEMORY) if started else None

    def _mind_container(self, now: float) -> None:
        """Make room where a worker has much of a nearly full memory, before the kernel kills the whole container."""
        self._contain_at = now + LOOK_EVERY
        fill = pressure()
        workers = [(slot, worker) for slot, worker in self._children.workers if slot.ready]
        if fill is None or fill.share < REPLACE_AT or not workers:
            return
        kill = fill.share >= KILL_AT
        if now < self._settled_at and not kill:
            return
        self._settled_at = now + SETTLE
        gains = [(self._memory.gained(slot.index), slot, worker) for slot, worker in workers]
        gained, slot, worker = max(gains, key=lambda each: each[0])
        child = worker.child
        who = f"{slot.name} (pid {child.pid}), which has gained {gained >> 20} MB"
        if not has_large_part(gained, fill, len(workers)):
            self._contain_at = self._settled_at
            self._tell_in_vain(fill.share, who)
        elif kill and slot.cause is None:
            self._contain_at = self._settled_at
            cause, known = self._container_cause(slot, worker, gained, fill)
            slot.kill(cause, known=known)
            log.warning(_FULL, 100 * fill.share, f"killing {who}")
            child.kill()
        elif not kill and child.number != self._asked:
            self._asked = child.number
            log.warning(_FULL, 100 * fill.share, f"replacing {who}")
            self._events.tell(child.channel, Kind.REPLACE, {"reason": "the container's memory"})

    def _container_cause(self, slot: Slot, worker: Worker, gained: int, fill: Fill) -> tuple[Cause, bool]:
        """Return FULL where the running call took most of the memory, and ROOM where others have it.

        Also returns whether one call is known to be to blame, which is marked.
        """
        started, before = self._call(slot)
        if not has_most(min(gained, self._memory.own(slot.index, before)), fill):
            return Cause.ROOM, False
        call = Call(Cause.FULL, started, self._blame(slot, worker, started, Cause.FULL))
        if self._still_runs(slot, worker, call):
            return Cause.FULL, call.known
        worker.region.spare()
        return Cause.ROOM, False

    def _tell_in_vain(self, share: float, who: str) -> None:
        if self._told_in_vain:
            return
        self._told_in_vain = True
        why = (
            f"replacing a worker would not help, not even {who}. Give it a higher limit or fewer workers, or look at "
            "what else is in it, the program that calls run() as well"
        )
        log.warning(_FULL, 100 * share, why)

    # -- the keeper ---------------------------------------------------------------------------------------------

    def _mind_keeper(self, now: float) -> None:
        slot = self._children.keeper
        if slot.child is None or not slot.booted:
            return
        beat = max(self._board.header(KEEPER_BEAT) / 1e9, slot.patient_since)
        # A replacement boots as long as the engine's first keeper may: imports, setup, credentials.
        if now - beat > (self._patience if slot.ready else _KEEPER_BOOT):
            log.warning("the keeper (pid %d) has not moved for %.0f s; replacing it", slot.child.pid, now - beat)
            slot.child.kill()
            slot.killed(time.monotonic())
