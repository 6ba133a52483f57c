"""What nobody reports: calls that run too long, memory that grows, a keeper that stands still (supervisor)."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time

from sqspipes_mp.host.clock import lease_now
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import Cause, Lease, LeaseState, killed_at
from sqspipes_mp.ipc.scoreboard import CALL_MEMORY, CALL_STARTED, KEEPER_BEAT, WATCHES_MEMORY
from sqspipes_mp.ipc.stack_dump import DUMP
from sqspipes_mp.supervisor.child import Child
from sqspipes_mp.supervisor.children import Children, Slot
from sqspipes_mp.supervisor.container import KILL_AT, REPLACE_AT, SETTLE, Fill, has_large_part, has_most, pressure
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.memory import LOOK_EVERY, MemoryWatch

log = logging.getLogger("sqspipes_mp.supervisor")

#: What a worker has to write its stack before it is killed, seconds (it takes less than a millisecond), and what one
#: has that does not get a CPU for it.
_LAST_WORDS, _SILENCE = 0.05, 1.0
#: What a replaced keeper has to boot, seconds.
_KEEPER_BOOT = 60.0
#: How long a child may take to exit after it said BYE (threads of the user's that do not end), seconds.
_BYE_GRACE = 2.0
#: Seconds between two looks for messages that have been in flight for nearly as long as they can, at most this share of
#: that time: what was received later can be due earlier only by as much.
_HOLD_LOOK, _HOLD_SHARE = 60.0, 1 / 40
#: What is said before anything is done about that.
_FULL = "the container's memory is %.0f%% full; %s"

#: What is said of a call that is killed for SQS's limit, with the cure.
_HELD = (
    "%s (pid %d): a call has had its message for nearly %g h, the longest that SQS lets one be in flight; killing it: "
    "others would get the message and run it again, for ever. Make its calls shorter (one message for each part of the "
    "work, or a stage for each step), or use SQLite, which has no such limit"
)


class Watchdog:
    """Looks at the scoreboard once per turn and kills what has to be killed."""

    def __init__(self, crew: Children, board: Events) -> None:
        self._crew = crew
        self._lines = board
        self._contained = pressure() is not None
        self._memory = MemoryWatch(crew.plan, contained=self._contained)
        crew.board.set_header(WATCHES_MEMORY, int(self._memory.wanted or self._contained))
        self._contain_at = self._settled_at = 0.0
        #: The number of the worker that was last asked to make room, which takes it as long as its message.
        self._asked: int | None = None
        self._told_in_vain = False
        # Leases must not end before it is replaced: a fresh one is due when half of it is left.
        self._patience = 2 * crew.plan.keeper_patience

    def deadline(self, now: float) -> float:
        """Return when to look again at the latest (monotonic s)."""
        times = [now + self._patience / 2]
        if self._memory.wanted or self._contained:
            times.append(now + LOOK_EVERY)
        leaving = (child.leaving_since for child in self._crew.children)
        times += [since + _BYE_GRACE for since in leaving if since is not None]
        for place in self._crew.places:
            timeout = self._crew.stage(place).task.timeout
            if self._crew.longest_hold is not None and place.child is not None and place.hold_look_at > now:
                times.append(place.hold_look_at)
            if place.kill_at is not None and place.child is not None:
                times.append(place.kill_at)
            elif timeout is not None and place.child is not None:
                # A call that begins wakes nobody, so look often enough to notice one; then exactly when it is due.
                started = self._crew.board.get(place.slot, CALL_STARTED)
                times.append(min(now + timeout / 4, self._late_at(started, timeout) if started else math.inf))
        return min(times)

    def look(self, now: float) -> None:
        self._mind_keeper(now)
        if self._contained and now >= self._contain_at:
            self._mind_container(now)
        for place in self._crew.places:
            if place.child is None:
                continue
            self._mind_call(place, now)
            self._mind_hold(place, now)
            if place.kill_at is not None and now >= place.kill_at:
                self._kill_late(place, place.child, now)
            if self._memory.wanted:
                self._mind_memory(place, now)
        for child in self._crew.children:
            if child.leaving_since is not None and now >= child.leaving_since + _BYE_GRACE:
                child.kill()

    def ready(self, place: Slot) -> None:
        assert place.child is not None
        self._memory.ready(place.slot, place.child.pid)

    def gone(self, place: Slot) -> None:
        self._memory.gone(place.slot)

    def _mind_call(self, place: Slot, now: float) -> None:
        timeout = self._crew.stage(place).task.timeout
        started = self._crew.board.get(place.slot, CALL_STARTED)
        if timeout is None or not started or place.cause is not None or now < self._late_at(started, timeout):
            return
        assert place.child is not None
        late = self._blame(place, started, Cause.TIMEOUT)
        if not self._still_runs(place, started, late):
            # It ended meanwhile, and its worker has seen by its own clock that it was late.
            return
        place.cause, place.late = Cause.TIMEOUT, (started, late)
        log.warning("%s (pid %d): a call ran over %g s; killing it", self._crew.name(place), place.child.pid, timeout)
        self._ask_for_stack(place, place.child)

    def _mind_hold(self, place: Slot, now: float) -> None:
        """Kill a call whose message could not be kept from others any longer: they would run it again, for ever."""
        longest = self._crew.longest_hold
        if longest is None or place.cause is not None or now < place.hold_look_at:
            return
        assert place.child is not None
        assert place.region is not None
        place.hold_look_at = now + min(_HOLD_LOOK, longest * _HOLD_SHARE)
        running = [lease for lease in place.region.leases(()) if lease.state is LeaseState.RUNNING]
        if not running:
            return
        oldest = min(running, key=lambda lease: lease.received_at)
        left = killed_at(oldest, longest) - lease_now()
        if left > 0:
            place.hold_look_at = min(place.hold_look_at, now + left)
            return
        if not oldest.company:
            place.region.blame(oldest, Cause.HOLD)
        place.cause, place.late = Cause.HOLD, (0, oldest)
        log.warning(_HELD, self._crew.name(place), place.child.pid, longest / 3600)
        self._ask_for_stack(place, place.child)

    def _ask_for_stack(self, place: Slot, child: Child) -> None:
        """Have a worker say what it is doing; it is killed soon after."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, DUMP)
        asked = time.monotonic()
        place.kill_at, place.kill_by = asked + _LAST_WORDS, asked + _SILENCE

    def _late_at(self, started: int, timeout: float) -> float:
        """Return when a call that began at ``started`` (monotonic ns) is late, monotonic s."""
        return (started + self._crew.board.credit(started)) / 1e9 + timeout

    def _kill_late(self, place: Slot, child: Child, now: float) -> None:
        """Kill a worker whose call is late, once it has said what it was doing, or was silent for long."""
        if not self._still_runs(place, *place.late):
            # The signal that asks for a stack makes some C calls return early. Its worker has failed the call, and may
            # have begun another one, which must not pay.
            place.cause = place.kill_at = None
            log.warning(
                "%s (pid %d): the late call came back by itself; it does not count. It was doing this:\n%s",
                self._crew.name(place), child.pid, place.stack.read().rstrip() if place.stack is not None else "",
            )  # fmt: skip
            if place.stack is not None:
                place.stack.clear()
        elif place.stack is not None and not place.stack.begun and now < place.kill_by:
            place.kill_at = now + _LAST_WORDS
        else:
            child.kill()

    def _blame(self, place: Slot, started: int, cause: Cause) -> Lease | None:
        """Mark the call that began then (monotonic ns) as the one to blame; None where no single message is its own."""
        assert place.region is not None
        running = [lease for lease in place.region.leases(()) if lease.state is LeaseState.RUNNING]
        # Several run with threads, and one that began earlier may be over, what it gave being encoded: the call's is
        # the last that began before it did.
        begun = [lease for lease in running if lease.started_at <= started / 1e9]
        lease = max(begun, key=lambda lease: lease.started_at) if begun else None
        if lease is None or lease.company or self._crew.board.get(place.slot, CALL_STARTED) != started:
            return None
        place.region.blame(lease, cause)
        return lease

    def _still_runs(self, place: Slot, started: int, lease: Lease | None) -> bool:
        """Tell whether a call that was to be killed runs still; what runs there now may be another.

        ``started``: when it began (monotonic ns); 0: its lease alone tells.
        """
        assert place.region is not None
        same = not started or self._crew.board.get(place.slot, CALL_STARTED) == started
        return same and (lease is None or place.region.runs(lease))

    def _mind_memory(self, place: Slot, now: float) -> None:
        assert place.child is not None
        started, before = self._call(place)
        verdict = self._memory.look(place.slot, place.seat.stage, now, before)
        if verdict == "replace":
            self._lines.tell(place.child.channel, Kind.RECYCLE, {"reason": "max_memory"})
        elif verdict == "kill" and place.cause is None:
            lease = self._blame(place, started, Cause.MEMORY)
            if not self._still_runs(place, started, lease):
                # What runs there now must not pay; the next look asks for a replacement.
                return
            place.cause = Cause.MEMORY
            log.warning("%s (pid %d) is far over its max_memory; killing it", self._crew.name(place), place.child.pid)
            place.child.kill()

    def _call(self, place: Slot) -> tuple[int, int | None]:
        """Return when a worker's running call began (monotonic ns), and the bytes it had then; 0, None: none runs."""
        board = self._crew.board
        started = board.get(place.slot, CALL_STARTED)
        return started, board.get(place.slot, CALL_MEMORY) if started else None

    def _mind_container(self, now: float) -> None:
        """Make room before the kernel does, which may kill the whole container; where a worker has much of it."""
        self._contain_at = now + LOOK_EVERY
        fill = pressure()
        workers = [(place, place.child) for place in self._crew.places if place.child is not None and place.child.ready]
        if fill is None or fill.share < REPLACE_AT or not workers:
            return
        kill = fill.share >= KILL_AT
        if now < self._settled_at and not kill:
            return
        self._settled_at = now + SETTLE
        gained, place, child = max(
            ((self._memory.gained(place.slot), place, child) for place, child in workers), key=lambda each: each[0]
        )
        who = f"{self._crew.name(place)} (pid {child.pid}), which has gained {gained >> 20} MB"
        if not has_large_part(gained, fill, len(workers)):
            self._contain_at = self._settled_at
            self._tell_in_vain(fill.share, who)
        elif kill and place.cause is None:
            self._contain_at = self._settled_at
            place.cause = self._to_blame(place, gained, fill)
            log.warning(_FULL, 100 * fill.share, f"killing {who}")
            child.kill()
        elif not kill and child.number != self._asked:
            self._asked = child.number
            log.warning(_FULL, 100 * fill.share, f"replacing {who}")
            self._lines.tell(child.channel, Kind.RECYCLE, {"reason": "the container's memory"})

    def _to_blame(self, place: Slot, gained: int, fill: Fill) -> Cause:
        """Have the running call pay only where it is the reason: beside a large neighbour any would die."""
        started, before = self._call(place)
        if not has_most(min(gained, self._memory.own(place.slot, before)), fill):
            return Cause.ROOM
        lease = self._blame(place, started, Cause.FULL)
        return Cause.FULL if self._still_runs(place, started, lease) else Cause.ROOM

    def _tell_in_vain(self, share: float, who: str) -> None:
        if self._told_in_vain:
            return
        self._told_in_vain = True
        why = (
            f"replacing a worker would not help, not even {who}. Give it a higher limit or fewer workers, or look at "
            "what else is in it, the program that calls run() as well"
        )
        log.warning(_FULL, 100 * share, why)

    def _mind_keeper(self, now: float) -> None:
        keeper = self._crew.keeper
        if keeper is None or not self._crew.keeper_booted:
            return
        beat = max(self._crew.board.header(KEEPER_BEAT) / 1e9, keeper.started_at)
        # A new one has its start, setup and credentials before it: as long as the engine's first one would get.
        if now - beat > (self._patience if keeper.ready else _KEEPER_BOOT):
            log.warning("the keeper (pid %d) has not moved for %.0f s; replacing it", keeper.pid, now - beat)
            keeper.kill()
            # Once is enough: its death is on the way.
            keeper.started_at = time.monotonic()
