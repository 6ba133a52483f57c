"""A dead letter's call once more, in this process, with no queue (caller)."""

from __future__ import annotations

import os
from contextlib import closing
from typing import Any

from sqspipes_mp.caller.call import current_of
from sqspipes_mp.caller.dead_letters import DeadLetter
from sqspipes_mp.messages.envelope import Message, decode
from sqspipes_mp.pipeline.current import processing
from sqspipes_mp.pipeline.outputs import Built
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.pipeline.task import environment


def replay(plan: RunPlan, letter: DeadLetter) -> list[Any]:
    """Call the stage's function with a dead letter's value, as a worker does: after ``env``, ``setup`` and ``init``.

    Nothing is sent, and the letter stays where it is.

    Args:
        plan: a run of the letter's stage.
        letter: the dead letter.

    Returns:
        The outputs of the call.

    Raises:
        DecodeError: the body is no envelope.
        Exception: the function raised it.
    """
    stage = plan.pipeline.stage(letter.stage)
    if isinstance(stage.task.input, str):
        message = Message(letter.value, {}, letter.id, letter.id, 0)
    else:
        message = decode(letter.body, letter.id)
    os.environ.update(environment(stage.task, 0))
    if plan.settings.setup is not None:
        plan.settings.setup()
    with closing(Built(stage.task, plan.args[stage.index])) as function, processing(current_of(stage, message)):
        return list(function.outputs([message.value] if stage.task.batch else message.value))
