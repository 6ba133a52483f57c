"""Pauses stages and lets them go on, by order (supervisor).

The word on the scoreboard is written first: from then on no call of the stage begins. Then its workers are told to
look. Once all of them receive no more, or after ``POLL_GRACE``, they give back what they hold; before, another worker
of the stage would receive it again. The order is answered then: no message is taken after the answer.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from sqspipes_mp.ipc.channel import Frame, Kind
from sqspipes_mp.ipc.statistics import PAUSED
from sqspipes_mp.supervisor.child import Child
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.control import Client
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.shutdown import POLL_GRACE
from sqspipes_mp.supervisor.stopping import Stopping


@dataclass(slots=True)
class _Pause:
    """A pause whose workers hold messages still."""

    #: The order's number.
    number: int
    #: When they are to give back what they hold, monotonic seconds.
    until: float
    #: Workers that may still receive, by ``Child.number``.
    awaited: set[int]
    #: Who is to be answered, and the orders' ids.
    clients: list[tuple[Client, object]]


class Pausing:
    """The paused stages of a run, by their indexes."""

    def __init__(self, children: Children, events: Events, stopping: Stopping) -> None:
        self._children = children
        self._events = events
        self._stopping = stopping
        self._numbers = itertools.count(1)
        self._begun: dict[int, _Pause] = {}

    def pause(self, stage: int, client: Client, ident: object) -> None:
        """Have no call of a stage begin, and none of its workers receive; the client is answered then."""
        if not self._children.board.stage(stage, PAUSED):
            number = next(self._numbers)
            self._children.board.set_stage(stage, PAUSED, 1)
            told = self._tell(stage, Kind.PAUSE, {"order": number})
            # A source receives nothing, and says nothing.
            awaited = set() if self._children.plan.pipeline.stages[stage].is_source else told
            self._begun[stage] = _Pause(number, time.monotonic() + POLL_GRACE, awaited, [])
        if (pause := self._begun.get(stage)) is not None:
            pause.clients.append((client, ident))
        else:
            self._answer(stage, [(client, ident)])

    def resume(self, stage: int) -> None:
        """Have a stage go on."""
        if self._children.board.stage(stage, PAUSED):
            self._children.board.set_stage(stage, PAUSED, 0)
            pause = self._begun.pop(stage, None)
            self._answer(stage, [] if pause is None else pause.clients)
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
        return min((pause.until if pause.awaited else 0.0 for pause in self._begun.values()), default=math.inf)

    def look(self, now: float) -> None:
        """Have the workers of a paused stage give back what they hold, where that is due at ``now``."""
        for stage, pause in list(self._begun.items()):
            over = not pause.awaited or now >= pause.until
            if over:
                del self._begun[stage]
                self._tell(stage, Kind.RELEASE, {})
            if over or self._stopping.begun:
                self._answer(stage, pause.clients)
                pause.clients.clear()

    def _answer(self, stage: int, clients: Iterable[tuple[Client, object]]) -> None:
        """Tell clients that a stage is paused, and how many of its calls run still."""
        running = sum(len(self._children.board.running(slot.index)) for slot in self._children.of_stage(stage))
        for client, ident in clients:
            client.answer(ident, running=running)

    def _tell(self, stage: int, kind: Kind, header: dict[str, object]) -> set[int]:
        """Tell the workers of a stage; return who they are, by ``Child.number``."""
        told = set()
        for slot in self._children.of_stage(stage):
            if slot.worker is not None:
                self._events.tell(slot.worker.child.channel, kind, header)
                if not (slot.stopped or self._children.boots(slot)):
                    told.add(slot.worker.child.number)
        return told
