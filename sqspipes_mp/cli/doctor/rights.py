"""The queues that a run uses, and the way in which it uses each. Pure."""

from __future__ import annotations

from sqspipes_mp.brokers.rights import Use
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.pipeline.stages import Stage


def uses_of(plan: RunPlan) -> tuple[Use, ...]:
    """Return each queue of a run with all that the run does with it."""
    stages = [plan.pipeline.stages[index] for index in plan.selected]
    received = {name for index in plan.selected for name in plan.inputs[index]}
    sent = {name for stage in stages for name in (*stage.outputs, *filter(None, (stage.dead,)))}
    sent |= {name for stage in stages for name in _sent_anew(stage)}
    return tuple(
        Use(spec=spec, receives=spec.name in received, sends=spec.name in sent)
        for spec in plan.pipeline.specs_for(plan.selected)
    )


def _sent_anew(stage: Stage) -> tuple[str, ...]:
    """Return the inputs that a stage sends to itself: ``Continue``, and delays longer than SQS's own.

    Queues of others are not sent to.
    """
    return () if isinstance(stage.task.input, str) else stage.inputs
