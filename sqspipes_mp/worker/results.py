"""Values on their way to the caller (``iterate=True``), until it has asked for the next one (worker)."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Mapping
from typing import Any

from sqspipes_mp.control import Kind
from sqspipes_mp.errors import OutputError
from sqspipes_mp.worker.items import Done
from sqspipes_mp.worker.outbox import Outbox
from sqspipes_mp.worker.station import Station


class Results:
    """The last stage's window. An input is deleted only once all its values were acknowledged."""

    def __init__(self, station: Station, outbox: Outbox) -> None:
        self._station = station
        self._outbox = outbox
        # Values that may be on the way; the function waits when the caller is slower.
        self._window = math.inf if station.orders.plan.window is None else station.orders.plan.window
        self._waiting: dict[int, Done] = {}
        self._left: dict[int, int] = {}
        self._owner: dict[int, int] = {}
        self._next = 0
        self._moving = False
        self._changed = threading.Condition()

    def pack(self, value: Any) -> bytes:
        """Return the value as bytes. Raises ``OutputError`` where it cannot be pickled."""
        try:
            return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise OutputError(
                f"stage {self._station.stage.name!r}: the output ({type(value).__name__}) cannot be pickled, so it "
                f"cannot go to the caller of run(iterate=True): {error}. Return plain data"
            ) from error

    def send(self, done: Done, blobs: list[tuple[str, bytes]], header: Mapping[str, object] | None = None) -> bool:
        """Hand the values of one call to the caller, each with its id; False: the run ends, they were not sent.

        ``header``: what else is said with each (map: which message of which value it comes of).
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._owner) < self._window or self._station.full_stop.is_set())
            if self._station.full_stop.is_set():
                return False
            key = self._next
            self._waiting[key] = done
            self._left[key] = len(blobs)
            numbers = range(key, key + len(blobs))
            self._next += len(blobs)
            self._owner.update(dict.fromkeys(numbers, key))
        extra = header or {}
        for number, (ident, blob) in zip(numbers, blobs, strict=True):
            self._station.say(
                Kind.RESULT, {**extra, "number": number, "id": ident, "last": number == numbers[-1]}, blob
            )
        return True

    def acknowledge(self, number: int) -> None:
        """Take the caller's word that it is done with a value (control thread)."""
        with self._changed:
            key = self._owner.pop(number, None)
            if key is None:
                return
            self._left[key] -= 1
            finished = self._waiting.pop(key) if not self._left[key] else None
            if finished is not None:
                del self._left[key]
            self._moving = finished is not None
            self._changed.notify_all()
        if finished is not None:
            self._outbox.put(finished)
            with self._changed:
                self._moving = False
                self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait_taken(self) -> None:
        """Wait until the caller is done with all values, or the run ends."""
        with self._changed:
            self._changed.wait_for(
                lambda: not (self._owner or self._moving) or self._station.full_stop.is_set(),
            )

    def take_unacknowledged(self) -> list[Done]:
        """Return what the caller did not acknowledge; it goes back to its queue."""
        with self._changed:
            self._changed.wait_for(lambda: not self._moving)
            left = list(self._waiting.values())
            self._waiting.clear()
            self._owner.clear()
            self._left.clear()
            return left
