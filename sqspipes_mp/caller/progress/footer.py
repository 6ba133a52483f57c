"""Lines kept at the foot of a terminal while everything else scrolls above them (caller).

The terminal itself is told to scroll only the rows above (DECSTBM). Logging, the caller's prints and those of workers,
which are other processes, go on as before, and nothing is redirected.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import TextIO

_SAVE, _RESTORE, _PLAIN, _ERASE_LINE = "\0337", "\0338", "\033[0m", "\033[2K"
#: One row down in the same column, scrolling at the last row.
_DOWN = "\033D"


class Footer:
    """Rows at the foot of the terminal behind ``stream``; made when first shown, and again after a resize."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._fd = stream.fileno()
        self._kept = 0
        self._size = os.terminal_size((0, 0))

    @property
    def width(self) -> int:
        """Columns to write in, just now."""
        return os.get_terminal_size(self._fd).columns

    def show(self, lines: Sequence[str]) -> None:
        """Show the lines, or as many as fit into half of the screen. Raises ``OSError`` where the terminal is gone."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not poll.poll(0):
            # The terminal takes nothing (Ctrl-S, say): a write would block this process.
            return
        size = os.get_terminal_size(self._fd)
        fitting = lines[: size.lines // 2]
        text = ""
        if (size, len(fitting)) != (self._size, self._kept):
            text = self._undone() + _made(size.lines, len(fitting))
            self._size, self._kept = size, len(fitting)
        top = size.lines - len(fitting) + 1
        rows = "".join(f"\033[{top + n};1H{_PLAIN}{_ERASE_LINE}{line}" for n, line in enumerate(fitting))
        self._write(f"{text}{_SAVE}{rows}{_RESTORE}")

    def close(self) -> None:
        """Give the rows back to the terminal, empty."""
        text, self._kept = self._undone(), 0
        if text:
            self._write(text)

    def _undone(self) -> str:
        if not self._kept:
            return ""
        top = self._size.lines - self._kept + 1
        emptied = "".join(f"\033[{top + n};1H{_PLAIN}{_ERASE_LINE}" for n in range(self._kept))
        return f"{_SAVE}\033[r{emptied}{_RESTORE}"

    def _write(self, text: str) -> None:
        self._stream.flush()
        # One write: no other process may write between saving the cursor's place and going back to it.
        data = text.encode(self._stream.encoding or "utf-8", "replace")
        while data:
            data = data[os.write(self._fd, data) :]


def _made(rows: int, count: int) -> str:
    """Make room below the cursor, which stays in its column, and let only the rows above that scroll."""
    if not count:
        return ""
    return f"{_DOWN * count}\033[{count}A{_SAVE}\033[1;{rows - count}r{_RESTORE}"
