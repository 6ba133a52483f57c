"""The message being processed, for the user's function (worker; also ``engine.call``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from sqspipes_mp.errors import SqsPipesError


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentMessage:
    """A task's message, beside its value."""

    #: The root's id, the same in every stage.
    id: str
    stage: str
    #: SHA-256 hex id from which the ids of the outputs derive; unique for this message in this stage, so that
    #: ``INSERT ... ON CONFLICT (hop)`` writes once.
    hop: str
    #: Number of this attempt, from 1.
    attempt: int
    priority: int
    #: FIFO group.
    group: str | None
    #: Epoch seconds.
    sent_at: float
    #: Monotonic seconds at which the call is killed (``Task(timeout=)``); None: never.
    deadline: float | None
    #: The envelope's meta.
    meta: Mapping[str, Any]
    #: Message attributes that the sender set, in a queue of others (``Task(input=NAME)``) on SQS; bytes for a Binary.
    attributes: Mapping[str, str | bytes] = field(default_factory=dict)

    def progress(self, fraction: float | None = None, text: str = "") -> None:
        """Tell those who look at the engine (``sqspipes-mp top``) how far this call is.

        Args:
            fraction: 0 to 1; beyond, the nearer one counts. None: not known.
            text: the same in words; about 160 bytes of it are shown.
        """
        if _readers is not None:
            _readers(self.hop, -1.0 if fraction is None else min(1.0, max(0.0, fraction)), text)


#: Takes a call's progress, by its hop, to readers of the engine's statistics; None: this process is no worker.
_readers: Callable[[str, float, str], object] | None = None


def tell_progress_to(readers: Callable[[str, float, str], object]) -> None:
    """Have ``progress`` tell ``readers`` in this process (worker)."""
    global _readers  # noqa: PLW0603  (a process is one worker)
    _readers = readers


_current: ContextVar[CurrentMessage | None] = ContextVar("sqspipes_mp_current", default=None)


def current_message() -> CurrentMessage:
    """Return the message of this call.

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


#: Makes a message the current one of this thread. It is C code: each message passes here twice.
set_current: Callable[[CurrentMessage | None], object] = _current.set


def put_off(seconds: float) -> None:
    """Move the current message's deadline by ``seconds``."""
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
