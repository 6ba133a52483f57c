"""The outbox's three kinds of item: done, to release, to dead-letter (worker)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sqspipes_mp.brokers.base import Completion, DeadLetter
from sqspipes_mp.pipeline.task import TaskCallback
from sqspipes_mp.worker.context import Delivery


@dataclass(slots=True)
class Done:
    """A call's outputs, and its message to delete. ``calls``: a source's calls that this one completes; ``dropped``:
    there was no call, since decode made nothing of the message.
    """

    completion: Completion
    delivery: Delivery | None = None
    callbacks: tuple[TaskCallback, ...] = ()
    calls: int = 0
    ended: bool = False
    dropped: bool = False
    #: What the caller of ``map`` is to be told before it is carried away: token, hop, children.
    step: tuple[str, int, list[int]] | None = None
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Release:
    """Messages to make visible again in ``seconds``; ``charge``: as failed attempts."""

    deliveries: tuple[Delivery, ...]
    seconds: float
    charge: bool = False


@dataclass(frozen=True, slots=True)
class Bury:
    """A message to dead-letter."""

    delivery: Delivery
    letter: DeadLetter
