"""How much waits for each stage, counted where somebody is shown the progress (keeper)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from sqspipes_mp.brokers.base import Connection
from sqspipes_mp.errors import BrokerBusy, BrokerError
from sqspipes_mp.plan import RunPlan
from sqspipes_mp.scoreboard import WAITING, Scoreboard

log = logging.getLogger("sqspipes_mp.keeper")

#: Seconds between two rounds where counting is free.
_OFTEN = 1.0


def tell_left(plan: RunPlan, connection: Connection) -> None:
    """Say what an earlier run has left where a source is about to send all it has: it will be done besides."""
    source = plan.source
    if source is None or not source.ends:
        return
    names = {*source.outputs, *(name for index in plan.selected for name in plan.inputs[index])}
    try:
        depths = [connection.depth(name) for name in sorted(names)]
    except BrokerError:
        # Nobody needs this number to work.
        return
    count = sum(depth.visible + depth.in_flight + depth.delayed for depth in depths)
    if count:
        # Where others work on the same queues that is how it should be.
        alone = len(plan.selected) == len(plan.pipeline.stages)
        log.log(
            logging.WARNING if alone else logging.INFO,
            "%s: messages of an earlier run are still in the queues (%d); they are done besides what the source %s "
            "makes now. Where that would be done twice, stop and purge() first",
            plan.pipeline.domain, count, source.name,
        )  # fmt: skip


class WaitCount:
    """Counts one queue at a time, so that no turn of the keeper takes long, and writes each stage's sum down."""

    def __init__(self, plan: RunPlan, board: Scoreboard, connection: Connection, beat: Callable[[], None]) -> None:
        self._board = board
        self._connection = connection
        self._beat = beat
        #: (stage, queue, whether it is the stage's last one), a round.
        self._turns = [
            (stage, name, name == plan.inputs[stage][-1]) for stage in plan.selected for name in plan.inputs[stage]
        ]
        self._taken = 0
        self._sum = 0
        self._at = math.inf
        self._pause = 0.0
        if plan.count_every is not None and self._turns:
            self._at = 0.0
            every = plan.count_every if connection.settle else min(_OFTEN, plan.count_every)
            self._pause = every / len(self._turns)

    def look(self, now: float) -> float:
        """Count a queue if it is time to; return when it is again. Raises ``BrokerBusy``."""
        if now < self._at:
            return self._at
        stage, name, last = self._turns[self._taken % len(self._turns)]
        self._beat()
        try:
            depth = self._connection.depth(name)
        except BrokerBusy:
            raise
        except BrokerError as error:
            # Missing, or denied: what matters more will tell, and nobody needs this number to work.
            log.info("what waits in %s is not counted: %s", name, error)
            self._board.set_stage(stage, WAITING, 0)
            self._at = math.inf
            return self._at
        self._sum += depth.visible + depth.delayed
        if last:
            self._board.set_stage(stage, WAITING, self._sum + 1)
            self._sum = 0
        self._taken += 1
        # The first round is at once: a display with holes in it looks broken.
        self._at = now if self._taken < len(self._turns) else now + self._pause
        return self._at
