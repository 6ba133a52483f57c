"""The outbox's three kinds of item: done, to release, to dead-letter (worker)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sqspipes_mp.brokers.base import Completion, DeadLetter
from sqspipes_mp.ipc.statistics import DEAD, SlotField
from sqspipes_mp.pipeline.task import TaskCallback
from sqspipes_mp.worker.context import Delivery

#: See ``Done.step``.
Step = tuple[str, int, list[int], int]


@dataclass(slots=True)
class Done:
    """A call's outputs to send, and its message to delete."""

    completion: Completion
    #: None for a source.
    delivery: Delivery | None = None
    callbacks: tuple[TaskCallback, ...] = ()
    #: Number of a source's call, or of its generator's yield.
    call: int | None = None
    #: A source's generator has ended: the number of its yields.
    end: int | None = None
    #: There was no call: ``decode`` returned None.
    dropped: bool = False
    #: The message goes on in its own queue: the last output takes its place, and is sent only while its lease is held.
    continues: bool = False
    #: The message is sent anew, and no call is done.
    anew: bool = False
    #: Told to the caller of ``map`` before the outputs are sent: token of the value, marks of the message and of its
    #: children, and the number of the message's receives.
    step: Step | None = None
    #: When it was put, monotonic seconds.
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Release:
    """Messages to make visible again in ``seconds``."""

    deliveries: tuple[Delivery, ...]
    seconds: float
    #: Whether each of them has a failed attempt more.
    charge: bool = False


@dataclass(frozen=True, slots=True)
class Letter:
    """A message to move to its dead-letter queue."""

    delivery: Delivery
    letter: DeadLetter
    #: The counter of such messages.
    counter: SlotField = DEAD


Item = Done | Release | Letter
