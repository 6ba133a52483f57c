"""Counts of waiting messages: leftovers are logged at boot, stages are counted for the progress display (keeper)."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import replace

from sqspipes_mp.brokers.base import Connection
from sqspipes_mp.errors import BrokerBusy, BrokerError, ConfigError
from sqspipes_mp.ipc.scoreboard import WAITING, Scoreboard
from sqspipes_mp.pipeline.leftovers import behind_source, finishing_call, finishing_flags
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.pipeline.stages import build

log = logging.getLogger("sqspipes_mp.keeper")

#: Seconds between two rounds where counting is free.
_OFTEN = 1.0


def tell_left(plan: RunPlan, connection: Connection) -> None:
    """Say what an earlier run has left where a source begins: it will be done besides what the source makes."""
    source = plan.source
    if source is None:
        return
    names = {*source.outputs, *(name for index in plan.selected for name in plan.inputs[index])}
    try:
        depths = [connection.depth(name) for name in sorted(names)]
    except BrokerError:
        # Nobody needs this number to work.
        return
    count = sum(depth.visible + depth.in_flight + depth.delayed for depth in depths)
    if not count:
        return
    here = behind_source(plan)
    # Where others work on what the source makes, messages in the queues are how it should be.
    behind = here or tuple(stage.name for stage in plan.pipeline.stages[1:])
    log.log(
        logging.WARNING if here else logging.INFO,
        "%s: messages of an earlier run are still in the queues (%d); they are done besides what the source %s makes "
        "now, which begins anew. Where that would be done twice, stop. To finish only those: %s, on the command line "
        "%s; to drop them: purge()",
        plan.pipeline.domain, count, source.name, finishing_call(plan, behind), finishing_flags(behind),
    )  # fmt: skip


def tell_strays(plan: RunPlan, connection: Connection) -> None:
    """Say what is in queues of this domain that no task uses: "drained" does not mean those."""
    found = connection.strays(plan.pipeline.domain, _known(plan))
    if not found:
        return
    letters = sum(stray.messages for stray in found if _is_dead(stray.queue))
    messages = sum(stray.messages for stray in found) - letters
    owned = [stray.queue for stray in found if stray.owned]
    log.warning(
        "%s: %d messages and %d dead letters are in queues that no task of this pipeline uses, and stay there: %s. "
        "Perhaps another pipeline of this domain uses them, or a task was renamed or removed. To finish them, give it "
        "its old name back, run until drained, and rename it then; %s",
        plan.pipeline.domain, messages, letters, ", ".join(f"{stray.queue} ({stray.messages})" for stray in found),
        f"to drop them, where no other uses them: engine.broker.open().delete({owned})" if len(owned) == len(found)
        else "some are from before 0.1.1, whose file does not tell whose they are: they may be another domain's",
    )  # fmt: skip


def _known(plan: RunPlan) -> set[str]:
    pipeline, known = plan.pipeline, set(plan.queue_names)
    if pipeline.stages[0].is_source:
        # What only map makes of a source, where it was used: status and purge() know of these.
        first, *others = (stage.task for stage in pipeline.stages)
        with contextlib.suppress(ConfigError):
            fed = [replace(first, input=True), *others]
            whole = build(fed, domain=pipeline.domain, fifo=pipeline.fifo, visibility=plan.settings.visibility)
            known.update(whole.queue_names())
    return known


def _is_dead(queue: str) -> bool:
    return queue.removesuffix(".fifo").endswith("--dead")


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
