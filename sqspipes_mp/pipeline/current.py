"""The message being processed, for the user's function (worker; also ``engine.call``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sqspipes_mp.errors import SqsPipesError
from sqspipes_mp.host.clock import lease_now


class Ending:
    """Says whether the calls of one process are to come to an end. One thread writes it, any thread reads it."""

    __slots__ = ("paused", "stopping", "until")

    def __init__(self, paused: Callable[[], bool] = lambda: False) -> None:
        #: Whether calls are to come to an end for good.
        self.stopping = False
        #: Tells whether the stage is paused.
        self.paused = paused
        #: When calls that run are cut off, monotonic seconds.
        self.until = math.inf

    def asks(self) -> bool:
        """Tell whether calls are to come to an end."""
        return self.stopping or self.paused()


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentMessage:
    """A task's message, beside its value. Any thread may read it; ``stopping`` and ``deadline`` are live."""

    #: The root's id, the same in every stage.
    id: str
    stage: str
    #: SHA-256 hex id from which the ids of the outputs derive; unique for this message in this stage, so that
    #: ``INSERT ... ON CONFLICT (hop)`` writes once.
    hop: str
    #: Number of this attempt, from 1.
    attempt: int
    priority: int
    #: FIFO group, or tenant.
    group: str | None
    #: Epoch seconds.
    sent_at: float
    #: The envelope's meta.
    meta: Mapping[str, Any]
    #: Message attributes that the sender set, in a queue of others (``Task(input=NAME)``) on SQS; bytes for a Binary.
    attributes: Mapping[str, str | bytes] = field(default_factory=dict)
    #: Number of this continuation of the value (``Continue``); 0: the call is the first one.
    continuation: int = 0
    #: When the call has outlived its timeout, monotonic seconds.
    _late_at: float = field(default=math.inf, repr=False, compare=False)
    #: When the message will soon have been in flight for as long as the queue service allows, seconds of ``lease_now``.
    _full_at: float = field(default=math.inf, repr=False, compare=False)
    _ending: Ending = field(default_factory=Ending, repr=False, compare=False)

    @property
    def deadline(self) -> float | None:
        """Monotonic seconds at which the call is killed; None: never, as far as is known now.

        ``Task(timeout=)`` sets it; once the run stops it is no later than the end of the grace.
        """
        deadline = min(self._late_at, self._ending.until)
        return None if deadline == math.inf else deadline

    @property
    def stopping(self) -> bool:
        """Whether this call should come to an end: return ``Continue(state)``, or a result that is near.

        True while the run stops or the stage is paused, before a replacement for memory, and from 10 minutes
        before SQS's 12 hours on.
        """
        return self._ending.asks() or lease_now() >= self._full_at

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


class _CurrentBatch(CurrentMessage):
    """Stands for the messages of one call with ``Task(batch=)``: it has ``stopping`` and ``deadline`` alone."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<the messages of a batch>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        asked = "progress()" if name == "_tell" else name
        raise SqsPipesError(
            f"current_message().{asked} is not known with Task(batch=), where no single message is being processed; "
            "stopping and deadline are"
        )


def batch_message(late_at: float, full_at: float, ending: Ending) -> CurrentMessage:
    """Return the object that ``current_message()`` gives in a batch; the arguments are those of ``CurrentMessage``."""
    batch = object.__new__(_CurrentBatch)
    for name, value in (("_late_at", late_at), ("_full_at", full_at), ("_ending", ending)):
        object.__setattr__(batch, name, value)
    return batch


_current: ContextVar[CurrentMessage | None] = ContextVar("sqspipes_mp_current", default=None)


def current_message() -> CurrentMessage:
    """Return the message of this call; with ``Task(batch=)`` it has ``stopping`` and ``deadline`` alone.

    Raises:
        SqsPipesError: outside a task's call, threads that the task has started included: they use the call's.
    """
    message = _current.get()
    if message is None:
        raise SqsPipesError(
            "current_message() works inside a task's call only: a thread of your own is given what it returns there"
        )
    return message


#: Makes a message the current one of this thread. It is C code: each message passes here twice.
set_current: Callable[[CurrentMessage | None], object] = _current.set


def put_off(seconds: float) -> None:
    """Move the end of the current call's timeout by ``seconds``."""
    message = _current.get()
    if message is not None:
        # Other threads may have the message, so it stays the same object.
        object.__setattr__(message, "_late_at", message._late_at + seconds)


@contextmanager
def processing(message: CurrentMessage) -> Iterator[None]:
    """Make ``message`` the current one within the block."""
    token = _current.set(message)
    try:
        yield
    finally:
        _current.reset(token)
