"""What a child process is told at its birth: the plan, its place in it, and its lines to the parent."""

from __future__ import annotations

from dataclasses import dataclass

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.ipc.birth import Birth
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.stack_dump import StackFile
from sqspipes_mp.pipeline.plan import RunPlan, Seat
from sqspipes_mp.pipeline.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One child's orders. ``slot``, ``seat``, ``region`` and ``stack`` are a worker's; the keeper has none of them."""

    plan: RunPlan
    broker: Broker
    board: Scoreboard
    birth: Birth
    slot: int = -1
    seat: Seat | None = None
    region: int = -1
    stack: StackFile | None = None

    @property
    def stage(self) -> Stage:
        assert self.seat is not None
        return self.plan.pipeline.stages[self.seat.stage]
