"""A lease: our hold of a message, as region.py keeps it for worker, keeper and supervisor. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from sqspipes_mp.brokers.base import Handle


class LeaseState(IntEnum):
    """Where a message is in its worker."""

    FREE = 0
    HELD = 1  # received, not started: never charged
    RUNNING = 2  # in the function
    DONE = 3  # computed, outputs not accepted yet
    SENT = 4  # outputs accepted, not deleted yet
    CLOSING = 5  # its worker is changing its visibility, deleting or dead-lettering it
    FAILED = 6  # its call raised: charged however its worker ends, unless that writes it first


@dataclass(frozen=True, slots=True)
class Lease:
    """A consistent copy of one entry. ``received_at`` and ``deadline`` are times of the leases' clock (``clock``).

    ``sent_at``: epoch seconds. ``started_at``: monotonic seconds; infinite while a generator waits for what it gave to
    be sent, which counts towards no timeout.
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
    charged: bool = False
    company: bool = False
