"""Messages that a run with a source leaves in its queues, and the command that finishes them. Pure; any process.

A source that is started again begins anew, and makes all its outputs once more.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from sqspipes_mp.pipeline.plan import RunPlan


def behind_source(plan: RunPlan) -> tuple[str, ...]:
    """Return the tasks that run here behind a source; none where no source runs here."""
    if plan.source is None:
        return ()
    return tuple(plan.pipeline.stages[index].name for index in plan.selected if index != plan.source.index)


def finishing_call(plan: RunPlan, names: Sequence[str]) -> str:
    """Return the call that runs these tasks until their queues are empty; iterating, where the plan does."""
    # Without it the outputs of the last task would be dropped.
    iterating = "iterate=True, " if plan.sink is not None else ""
    return f'run(only={list(names)}, {iterating}until="drained", idle=1)'


def finishing_flags(names: Sequence[str]) -> str:
    """Return the flags with which ``sqspipes-mp run`` does the same."""
    return " ".join([*(f"--only {name}" for name in names), "--until drained --idle 1"])


def finishing_command(names: Sequence[str], target: str, broker: str | None) -> str:
    """Return the whole command; ``broker``: the URL that was given on the command line."""
    where = [] if broker is None else [f"--broker {shlex.quote(broker)}"]
    return " ".join([f"sqspipes-mp run {shlex.quote(target)}", *where, finishing_flags(names)])


def left_note(plan: RunPlan) -> str | None:
    """Return the note for the exception of a failed run whose source had made outputs; None: nothing is behind it."""
    names = behind_source(plan)
    if plan.source is None or not names:
        return None
    return (
        f"run again, the source {plan.source.name!r} begins anew and makes everything once more. To finish only "
        f"what is in the queues, without what it had not made yet: {finishing_call(plan, names)}; to drop that: purge()"
    )
