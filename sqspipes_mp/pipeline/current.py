"""The message being processed, for the user's function (worker; also ``engine.call``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from sqspipes_mp.errors import SqsPipesError


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentMessage:
    """What a task can know of its message.

    ``id``: the root's id, the same in every stage. ``hop``: the SHA-256 hex id that the message's own outputs are
    derived from; unique for this message in this stage, so ``INSERT ... ON CONFLICT (hop)`` writes once.
    ``attempt``: 1 at the first. ``sent_at``: epoch seconds. ``deadline``: monotonic seconds at which the call is
    killed (``Task(timeout=)``), or None. ``meta``: the envelope's meta. ``attributes``: what the sender set beside the
    body, in a queue of others (``Task(input=NAME)``) on SQS; bytes where it is a Binary, else text.
    """

    id: str
    stage: str
    hop: str
    attempt: int
    priority: int
    group: str | None
    sent_at: float
    deadline: float | None
    meta: Mapping[str, Any]
    attributes: Mapping[str, str | bytes] = field(default_factory=dict)


_current: ContextVar[CurrentMessage | None] = ContextVar("sqspipes_mp_current", default=None)


def current_message() -> CurrentMessage:
    """Return the message this call was given.

    Raises:
        SqsPipesError: outside a task's call, and in one with ``Task(batch=)``, which has several messages.
    """
    message = _current.get()
    if message is None:
        raise SqsPipesError(
            "current_message() works inside a task's call only, and not with Task(batch=): no single message is being "
            "processed here"
        )
    return message


def set_current(message: CurrentMessage | None) -> None:
    """Make ``message`` the current one of this thread."""
    _current.set(message)


def put_off(seconds: float) -> None:
    """Have the current message's deadline be so much later."""
    message = _current.get()
    if message is not None and message.deadline is not None:
        _current.set(replace(message, deadline=message.deadline + seconds))


@contextmanager
def processing(message: CurrentMessage) -> Iterator[None]:
    """Make ``message`` the current one within the block."""
    token = _current.set(message)
    try:
        yield
    finally:
        _current.reset(token)
