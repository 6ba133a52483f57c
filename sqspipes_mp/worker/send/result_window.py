"""The results on their way to the caller (``iterate=True``, ``map``), until each is acknowledged (worker)."""

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

#: Bytes of results on the way from which the function waits.
_MOST_BYTES = 32 << 20
#: Most bytes of one pickled value: a frame's, less room for its header.
MAX_RESULT = MAX_FRAME - 65_536


class ResultWindow:
    """The last stage's window. An input is deleted only once all its results were acknowledged."""

    def __init__(self, context: WorkerContext, outbox: Outbox) -> None:
        self._context = context
        self._outbox = outbox
        #: Results that may be on the way; the function waits for a slower caller.
        self._window = math.inf if context.assignment.plan.window is None else context.assignment.plan.window
        #: Calls whose results are on the way, by key: the number of the call's first result.
        self._waiting: dict[int, Done] = {}
        #: Results of each call not acknowledged yet, by key.
        self._left: dict[int, int] = {}
        #: The key of the call that each result on the way belongs to.
        self._owner: dict[int, int] = {}
        #: Bytes of each of these calls' results, by key, and of all.
        self._sizes: dict[int, int] = {}
        self._bytes = 0
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
                f"stage {self._context.stage.name!r}: the output ({type(value).__name__}) cannot be pickled, so it "
                f"cannot go to the caller of run(iterate=True): {error}. Return plain data"
            ) from error
        if len(blob) > MAX_RESULT:
            raise MessageTooLarge(
                f"stage {self._context.stage.name!r}: the output ({type(value).__name__}) has {len(blob):,} bytes "
                f"pickled; at most {MAX_RESULT:,} can go to the caller. Return less, or write it to a file"
            )
        return blob

    def send(self, done: Done, blobs: list[tuple[str, bytes]], header: Mapping[str, object] | None = None) -> bool:
        """Send the results of one call to the caller, each with its id; False: the run ends, none was sent.

        ``header``: told with each of them (map: the value's token and the message's mark).
        """
        with self._changed:
            if not self._has_room():
                with self._context.resting():
                    self._changed.wait_for(lambda: self._has_room() or self._context.full_stop.is_set())
            if self._context.full_stop.is_set():
                return False
            key = self._next
            self._waiting[key] = done
            self._left[key] = len(blobs)
            self._sizes[key] = sum(len(blob) for _, blob in blobs)
            self._bytes += self._sizes[key]
            numbers = range(key, key + len(blobs))
            self._next += len(blobs)
            self._owner.update(dict.fromkeys(numbers, key))
        extra = header or {}
        try:
            for number, (ident, blob) in zip(numbers, blobs, strict=True):
                self._context.say(
                    Kind.RESULT, {**extra, "number": number, "id": ident, "last": number == numbers[-1]}, blob
                )
        except BaseException:
            # No memory for it, say: the call has failed, and nobody will acknowledge its results.
            self._withdraw(key, numbers)
            raise
        return True

    def _withdraw(self, key: int, numbers: range) -> None:
        with self._changed:
            del self._waiting[key], self._left[key]
            self._bytes -= self._sizes.pop(key)
            for number in numbers:
                self._owner.pop(number, None)
            self._changed.notify_all()

    def follow(self, done: Done) -> None:
        """Have a call without results carried away; on FIFO after those of its group that the caller still has."""
        with self._changed:
            group = self._group(done)
            if group is not None:
                # An acknowledged call of the group may be on its way to the outbox.
                self._changed.wait_for(lambda: not self._moving)
            if group is not None and any(self._group(earlier) == group for earlier in self._waiting.values()):
                self._waiting[self._next] = done
                self._left[self._next] = 0
                self._next += 1
                return
        self._outbox.put(done)

    def _has_room(self) -> bool:
        # Ordered results wait for an earlier value's, so a bound could be one that nobody lifts.
        return self._window == math.inf or (len(self._owner) < self._window and self._bytes < _MOST_BYTES)

    def _group(self, done: Done) -> str | None:
        return done.delivery.received.group if self._context.fifo and done.delivery is not None else None

    def acknowledge(self, number: int) -> None:
        """Note the caller's ACK of a result (control thread)."""
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
                self._outbox.put(done, waits=False)
            with self._changed:
                self._moving = False
                self._changed.notify_all()

    def _pop(self, key: int) -> list[Done]:
        """Take out a call whose results are acknowledged, and those of its group that waited only for it."""
        del self._left[key]
        self._bytes -= self._sizes.pop(key, 0)
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
        """Note that the caller waits for a message that is still in a queue (control thread)."""
        with self._changed:
            self._let_go = True
            self._changed.notify_all()

    def wait_taken(self) -> bool:
        """Wait until all results are acknowledged, the run ends, or the caller waits for this worker's successor.

        Returns whether the caller does.
        """
        with self._changed:
            self._let_go = False
            self._changed.wait_for(
                lambda: not (self._owner or self._moving) or self._context.full_stop.is_set() or self._let_go,
            )
            return self._let_go

    def take_unacknowledged(self) -> list[Done]:
        """Return the calls with results that the caller did not acknowledge; their messages are released."""
        with self._changed:
            self._changed.wait_for(lambda: not self._moving)
            left = list(self._waiting.values())
            self._waiting.clear()
            self._owner.clear()
            self._left.clear()
            return left
