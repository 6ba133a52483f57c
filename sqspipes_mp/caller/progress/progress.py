"""Progress while a run goes on: a table at the foot of a terminal, or lines of the log, or nothing (caller).

It has no thread and no process: the wait for the run (the supervisor's, or the iterator's) ticks it, so no child draws.
It reads the scoreboard only; waiting messages are counted by the keeper, which has a connection.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO

from sqspipes_mp.caller.progress.footer import Footer
from sqspipes_mp.caller.progress.rates import HEADER, Pace, cells, fitting, line
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.ipc.summary import Reading, Row

log = logging.getLogger("sqspipes_mp.progress")

#: Seconds between two tables, and between two lines of the log.
DRAW_EVERY, LOG_EVERY = 0.5, 30.0
#: Seconds until the first line of the log on a terminal, where somebody waits for it.
SOON = 3.0
#: Seconds between two counts of waiting messages: on SQS a count is a request that costs money. A line of the log needs
#: them as often as a table: a count as old as the line before would tell messages, and an ETA, that are long gone.
COUNT_EVERY = 10.0

#: A terminal has one foot: the first run gets it.
_foot = threading.Lock()


class Drawing(Protocol):
    """A way to show progress."""

    #: Seconds until the first look.
    first: float
    #: Seconds between two looks.
    every: float
    #: Seconds between two counts of the queues; None: none are needed.
    count_every: float | None

    def show(self, rows: Sequence[Row]) -> None:
        """Show one row per stage."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Nothing:
    """Shows nothing, and costs nothing."""

    first = every = math.inf
    count_every: float | None = None

    def show(self, rows: Sequence[Row]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Lines:
    """A line of the log (INFO), now and then, while something happens."""

    def __init__(self, first: float = LOG_EVERY) -> None:
        self.first, self.every = first, LOG_EVERY
        self.count_every: float | None = COUNT_EVERY
        self._told: list[tuple[int | None, ...]] = []

    def show(self, rows: Sequence[Row]) -> None:
        """Log one line, unless nothing has changed since the last one."""
        counts: list[tuple[int | None, ...]] = [
            (row.reading.done, row.reading.failed, row.reading.dead, row.reading.waiting) for row in rows
        ]
        if counts != self._told and any(map(any, counts)):
            self._told = counts
            log.info("%s", "; ".join(map(line, rows)))

    def close(self) -> None:
        """Do nothing: the run logs its own end."""


class Table:
    """A row for each stage at the foot of a terminal.

    Args:
        stream: the terminal's.
        console: a ``rich.console.Console``, which lays out.
        grid: the class ``rich.table.Table``.
    """

    def __init__(self, stream: TextIO, console: Any, grid: Any) -> None:
        self.first, self.every = 0.0, DRAW_EVERY
        self.count_every: float | None = COUNT_EVERY
        self._console = console
        self._grid = grid
        self._footer = Footer(stream)

    def show(self, rows: Sequence[Row]) -> None:
        """Draw the table."""
        width = self._footer.width
        table = self._grid(box=None, pad_edge=False, header_style="dim")
        texts = [cells(row) for row in rows]
        kept = fitting([HEADER, *texts], width - 1)
        for number in kept:
            table.add_column(HEADER[number], justify="right" if number else "left", no_wrap=True)
        for row, shown in zip(rows, texts, strict=True):
            style = "red" if row.reading.failed or row.reading.dead else None
            table.add_row(*(shown[number] for number in kept), style=style)
        with self._console.capture() as drawn:
            # One column less: a terminal may wrap after the last.
            self._console.print(table, width=width - 1, crop=True)
        self._footer.show(drawn.get().splitlines())

    def close(self) -> None:
        """Give the rows back to the terminal, and its foot to the next run."""
        try:
            self._footer.close()
        finally:
            _foot.release()


class Progress:
    """One run's progress.

    Args:
        drawing: shows it.
        look: reads the stages.
        total: values that the first stage will get; None: unknown.
    """

    def __init__(self, drawing: Drawing, look: Callable[[], Sequence[Reading]], total: int | None = None) -> None:
        self._drawing = drawing
        self._look = look
        now = time.monotonic()
        self._pace = Pace(now, total)
        #: When to tick next, monotonic seconds.
        self.due = now + drawing.first

    def tick(self, now: float) -> None:
        """Show the stages, if they are due at ``now``, monotonic seconds."""
        if now < self.due:
            return
        self.due = now + self._drawing.every
        try:
            self._drawing.show(self._pace.observe(now, self._look()))
        except Exception as error:
            # A terminal that is gone or a stream that was closed must not end a run.
            log.debug("progress is not shown any more: %s", error)
            self.close()

    def close(self) -> None:
        """Show no more, and leave the terminal as it was."""
        drawing, self._drawing, self.due = self._drawing, Nothing(), math.inf
        try:
            drawing.close()
        except (OSError, ValueError) as error:
            log.debug("the terminal could not be put back: %s", error)


def check(field: str, wanted: object) -> bool | None:
    """Check the argument ``progress``. Raises ``ConfigError``."""
    if wanted is None or isinstance(wanted, bool):
        return wanted
    raise ConfigError(field, wanted, "True, False or None (a table on a terminal, else nothing)")


def choose(wanted: bool | None) -> Drawing:
    """Return the way to show progress: a table on a terminal; elsewhere lines of the log for True, nothing for None."""
    if wanted is False:
        return Nothing()
    table = _table(sys.stderr)
    if table is not None:
        return table
    if not (wanted and log.isEnabledFor(logging.INFO)):
        return Nothing()
    return Lines(SOON if _lacks_rich(sys.stderr) else LOG_EVERY)


def _lacks_rich(stream: TextIO | None) -> bool:
    """Tell whether a terminal has no table only because ``rich`` is missing; says so in the log."""
    try:
        lacking = stream is not None and stream.isatty() and importlib.util.find_spec("rich") is None
    except (OSError, ValueError):
        return False
    if lacking:
        log.info("pip install 'sqspipes_mp[progress]' has a terminal show a table of the stages here")
    return lacking


def _table(stream: TextIO | None) -> Table | None:
    """Return a table on the terminal behind ``stream``; None: no terminal, a dumb one, no rich, or another run's."""
    try:
        if stream is None or not stream.isatty():
            return None
        import rich.console  # noqa: PLC0415  (optional, and only a terminal needs it)
        import rich.table  # noqa: PLC0415
    except (ImportError, OSError, ValueError):
        # Not installed (pip install 'sqspipes_mp[progress]'), or a stream that is closed.
        return None
    console = rich.console.Console(file=stream)
    if not console.is_terminal or console.is_dumb_terminal or not _foot.acquire(blocking=False):
        return None
    try:
        return Table(stream, console, rich.table.Table)
    except (OSError, ValueError):
        _foot.release()
        return None
