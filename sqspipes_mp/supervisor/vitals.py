"""The supervisor's own statistics: beats, readiness, CPU, restarts (supervisor)."""

from __future__ import annotations

from sqspipes_mp.host.process_cpu import cpu_of
from sqspipes_mp.ipc.leases import Cause
from sqspipes_mp.ipc.running import fixed
from sqspipes_mp.ipc.running.health import BEAT_EVERY, CONTACT, SILENCE
from sqspipes_mp.ipc.statistics import (
    CALL_STARTED,
    CPU_NS,
    KEEPER_LIMIT,
    LAST_CONTACT,
    LAST_TROUBLE,
    PAUSED,
    READINESS,
    RESTART_REASONS,
    RESTARTS,
    RESTS,
    SEAT,
    STAGE,
    STARTED,
    SUPERVISOR_BEAT,
    WANTED,
    StageField,
)
from sqspipes_mp.supervisor.children import Children, Death
from sqspipes_mp.supervisor.slot import Slot, Worker

#: Seconds between two looks at readiness at least, where something changes all the time.
_LOOK_EVERY = 1.0
#: The reasons of a restart by the cause of the death; a worker that left as asked says itself why.
_REASONS = {
    Cause.CRASH: "crash",
    Cause.TIMEOUT: "timeout",
    Cause.HOLD: "timeout",
    Cause.MEMORY: "memory",
    Cause.FULL: "memory",
    Cause.ROOM: "memory",
}


class Vitals:
    """The supervisor's part of the statistics, but for what the slots' own transitions write."""

    def __init__(self, children: Children) -> None:
        self._children = children
        self._board = board = children.board
        self._look_at = self._beat_at = 0.0
        #: Nanoseconds of CPU of each slot's former workers.
        self._spent = [0] * board.slots
        for index, workers in children.plan.workers.items():
            board.set_stage(index, WANTED, workers)
        for slot in children.slots:
            board.put(slot.index, STAGE, slot.seat.stage + 1)
            board.put(slot.index, SEAT, slot.seat.index)

    def deadline(self) -> float:
        """Return when ``look`` is due, monotonic seconds."""
        return self._beat_at

    def changed(self) -> None:
        """Have the next turn look at readiness: a worker has got ready, or is gone."""
        self._look_at = 0.0

    def look(self, now: float, *, ending: bool) -> None:
        """Note that the loop turns, at ``now`` (monotonic seconds), and now and then how the engine is."""
        self._board.set_header(SUPERVISOR_BEAT, int(now * 1e9))
        if now >= self._beat_at:
            for slot, worker in self._children.workers:
                self._note_cpu(slot, worker)
            self._look_at = now
            self._beat_at = now + BEAT_EVERY
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY
            keeper = self._children.keeper
            moves = keeper.child is not None and keeper.ready and keeper.leaving_since is None
            limit = max(SILENCE, 4 * self._children.plan.keeper_patience)
            self._board.set_header(KEEPER_LIMIT, int(limit * 1e9) if moves else 0)
            self._board.set_header(READINESS, fixed.ENDING if ending else self._readiness(int(now * 1e9)))

    def started(self, slot: Slot, now: float) -> None:
        """Note the start of a slot's worker at ``now`` (monotonic seconds)."""
        self._board.put(slot.index, STARTED, int(now * 1e9))

    def dead(self, slot: Slot, worker: Worker) -> None:
        """Note the CPU of a worker that is dead and not reaped yet."""
        self._note_cpu(slot, worker)
        self._spent[slot.index] = self._board.get(slot.index, CPU_NS)

    def _note_cpu(self, slot: Slot, worker: Worker) -> None:
        # The forkserver reaps its children before this process hears of it; then the latest figure stays.
        used = self._spent[slot.index] + cpu_of(worker.child.pid)
        self._board.put(slot.index, CPU_NS, max(used, self._board.get(slot.index, CPU_NS)))

    def restarted(self, slot: Slot, death: Death) -> None:
        """Count a worker that another one is to follow, by the reason."""
        reason = _REASONS.get(death.cause, slot.leaves_for)
        if not death.ready:
            reason = "boot"
        if reason in RESTART_REASONS:
            stage = slot.seat.stage
            field = StageField(RESTARTS + RESTART_REASONS.index(reason))
            self._board.set_stage(stage, field, self._board.stage(stage, field) + 1)

    def _readiness(self, now: int) -> int:
        """Return the word of ``READINESS`` at ``now``, monotonic nanoseconds."""
        for index in self._children.plan.selected:
            if reason := self._unready(index, now):
                return index << 8 | reason
        return fixed.READY

    def _unready(self, stage: int, now: int) -> int:
        """Return the reason for which a stage is not ready, one of ``fixed.NOT_READY``; 0: it is."""
        slots = [slot for slot in self._children.slots if slot.seat.stage == stage]
        if self._board.stage(stage, PAUSED) or all(slot.finished for slot in slots):
            return 0
        ready = [slot for slot in slots if slot.worker is not None and slot.ready]
        if not ready:
            return fixed.NO_WORKER
        return 0 if any(self._in_touch(slot, now) for slot in ready) or self._busy(ready) else fixed.NO_CONTACT

    def _in_touch(self, slot: Slot, now: int) -> bool:
        """Tell whether the broker has answered a worker of late; a source that sends nothing has asked nothing."""
        board = self._board
        contact = board.get(slot.index, LAST_CONTACT)
        if now - max(contact, int(slot.started_at * 1e9)) <= CONTACT * 1e9:
            return True
        return slot.stage.is_source and board.get(slot.index, LAST_TROUBLE) <= contact

    def _busy(self, ready: list[Slot]) -> bool:
        """Tell whether all of a stage's workers are in a call, or wait for their turn or for the caller."""
        return all(self._board.get(slot.index, CALL_STARTED) or self._board.get(slot.index, RESTS) for slot in ready)
