"""The outbox's queue: it picks the items that make the next batch. Pure; the outbox's lock guards it (worker)."""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass

from sqspipes_mp.worker.send.outgoing import Done, Item, Release

#: Items looked at for one batch, where some have to wait for their FIFO group.
_LOOK_AHEAD = 200


@dataclass(frozen=True, slots=True)
class Batch:
    """Items that one carrier carries away together: any number of ``Done``, or one other."""

    items: list[Item]
    #: Number of the first of them, in the order they were put.
    first: int
    groups: frozenset[str]


class Backlog:
    """A queue of items.

    Args:
        batch: ``Done`` items that make a full batch.
        linger: seconds that a ``Done`` item may wait for a full batch.
        by_group: FIFO: the items of a group are carried one batch after the other, and no item of a group with other
            messages lingers while no batch is under way.
    """

    def __init__(self, *, batch: int, linger: float, by_group: bool) -> None:
        self._batch = batch
        self._linger = linger
        self._by_group = by_group
        #: The items that wait, each with its number in the order they were put.
        self.items: deque[tuple[int, Item]] = deque()
        #: Number of the item put last.
        self.last = 0
        self._under_way: dict[int, Batch] = {}
        self._busy: set[str] = set()

    @property
    def under_way(self) -> int:
        """Batches picked and not carried yet."""
        return len(self._under_way)

    @property
    def full(self) -> bool:
        """Whether a full batch waits."""
        return len(self.items) >= self._batch

    def pick(self, now: float, hurried: float) -> Batch | None:
        """Return the next batch, which is then under way; None while its items may still wait for company.

        ``now``: monotonic seconds; ``hurried``: number of the last item that waits for none.
        """
        places, cut = self._together()
        if not places or (self.items[places[0]][0] > hurried and self._patience(places, now, cut=cut) > 0):
            return None
        picked = [self.items[place] for place in places]
        if places[-1] == len(places) - 1:
            for _ in places:
                self.items.popleft()
        else:
            gone = set(places)
            self.items = deque(entry for place, entry in enumerate(self.items) if place not in gone)
        groups: set[str] = set()
        if self._by_group:
            groups.update(*(self._groups(item) for _, item in picked))
        batch = Batch([item for _, item in picked], picked[0][0], frozenset(groups))
        self._under_way[batch.first] = batch
        self._busy |= groups
        return batch

    def carried(self, batch: Batch) -> None:
        """Note that a batch is carried away."""
        del self._under_way[batch.first]
        self._busy -= batch.groups

    def passed(self, number: int) -> bool:
        """Tell whether each item put up to ``number`` is carried away."""
        return all(first > number for first in self._under_way) and (not self.items or self.items[0][0] > number)

    def patience(self, now: float) -> float:
        """Return the seconds until the next batch is due; infinite where it waits for another one's end."""
        places, cut = self._together()
        return self._patience(places, now, cut=cut) if places else math.inf

    def _patience(self, places: list[int], now: float, *, cut: bool) -> float:
        first = self.items[places[0]][1]
        if not isinstance(first, Done) or len(places) >= self._batch or cut:
            return 0.0
        if self._by_group and not self._under_way and any(self._holds_up(self.items[place][1]) for place in places):
            # The next message of its group cannot be received before this one is deleted.
            return 0.0
        return max(0.0, first.at + self._linger - now)

    def _together(self) -> tuple[list[int], bool]:
        """Return the places of the items that could go next, as one batch; and whether another kind follows them."""
        places: list[int] = []
        blocked = set(self._busy)
        for place, (_, item) in enumerate(itertools.islice(self.items, _LOOK_AHEAD)):
            if self._by_group and not blocked.isdisjoint(groups := self._groups(item)):
                # Later items of its groups wait behind it.
                blocked |= groups
            elif not isinstance(item, Done):
                return places or [place], True
            else:
                places.append(place)
                if len(places) >= self._batch:
                    break
        return places, False

    @staticmethod
    def _holds_up(item: Item) -> bool:
        """Tell whether an item's message may have others of its group behind it."""
        delivery = item.delivery if isinstance(item, Done) else None
        return delivery is not None and not delivery.alone_in_group

    def _groups(self, item: Item) -> set[str]:
        if not isinstance(item, Done):
            deliveries = item.deliveries if isinstance(item, Release) else (item.delivery,)
            return {group for each in deliveries if (group := each.received.group) is not None}
        if item.delivery is not None:
            return set() if item.delivery.received.group is None else {item.delivery.received.group}
        return {group for output in item.completion.outputs if (group := output.group or output.hop)}
