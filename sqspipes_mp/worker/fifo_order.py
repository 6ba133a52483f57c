"""FIFO order within a worker: no message of a group gets ahead of an earlier one that did not get through (worker).

On a standard queue each method answers at once that there is no order. ``Busy`` keeps one message of a group running
at a time in thread mode; ``Line`` keeps the members of one batch in order; ``GroupOrder`` looks after the messages that
wait, and those whose outputs wait in the outbox.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from sqspipes_mp.brokers.base import Completion
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.send.outgoing import Done


class GroupOrder:
    """The messages that follow one that failed, was refused, or was lost."""

    def __init__(self, context: WorkerContext, ready: Ready) -> None:
        self._context = context
        self._ready = ready
        #: Receipts of the messages this worker had of a group when an earlier one's outputs were refused or lost.
        self._behind: set[str] = set()
        self._marking = threading.Lock()

    def take_waiting(self, delivery: Delivery) -> list[Delivery]:
        """Take the messages that wait behind one of their group that failed before its outputs were in the outbox."""
        return self._ready.take_group(delivery.received.group) if self._context.fifo else []

    def block(self, delivery: Delivery) -> list[Delivery]:
        """Take the messages that wait behind one of their group; those that run or are in the outbox are marked."""
        group = delivery.received.group
        if not self._context.fifo or group is None:
            return []
        with self._marking:
            held = self._context.leases.settled()
            # A receipt that is held no more is forgotten.
            self._behind = {
                lease.handle.receipt for lease in held if lease.group == group or lease.handle.receipt in self._behind
            }
        return self._ready.take_group(group)

    def blocks(self, delivery: Delivery) -> bool:
        """Tell whether a message was marked by ``block``: its outputs must not be sent."""
        return delivery.received.handle.receipt in self._behind

    def check(self, batch: Sequence[Done]) -> Callable[[Completion], bool] | None:
        """Return the question that the broker asks before each try to send one of a batch's completions.

        A worker that was cut off for long may have lost a lease before it can send again. Five minutes later SQS would
        take for new an output that another worker has sent.
        """
        if not self._context.fifo:
            # A continuation after its lease is lost would be a second chain.
            going_on = {id(item.completion): item.delivery for item in batch if item.continues}
            return (lambda each: self._may_go_on(going_on.get(id(each)))) if going_on else None
        items = {id(item.completion): (place, item.delivery) for place, item in enumerate(batch)}
        first_lost: dict[str | None, int] = {}

        def still_ours(completion: Completion) -> bool:
            place, delivery = items[id(completion)]
            if delivery is None:
                return True
            group = delivery.received.group
            if first_lost.get(group, place) < place:
                return False
            if self._context.holds(delivery):
                return True
            first_lost[group] = place
            return False

        return still_ours

    def _may_go_on(self, delivery: Delivery | None) -> bool:
        """Tell whether a continuation may be sent: on standard queues, too, the keeper may know of a lost lease."""
        if delivery is None:
            return True
        leases = self._context.leases
        return self._context.holds(delivery) and leases.held_until(delivery.lease, delivery.until) > 0


class Line:
    """The members of one batch, in their order."""

    def __init__(self, context: WorkerContext, hand_back: Callable[[list[Delivery]], None]) -> None:
        self._fifo = context.fifo
        self._hand_back = hand_back
        self._blocked: set[str | None] = set()

    def passes(self, member: Delivery, through: Callable[[Delivery], bool]) -> bool:
        """Tell whether a member got ``through``; behind one of its group that did not, it is handed back instead."""
        group = member.received.group
        if self._fifo and group in self._blocked:
            self._hand_back([member])
            return False
        if through(member):
            return True
        self._blocked.add(group)
        return False


class Busy:
    """The groups of which a message runs. Its owner's lock guards it."""

    def __init__(self, *, fifo: bool) -> None:
        self._fifo = fifo
        self._groups: set[str] = set()

    def enter(self, delivery: Delivery) -> None:
        if self._fifo and (group := delivery.received.group) is not None:
            self._groups.add(group)

    def leave(self, delivery: Delivery) -> None:
        if (group := delivery.received.group) is not None:
            self._groups.discard(group)

    def has(self, delivery: Delivery) -> bool:
        return delivery.received.group in self._groups

    def idle_groups(self, deliveries: Iterable[Delivery]) -> int:
        """Return how many groups have a message that could begin."""
        return len({delivery.received.group for delivery in deliveries} - self._groups)
