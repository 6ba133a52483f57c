"""Counts of queues: leftovers at boot, whether the run is drained, waiting messages for progress (keeper)."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from sqspipes_mp.brokers.base import Connection
from sqspipes_mp.errors import BrokerBusy, BrokerError, ConfigError
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import (
    BACKLOG,
    BACKLOG_AT,
    COUNT_EVERY,
    DEAD_LETTERS,
    FINISHED,
    PAUSED,
    QUEUE_COUNTS,
    QUEUE_STATES,
    RESTING,
    WAITING,
    StageField,
)
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.pipeline.source_leftovers import behind_source, finishing_call, finishing_flags
from sqspipes_mp.pipeline.stages import build

log = logging.getLogger("sqspipes_mp.keeper")

#: Seconds between two counts where they are exact, and cost nothing; a source that rests is counted for as often.
_OFTEN = 1.0
#: Seconds between two counts for a source that does not rest, and between two rounds for lookers, where each count is a
#: request.
SELDOM = 10.0
#: Seconds of counting after each look, and those for which counts are kept beyond that.
LOOK, _KEPT = 30.0, 90.0
#: Seconds of rest for each second of CPU that a count took.
_SPARING = 200.0
#: Seconds between two looks for drained queues: where counts are exact, and the most where they are not.
LOOK_EVERY, _SLOW_LOOK = 0.1, 5.0


def tell_left(plan: RunPlan, connection: Connection) -> None:
    """Warn of messages that an earlier run has left behind a source: they are done besides the source's new ones."""
    source = plan.source
    if source is None:
        return
    names = {*source.outputs, *(name for index in plan.selected for name in plan.inputs[index])}
    try:
        depths = [connection.depth(name) for name in sorted(names)]
    except BrokerError:
        # The run needs no count.
        return
    count = sum(depth.visible + depth.in_flight + depth.delayed for depth in depths)
    if not count:
        return
    here = behind_source(plan)
    # Where other engines run the next stages, messages in the queues are as they should be.
    behind = here or tuple(stage.name for stage in plan.pipeline.stages[1:])
    log.log(
        logging.WARNING if here else logging.INFO,
        "%s: messages of an earlier run are still in the queues (%d); they are done besides what the source %s makes "
        "now, which begins anew. Where that would be done twice, stop. To finish only those: %s, on the command line "
        "%s; to drop them: purge()",
        plan.pipeline.domain, count, source.name, finishing_call(plan, behind), finishing_flags(behind),
    )  # fmt: skip


def tell_strays(plan: RunPlan, connection: Connection) -> None:
    """Warn of messages in queues of this domain that no task uses; "drained" does not count them."""
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
    """Return the names of the pipeline's queues."""
    pipeline, known = plan.pipeline, set(plan.queue_names)
    if pipeline.stages[0].is_source:
        # map feeds a source's task as if it had an input, and makes queues for it.
        first, *others = (stage.task for stage in pipeline.stages)
        with contextlib.suppress(ConfigError):
            fed = [replace(first, input=True, max_waiting=None), *others]
            whole = build(fed, domain=pipeline.domain, fifo=pipeline.fifo, visibility=plan.settings.visibility)
            known.update(whole.queue_names())
    return known


def _is_dead(queue: str) -> bool:
    return queue.removesuffix(".fifo").endswith("--dead")


class DrainWatch:
    """Tells when the pipeline has drained: sources have ended, and every queue is empty for long enough.

    A message only moves downstream, so counts from upstream to downstream see each message at least once, whatever
    moves meanwhile; a message in a worker is in flight in its queue, and counted there. Approximate counts must stay
    zero for the broker's ``settle`` seconds.
    """

    def __init__(self, plan: RunPlan, board: Scoreboard, connection: Connection, beat: Callable[[], None]) -> None:
        self._plan = plan
        self._beat = beat
        self._board = board
        self._connection = connection
        source = plan.source
        self._sources = [] if source is None else board.used(source.index)
        # The end of another engine's source is not known: then the queues must have been empty for ``idle``, too.
        self._quiet_for = max(connection.settle, 0.0 if self._sources else plan.idle)
        self._empty_since: float | None = None
        self._told = False
        #: Paused stages that were told to hold up the end.
        self._told_paused: set[int] = set()
        if plan.idle_given and self._quiet_for > plan.idle:
            log.warning(
                "idle=%g s is %g s here: the queue service's counts may be wrong for so long after the last send",
                plan.idle, self._quiet_for,
            )  # fmt: skip

    def drained(self, now: float) -> bool:
        """Count once, and tell whether the pipeline has drained; ``now``: monotonic seconds. Raises ``BrokerError``."""
        if not self._empty():
            self._empty_since = None
            return False
        if self._empty_since is None:
            self._empty_since = now
            if self._quiet_for and not self._told:
                self._told = True
                late = self._quiet_for == self._connection.settle
                counted = " by the queue service's counts, which may be late" if late else ""
                why = "" if late else f" (idle={self._plan.idle:g})"
                log.info(
                    "every queue is empty%s; the run ends when they stay so for %g s%s", counted, self._quiet_for, why
                )
        return now - self._empty_since >= self._quiet_for

    def pause(self) -> float:
        """Return the seconds until the next look."""
        return LOOK_EVERY if self._connection.settle == 0 else min(_SLOW_LOOK, max(LOOK_EVERY, self._quiet_for / 12))

    def _empty(self) -> bool:
        board = self._board
        if not all(board.get(slot, FINISHED) for slot in self._sources):
            return False
        for queue in self._plan.watched:
            self._beat()
            if not self._connection.depth(queue).empty:
                self._tell_paused(queue)
                return False
        return True

    def _tell_paused(self, queue: str) -> None:
        """Say, once for each pause, that the run's end waits for a paused stage."""
        for stage in list(self._told_paused):
            if not self._board.stage(stage, PAUSED):
                self._told_paused.remove(stage)
        inputs = self._plan.inputs
        stage = next((index for index in self._plan.selected if queue in inputs[index]), -1)
        if stage >= 0 and stage not in self._told_paused and self._board.stage(stage, PAUSED):
            self._told_paused.add(stage)
            name = self._plan.pipeline.stages[stage].name
            log.warning(
                "%s is paused, and has messages: the run does not end before it is resumed, and they are done", name
            )


class BacklogCount:
    """Counts what can be received in the queues that a source with ``max_waiting`` sends to, for its workers."""

    def __init__(self, plan: RunPlan, board: Scoreboard, connection: Connection, beat: Callable[[], None]) -> None:
        self._board = board
        self._connection = connection
        self._beat = beat
        source = plan.source
        wanted = source is not None and source.task.max_waiting is not None
        self._stage = source if wanted else None
        #: Seconds between two counts while the source does not rest.
        self._every = SELDOM if connection.settle else _OFTEN
        self._counted_at = -math.inf
        if self._stage is not None:
            board.set_stage(self._stage.index, COUNT_EVERY, int(self._every * 1e9))

    def look(self, now: float) -> float:
        """Count where that is due, and return when to look again; monotonic seconds. Raises ``BrokerBusy``."""
        if self._stage is None:
            return math.inf
        board, index = self._board, self._stage.index
        due = self._counted_at + (_OFTEN if board.stage(index, RESTING) else self._every)
        if now >= due:
            waiting = 0
            try:
                for queue in self._stage.outputs:
                    self._beat()
                    waiting += self._connection.depth(queue).visible
            except BrokerBusy:
                raise
            except BrokerError as error:
                log.warning(
                    "%s: max_waiting has no effect, as its queues cannot be counted: %s", self._stage.name, error
                )
                board.set_stage(index, BACKLOG, 0)
                self._stage = None
                return math.inf
            self._counted_at = now
            board.set_stage(index, BACKLOG, waiting + 1)
            board.set_stage(index, BACKLOG_AT, int(now * 1e9))
        # Nobody tells the keeper that a rest begins.
        return now + _OFTEN


class _Turn(NamedTuple):
    """One count of a round."""

    stage: int
    queue: str
    #: The queue's level among the stage's inputs; None: it is the dead-letter queue, which only lookers want.
    priority: int | None
    #: Whether the queue is the stage's last input.
    last: bool = False


class WaitCount:
    """Counts one queue at a time, so that no turn of the keeper takes long, and writes what there is in it.

    It counts for the progress display, and for ``LOOK`` seconds after each time that somebody looks. Counts that nobody
    has asked for in a while are taken back: what was not counted is absent, never 0.
    """

    def __init__(self, plan: RunPlan, board: Scoreboard, connection: Connection, beat: Callable[[], None]) -> None:
        self._board = board
        self._connection = connection
        self._beat = beat
        #: Seconds between two rounds for the progress display; None: there is none, or nothing to show.
        self._shown: float | None = None
        if plan.count_every is not None and any(plan.inputs[stage] for stage in plan.selected):
            self._shown = plan.count_every if connection.settle else min(_OFTEN, plan.count_every)
        self._looked: float = SELDOM if connection.settle else _OFTEN
        self._looked_until = -math.inf
        #: A round: each stage's inputs in a row, then its dead-letter queue.
        self._turns = [turn for stage in plan.selected for turn in _turns_of(plan, stage)]
        #: The queues of a round without lookers.
        self._inputs = sum(turn.priority is not None for turn in self._turns)
        self._taken = 0
        #: Counts of a first round that are left: it is at once, or the display would have holes.
        self._at_once = self._inputs
        self._sum = 0
        #: CPU seconds of the latest count; SQLite reads an index, 30 ms for a million messages.
        self._cost = 0.0
        self._at = math.inf if self._shown is None else 0.0

    def looked_at(self, now: float) -> None:
        """Count for somebody who looks at ``now`` (monotonic seconds), too."""
        if not self._turns:
            return
        if now >= self._looked_until:
            if now >= self._looked_until + _KEPT:
                self._forget()
            self._at_once = len(self._turns)
            self._at = now
        self._looked_until = now + LOOK

    def look(self, now: float) -> float:
        """Count a queue where that is due, and return when the next is; monotonic seconds. Raises ``BrokerBusy``."""
        if now < self._at:
            return self._at
        looked = now < self._looked_until
        if not looked and self._shown is None:
            self._at = self._looked_until + _KEPT
            if now >= self._at:
                self._forget()
            return self._at
        turn = self._next(looked=looked)
        try:
            self._count(turn)
        except BrokerBusy:
            raise
        except BrokerError as error:
            # A queue is missing, or its count denied. The run needs no count, and its receives tell of a missing queue.
            log.info("what waits in %s is not counted: %s", turn.queue, error)
            self._stop(turn)
            return self._at
        self._taken += 1
        self._at_once = max(0, self._at_once - 1)
        self._at = now if self._at_once else now + max(self._pause(looked=looked), self._cost * _SPARING)
        return self._at

    def _next(self, *, looked: bool) -> _Turn:
        """Return the turn that is due; a dead-letter queue's only where somebody looks."""
        while True:
            turn = self._turns[self._taken % len(self._turns)]
            if looked or turn.priority is not None:
                return turn
            self._taken += 1

    def _stop(self, turn: _Turn) -> None:
        """Count no more; where it is a dead-letter queue that cannot be counted, the others still."""
        if turn.priority is None:
            self._turns.remove(turn)
            self._taken = self._sum = 0
            return
        self._forget()
        self._turns.clear()

    def _pause(self, *, looked: bool) -> float:
        """Return the seconds until the next queue."""
        if not looked and self._shown is not None:
            return self._shown / self._inputs
        # With jitter: machines that are looked at together do not count together.
        return self._looked * random.uniform(0.8, 1.2) / len(self._turns)

    def _count(self, turn: _Turn) -> None:
        self._beat()
        began = time.thread_time()
        depth = self._connection.depth(turn.queue)
        self._cost = time.thread_time() - began
        board = self._board
        if turn.priority is None:
            board.set_stage(turn.stage, DEAD_LETTERS, depth.visible + depth.in_flight + depth.delayed + 1)
            return
        for place, count in enumerate((depth.visible, depth.in_flight, depth.delayed)):
            board.set_stage(turn.stage, _count_field(turn.priority, place), count + 1)
        self._sum += depth.visible + depth.delayed
        if turn.last:
            board.set_stage(turn.stage, WAITING, self._sum + 1)
            self._sum = 0

    def _forget(self) -> None:
        """Take back every count: nobody has looked for long."""
        self._at = math.inf
        for turn in self._turns:
            self._board.set_stage(turn.stage, DEAD_LETTERS, 0)
            self._board.set_stage(turn.stage, WAITING, 0)
            for place in range(len(QUEUE_STATES)):
                self._board.set_stage(turn.stage, _count_field(turn.priority or 0, place), 0)


def _turns_of(plan: RunPlan, index: int) -> list[_Turn]:
    stage, inputs = plan.pipeline.stages[index], plan.inputs[index]
    turns = [
        _Turn(index, name, len(stage.inputs) - 1 - stage.inputs.index(name), name == inputs[-1]) for name in inputs
    ]
    return turns if stage.dead is None else [*turns, _Turn(index, stage.dead, None)]


def _count_field(priority: int, place: int) -> StageField:
    return StageField(QUEUE_COUNTS + priority * len(QUEUE_STATES) + place)
