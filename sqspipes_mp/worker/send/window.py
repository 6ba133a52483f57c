"""Values on their way to the caller (``iterate=True``), until it has asked for the next one (worker)."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Mapping
from typing import Any

from sqspipes_mp.errors import MessageTooLarge, OutputError
from sqspipes_mp.ipc.channel import MAX_FRAME, Kind
from sqspipes_mp.worker.context import WorkerContext
from sqspipes_mp.worker.send.outbox import Outbox
from sqspipes_mp.worker.send.outgoing import Done

#: Most bytes of one pickled value: a frame's, less room for its header.
MAX_RESULT = MAX_FRAME - 65_536


class ResultWindow:
    """The last stage's window. An input is deleted only once all its values were acknowledged."""

    def __init__(self, station: WorkerContext, outbox: Outbox) -> None:
        self._station = station
        self._outbox = outbox
        # Values that may be on the way; the function waits when the caller is slower.
        self._window = math.inf if station.orders.plan.window is None else station.orders.plan.window
        self._waiting: dict[int, Done] = {}
        self._left: dict[int, int] = {}
        self._owner: dict[int, int] = {}
        self._next = 0
        self._moving = False
        self._let_go = False
        self._changed = threading.Condition()

    def pack(self, value: Any) -> bytes:
        """Return the value as bytes. Raises ``OutputError`` where it cannot be pickled, ``MessageTooLarge``."""
        try:
            blob = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise OutputError(
                f"stage {self._station.stage.name!r}: the output ({type(value).__name__}) cannot be pickled, so it "
                f"cannot go to the caller of run(iterate=True): {error}. Return plain data"
            ) from error
        if len(blob) > MAX_RESULT:
            raise MessageTooLarge(
                f"stage {self._station.stage.name!r}: the output ({type(value).__name__}) has {len(blob):,} bytes "
                f"pickled; at most {MAX_RESULT:,} can go to the caller. Return less, or write it to a file"
            )
        return blob

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
        try:
            for number, (ident, blob) in zip(numbers, blobs, strict=True):
                self._station.say(
                    Kind.RESULT, {**extra, "number": number, "id": ident, "last": number == numbers[-1]}, blob
                )
        except BaseException:
            # No memory for it, say: then the call has failed, and nobody will acknowledge what was not sent.
            self._withdraw(key, numbers)
            raise
        return True

    def _withdraw(self, key: int, numbers: range) -> None:
        with self._changed:
            del self._waiting[key], self._left[key]
            for number in numbers:
                self._owner.pop(number, None)
            self._changed.notify_all()

    def follow(self, done: Done) -> None:
        """Carry away a call that gave nothing; on FIFO only after what the caller still has of its group."""
        with self._changed:
            group = self._group(done)
            if group is not None and any(self._group(earlier) == group for earlier in self._waiting.values()):
                self._waiting[self._next] = done
                self._left[self._next] = 0
                self._next += 1
                return
        self._outbox.put(done)

    def _group(self, done: Done) -> str | None:
        return done.delivery.received.group if self._station.fifo and done.delivery is not None else None

    def acknowledge(self, number: int) -> None:
        """Take the caller's word that it is done with a value (control thread)."""
        with self._changed:
            key = self._owner.pop(number, None)
            if key is None:
                return
            self._left[key] -= 1
            finished = self._pop(key) if not self._left[key] else []
            self._moving = bool(finished)
            self._changed.notify_all()
        if finished:
            for done in finished:
                self._outbox.put(done)
            with self._changed:
                self._moving = False
                self._changed.notify_all()

    def _pop(self, key: int) -> list[Done]:
        """Take out a call the caller is done with, and those that only waited for it."""
        del self._left[key]
        finished = [self._waiting.pop(key)]
        group = self._group(finished[0])
        for other, done in list(self._waiting.items()):
            if group is None or self._group(done) != group:
                continue
            if self._left[other]:
                break
            del self._left[other]
            finished.append(self._waiting.pop(other))
        return finished

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def let_go(self) -> None:
        """Take the caller's word that it cannot go on without a value that is still in a queue (control thread)."""
        with self._changed:
            self._let_go = True
            self._changed.notify_all()

    def wait_taken(self) -> None:
        """Wait until the caller is done with all values, the run ends, or only this worker's successor can help."""
        with self._changed:
            self._let_go = False
            self._changed.wait_for(
                lambda: not (self._owner or self._moving) or self._station.full_stop.is_set() or self._let_go,
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
