"""A lease: our hold of a message, its state and its deadlines. ``leases`` stores it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

from sqspipes_mp.brokers.base import Handle

#: Where a queue service limits how long a message can be in flight, as SQS does (12 hours from its receive): seconds
#: before that from which its lease is not extended, and at which a call that still has it is killed, so that there is
#: time to judge it; at most that share of the limit.
_UNEXTENDED, _KILLED = (60.0, 1 / 20), (120.0, 1 / 10)


class LeaseState(IntEnum):
    """Where a message is in its worker."""

    FREE = 0
    HELD = 1  # received, not started: never charged
    RUNNING = 2  # in the function
    DONE = 3  # computed, outputs not accepted yet
    SENT = 4  # outputs accepted, not deleted yet
    CLOSING = 5  # its worker is changing its visibility, deleting or dead-lettering it
    FAILED = 6  # its call raised: charged however its worker ends
    CHARGING = 7  # as CLOSING, after a call that raised: charged however its worker ends


@dataclass(frozen=True, slots=True)
class Lease:
    """A consistent copy of one entry. ``received_at`` and ``deadline`` are by ``lease_now``, ``sent_at`` epoch seconds.

    ``started_at``: monotonic seconds; infinite while a generator waits for what it gave to be sent, which counts
    towards no timeout.
    ``company``: its call has other messages as well (a batch), so that none of them can be told guilty.
    """

    index: int
    generation: int
    state: LeaseState
    handle: Handle
    group: str | None
    receives: int
    charges: int
    received_at: float
    deadline: float
    sent_at: float
    started_at: float
    extended: bool
    lost: bool
    company: bool = False


def extended_until(lease: Lease, longest: float | None) -> float:
    """Return the time past which a lease cannot be extended (``lease_now``), by its broker's ``longest_hold``."""
    return _before_the_end(lease, longest, *_UNEXTENDED)


def killed_at(lease: Lease, longest: float | None) -> float:
    """Return when a call that still has the message is killed for that (``lease_now``); infinite without a limit."""
    return _before_the_end(lease, longest, *_KILLED)


def _before_the_end(lease: Lease, longest: float | None, seconds: float, share: float) -> float:
    return math.inf if longest is None else lease.received_at + longest - min(seconds, longest * share)
