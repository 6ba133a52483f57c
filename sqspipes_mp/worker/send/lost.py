"""The check before each try to send a FIFO batch: a lost message and later ones of its group are skipped (worker)."""

from __future__ import annotations

from collections.abc import Sequence

from sqspipes_mp.brokers.base import Completion
from sqspipes_mp.worker.context import WorkerContext
from sqspipes_mp.worker.send.outgoing import Done


class StillOurs:
    """Asked by the broker before each try. Who is cut off for long may have lost a message before it can send again.

    Five minutes later SQS would take for new what another worker has sent long since.
    """

    def __init__(self, station: WorkerContext, batch: Sequence[Done]) -> None:
        self._station = station
        self._items = {id(item.completion): (place, item) for place, item in enumerate(batch)}
        #: The place of the first one lost, by group.
        self._lost: dict[str | None, int] = {}

    def __call__(self, completion: Completion) -> bool:
        place, item = self._items[id(completion)]
        if item.delivery is None:
            return True
        group = item.delivery.received.group
        first = self._lost.get(group)
        if first is not None and first < place:
            return False
        if self._station.holds(item.delivery):
            return True
        self._lost[group] = place
        return False
