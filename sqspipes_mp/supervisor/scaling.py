"""Changes the number of a stage's workers, by order (supervisor)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import Cause
from sqspipes_mp.ipc.statistics import CALL_STARTED, WANTED
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.control import Client, Refused
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.slot import Slot
from sqspipes_mp.supervisor.stopping import Stopping

log = logging.getLogger("sqspipes_mp.supervisor")

#: Seconds that an order's answer waits for its new workers to boot.
_PATIENCE = 10.0


@dataclass(slots=True)
class _Growth:
    """An order whose new workers boot."""

    stage: int
    #: The stage's workers before.
    before: int
    #: Slots that have a worker because of the order, and those of them whose worker is not ready.
    added: list[Slot]
    booting: list[Slot]
    #: Who is to be answered, the order's id, and until when (monotonic seconds); None: the answer is given.
    client: Client | None
    ident: object
    until: float


class Scaling:
    """Adds and retires workers."""

    def __init__(self, children: Children, events: Events, stopping: Stopping, start: Callable[[Slot], None]) -> None:
        """Prepare; ``start`` starts a slot's worker."""
        self._children = children
        self._board = children.board
        self._events = events
        self._stopping = stopping
        self._start = start
        self._growths: dict[int, _Growth] = {}

    def scale(self, stage: int, wanted: object, client: Client, ident: object) -> None:
        """Have so many workers in a stage from now on. Answers the client now or later; raises ``Refused``."""
        number = self._checked(stage, wanted)
        before = self._board.stage(stage, WANTED)
        self._board.set_stage(stage, WANTED, number)
        if number != before:
            log.info(
                "%s: %d workers from now on, on demand (sqspipes-mp scale, say); they were %d",
                self._name(stage),
                number,
                before,
            )
        earlier = self._growths.pop(stage, None)
        if earlier is not None:
            self._answer(earlier)
        slots = [slot for slot in self._children.of_stage(stage) if slot.expected]
        # Those that hold nothing go first, of the others the newest seats.
        by_loss = sorted(slots, key=lambda slot: (self._loss(slot), -slot.index))
        for slot in by_loss[: max(0, len(slots) - number)]:
            self._retire(slot)
        added = self._add(stage, number - len(slots))
        if earlier is not None:
            added += [slot for slot in earlier.booting if slot.expected and slot not in added]
            before = min(earlier.before, number)
        booting = [slot for slot in added if slot.worker is None or not slot.ready]
        growth = _Growth(stage, before, added, booting, client, ident, time.monotonic() + _PATIENCE)
        if not booting:
            self._answer(growth)
            return
        self._growths[stage] = growth
        # Before the keeper has checked the queues no worker starts; then all do.
        for slot in list(booting) if self._children.keeper.booted else ():
            # A start that is refused takes back the order, and so all of them.
            if slot.expected and slot.worker is None and slot.restart_at is None:
                self._start(slot)

    def ready(self, slot: Slot) -> None:
        """Take note that a worker has booted."""
        growth = self._growths.get(slot.seat.stage)
        if growth is not None and slot in growth.booting:
            growth.booting.remove(slot)
            if not growth.booting:
                del self._growths[growth.stage]
                self._answer(growth)

    def failed(self, slot: Slot, why: str) -> bool:
        """Take an order back whose new worker could not be started, or did not boot; False: it is no such worker."""
        growth = self._growths.get(slot.seat.stage)
        if growth is None or slot not in growth.booting:
            return False
        del self._growths[growth.stage]
        for added in growth.added:
            if added.expected:
                self._retire(added)
        left = sum(each.expected for each in self._children.of_stage(growth.stage))
        self._board.set_stage(growth.stage, WANTED, left)
        text = f"a new worker of {self._name(growth.stage)} did not boot ({why}); there are {left} again"
        log.warning("%s", text)
        if growth.client is not None:
            growth.client.refuse(growth.ident, text)
        return True

    def deadline(self) -> float:
        """Return when ``look`` is due, monotonic seconds."""
        times = [growth.until for growth in self._growths.values() if growth.client is not None]
        return min(times, default=math.inf)

    def look(self, now: float) -> None:
        """Answer the orders whose new workers boot for long, at ``now`` (monotonic seconds)."""
        for growth in self._growths.values():
            if growth.client is not None and (now >= growth.until or self._stopping.begun):
                self._answer(growth)

    def _checked(self, stage: int, wanted: object) -> int:
        plan, name = self._children.plan, self._name(stage)
        if self._stopping.begun:
            raise Refused("the run is ending")
        if isinstance(wanted, bool) or not isinstance(wanted, int):
            raise Refused("workers must be a whole number")
        if wanted == 0:
            raise Refused(f"{name} cannot have 0 workers; pause it instead")
        room = plan.room_of(stage)
        if plan.pipeline.stages[stage].ends:
            raise Refused(f"{name} is a generator source, which has one worker: each one would yield it all")
        if not 1 <= wanted <= room:
            raise Refused(
                f"{name} can have 1 to {room} workers in this run, for which room was reserved when it began; "
                f"{wanted} need a start with more (--workers)"
            )
        if plan.counted and plan.window is None and stage == plan.sink and wanted < plan.workers[stage]:
            raise Refused(
                f"{name} keeps at least the {plan.workers[stage]} workers that it began with: results of "
                "map(ordered=True) that wait for an earlier value's are kept by them"
            )
        return wanted

    def _add(self, stage: int, count: int) -> list[Slot]:
        """Have a worker expected in so many more slots: free ones first, then those whose worker is still leaving."""
        if count <= 0:
            return []
        known = {slot.index: slot for slot in self._children.of_stage(stage)}
        free = [index for index in self._children.plan.slots(stage) if index not in known]
        free += [index for index, slot in known.items() if not slot.expected]
        return [self._children.add(stage, index) for index in free[:count]]

    def _retire(self, slot: Slot) -> None:
        """Have a worker leave when its message is done, and none follow it."""
        worker = slot.worker
        if worker is not None and slot.cause is None:
            if self._children.boots(slot):
                # It holds nothing, and its init may take long.
                slot.kill(Cause.CUT)
                worker.child.kill()
            else:
                self._events.tell(worker.child.channel, Kind.REPLACE, {"reason": "scale"})
        self._children.retire(slot)

    def _loss(self, slot: Slot) -> int:
        """Return how much would be lost, or waited for, if a slot's worker were to leave."""
        if slot.worker is None:
            return 0
        if self._children.boots(slot):
            return 1
        return 3 if self._board.get(slot.index, CALL_STARTED) else 2

    def _answer(self, growth: _Growth) -> None:
        client, growth.client = growth.client, None
        if client is not None:
            leaving = sum(not slot.expected for slot in self._children.of_stage(growth.stage))
            client.answer(
                growth.ident, workers=self._board.stage(growth.stage, WANTED), was=growth.before,
                booting=len(growth.booting), leaving=leaving,
            )  # fmt: skip

    def _name(self, stage: int) -> str:
        return self._children.plan.pipeline.stages[stage].name
