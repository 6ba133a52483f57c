"""How a worker runs its messages: one after the other, in threads, or in batches; decided once, at boot (worker)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sqspipes_mp.worker.context import WorkerContext
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.run.batch import Batches, BatchFunction, BatchQueue
from sqspipes_mp.worker.run.function import Function
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.run.runner import Runner
from sqspipes_mp.worker.run.threads import GroupQueue, SharedFunction, ThreadMode

#: Makes the main loop, which takes messages until it is told to stop.
Serve = Callable[[Parts, Runner], Callable[[], None]]


class Mode(NamedTuple):
    """The user's function, the queue it is served from, and the main loop between the two."""

    function: Function
    ready: Ready
    serve: Serve


def mode_of(context: WorkerContext) -> Mode:
    """Build the user's function and its queue. Raises the errors of ``init`` and of the class's constructor."""
    task = context.stage.task
    if context.threads > 1:
        turns = GroupQueue(context)
        return Mode(SharedFunction(context), turns, lambda parts, runner: ThreadMode(parts, runner, turns).serve)
    if task.batch is not None:
        batches, function = BatchQueue(context.demand, task.batch), BatchFunction(context)
        return Mode(function, batches, lambda parts, runner: Batches(parts, function, runner, batches).serve)
    return Mode(Function(context), Ready(context.demand), lambda _, runner: runner.serve)
