"""Pauses stages and lets them go on, by order (supervisor).

The word on the scoreboard is written first: from then on no call of the stage begins. Then its workers are told to
look. Once all of them receive no more, or after ``POLL_GRACE``, they give back what they hold; before, another worker
of the stage would receive it again.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

from sqspipes_mp.ipc.channel import Frame, Kind
from sqspipes_mp.ipc.statistics import PAUSED
from sqspipes_mp.supervisor.child import Child
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.shutdown import POLL_GRACE


@dataclass(slots=True)
class _Pause:
    """A pause whose workers hold messages still."""

    #: The order's number.
    number: int
    #: When they are to give back what they hold, monotonic seconds.
    until: float
    #: Workers that may still receive, by ``Child.number``.
    awaited: set[int]


class Pausing:
    """The paused stages of a run, by their indexes."""

    def __init__(self, children: Children, events: Events) -> None:
        self._children = children
        self._events = events
        self._numbers = itertools.count(1)
        self._begun: dict[int, _Pause] = {}

    def pause(self, stage: int) -> int:
        """Have no call of a stage begin, and none of its workers receive; return how many calls run still."""
        if not self._children.board.stage(stage, PAUSED):
            number = next(self._numbers)
            self._children.board.set_stage(stage, PAUSED, 1)
            told = self._tell(stage, Kind.PAUSE, {"order": number})
            self._begun[stage] = _Pause(number, time.monotonic() + POLL_GRACE, told)
        return sum(len(self._children.board.running(slot.index)) for slot in self._children.of_stage(stage))

    def resume(self, stage: int) -> None:
        """Have a stage go on."""
        if self._children.board.stage(stage, PAUSED):
            self._children.board.set_stage(stage, PAUSED, 0)
            self._begun.pop(stage, None)
            self._tell(stage, Kind.PAUSE, {"order": next(self._numbers)})

    def on_paused(self, stage: int, child: Child, frame: Frame) -> None:
        """Take note that a worker of a stage receives no more."""
        pause = self._begun.get(stage)
        if pause is not None and frame.header.get("order") == pause.number:
            pause.awaited.discard(child.number)

    def gone(self, stage: int, child: Child) -> None:
        """Take note that a worker of a stage is dead."""
        if (pause := self._begun.get(stage)) is not None:
            pause.awaited.discard(child.number)

    def deadline(self) -> float:
        """Return when ``look`` is due, monotonic seconds."""
        return min((pause.until for pause in self._begun.values()), default=math.inf)

    def look(self, now: float) -> None:
        """Have the workers of a paused stage give back what they hold, where that is due at ``now``."""
        for stage, pause in list(self._begun.items()):
            if not pause.awaited or now >= pause.until:
                del self._begun[stage]
                self._tell(stage, Kind.RELEASE, {})

    def _tell(self, stage: int, kind: Kind, header: dict[str, object]) -> set[int]:
        """Tell the workers of a stage; return who they are, by ``Child.number``."""
        told = set()
        for slot in self._children.of_stage(stage):
            if slot.worker is not None:
                self._events.tell(slot.worker.child.channel, kind, header)
                if not (slot.stopped or self._children.boots(slot)):
                    told.add(slot.worker.child.number)
        return told
