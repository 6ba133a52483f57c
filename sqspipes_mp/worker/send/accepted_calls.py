"""The calls of a source that were accepted downstream, on the scoreboard (worker: its source and its carriers).

Several sends are under way at once, so calls are accepted out of their order: a prefix, and a window of single calls
beyond it. A source's replacement goes on after the prefix and skips what the window says was accepted.
"""

from __future__ import annotations

import threading

from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import ACCEPTED, ACCEPTED_WINDOW, FINISHED, WINDOW_WORDS, SlotField

#: Calls that the window spans.
SPAN = WINDOW_WORDS * 64


class Accepted:
    """One slot's prefix and window.

    Call ``n`` has bit ``n % SPAN``. It is accepted where the bit is 1 in even turns of the window (``n // SPAN``) and 0
    in odd ones. So a bit never has to be cleared as the prefix moves on, and each step is one store of one word.
    """

    def __init__(self, board: Scoreboard, slot: int, *, goes_on: bool) -> None:
        self._board = board
        self._slot = slot
        self._changed = threading.Condition()
        self._end: int | None = None
        #: Calls accepted in a row.
        self.prefix = board.get(slot, ACCEPTED)
        if goes_on:
            # A worker that was killed between a bit and the prefix: its successor skips those calls, and adds none.
            while self.has(self.prefix):
                self.prefix += 1
            board.put(slot, ACCEPTED, self.prefix)
        else:
            # A function's calls are new ones: its predecessor's beyond the prefix are none of them.
            for number in range(self.prefix, self.prefix + SPAN):
                self._put(number, accepted=False)

    def has(self, number: int) -> bool:
        """Tell whether a call was accepted."""
        if number < self.prefix:
            return True
        if number >= self.prefix + SPAN:
            return False
        word, bit = self._place(number)
        return bool(self._board.get(self._slot, word) >> bit & 1) is (number // SPAN % 2 == 0)

    def wait_for_room(self, number: int, give_up: threading.Event) -> bool:
        """Wait until a call fits into the window; False: ``give_up`` was set first, which is looked at each second."""
        with self._changed:
            while number >= self.prefix + SPAN:
                if give_up.is_set():
                    return False
                self._changed.wait(1.0)
        return True

    def add(self, number: int) -> None:
        """Note that a call was accepted."""
        with self._changed:
            self._put(number, accepted=True)
            before = self.prefix
            while self.has(self.prefix):
                self.prefix += 1
            if self.prefix > before:
                self._board.put(self._slot, ACCEPTED, self.prefix)
                self._finish()
                self._changed.notify_all()

    def end(self, number: int) -> None:
        """Note that a generator has ended before call ``number``; all of it is accepted once the prefix is there."""
        with self._changed:
            self._end = number
            self._finish()

    def _finish(self) -> None:
        if self._end is not None and self.prefix >= self._end:
            self._board.put(self._slot, FINISHED, 1)

    def _put(self, number: int, *, accepted: bool) -> None:
        word, bit = self._place(number)
        one = accepted is (number // SPAN % 2 == 0)
        value = self._board.get(self._slot, word)
        self._board.put(self._slot, word, value | 1 << bit if one else value & ~(1 << bit))

    def _place(self, number: int) -> tuple[SlotField, int]:
        at = number % SPAN
        return SlotField(ACCEPTED_WINDOW + at // 64), at % 64
