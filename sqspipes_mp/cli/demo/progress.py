"""How far something is: a line rewritten on a terminal, else a new one every second (any process)."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self, TextIO

#: Seconds between two lines, on a terminal and elsewhere.
_ON_A_TERMINAL, _ELSEWHERE = 0.1, 1.0
_ERASE_LINE = "\r\033[K"


class Progress:
    """Within its block, shows the newest text given to ``show``, not too often; leaves a terminal's line empty."""

    def __init__(self, stream: TextIO, *, shown: bool) -> None:
        self.shown = shown
        self._stream = stream
        self._terminal = shown and stream.isatty()
        self._due = 0.0 if shown else math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._terminal:
            self._stream.write(_ERASE_LINE)
            self._stream.flush()

    def show(self, text: str) -> None:
        """Show ``text``, if it is time to."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + (_ON_A_TERMINAL if self._terminal else _ELSEWHERE)
        self._stream.write(f"{_ERASE_LINE}{text}" if self._terminal else f"{text}\n")
        self._stream.flush()
