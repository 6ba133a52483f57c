"""Output of the command line: its log and the reason of its end on stderr, and text tables (the command line)."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from textwrap import indent
from typing import Any

from sqspipes_mp.ipc.report.dead_log import DEAD
from sqspipes_mp.messages.plain import lines

NAME = "sqspipes-mp"

_COLORS = {"WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[31m"}
#: Most records held back: more than are logged before the first line.
_HELD = 10_000
#: What every record has: the rest of its attributes are facts of its own.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "untold"}
_NOISY = ("boto3", "botocore", "urllib3")


def open_streams() -> None:
    """Give the process the standard streams that it was started without, and ones that can write every character.

    A descriptor below 3 that is free would become a connection's or a file's, and what a task prints would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number: this one.
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (for as long as the process)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Console:
    """The program's own logging: text or JSON lines on stderr; children that are forked inherit it."""

    def __init__(self) -> None:
        self._handler = logging.StreamHandler(sys.stderr)
        self._json = False
        #: Whether the log tells the run's start and, in JSON, its end.
        self.tells = False
        self._handler.addFilter(self._is_shown)
        #: The command that finishes the messages which a failed run with a source leaves.
        self.finish = ""
        self.configure(logging.WARNING, "text")

    def configure(self, level: int, form: str) -> None:
        """Log from ``level`` up, in the form "text" or "json"; earlier handlers go."""
        self._json = form == "json"
        self.tells = level <= logging.INFO
        colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._handler.setFormatter(JsonLines() if self._json else TextLines(colored=colored))
        logging.basicConfig(level=level, handlers=[self._handler], force=True)
        for name in _NOISY:
            logging.getLogger(name).setLevel(max(level, logging.WARNING))

    @property
    def tells_end(self) -> bool:
        """Whether the log tells the run's figures: in text the command shows a table instead."""
        return self.tells and self._json

    def _is_shown(self, record: logging.LogRecord) -> bool:
        return self._json or "summary" not in record.__dict__

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the log back within the block, so that lines of ``say`` come first."""
        root = logging.getLogger()
        buffer = MemoryHandler(_HELD, flushLevel=logging.CRITICAL + 1, target=self._handler)
        root.handlers[:] = [buffer]
        try:
            yield
        finally:
            root.handlers[:] = [self._handler]
            buffer.close()

    def say(self, message: str, level: int = logging.INFO, error: BaseException | None = None) -> None:
        """Show a line of the log, whatever the level of the log."""
        info = None if error is None else (type(error), error, error.__traceback__)
        self._handler.handle(logging.LogRecord("sqspipes_mp.cli", level, __file__, 0, message, None, info))

    def fail(self, message: str, error: BaseException | None = None) -> None:
        """Show the reason of the command's end: the traceback of ``error``, then the message."""
        if self._json:
            self.say(message, logging.ERROR, error)
            return
        text = "" if error is None else set_apart("".join(traceback.format_exception(error)))
        sys.stderr.write(f"{text}{NAME}: error: {lines(message)}\n")
        sys.stderr.flush()


class TextLines(logging.Formatter):
    """Time, level, message."""

    def __init__(self, *, colored: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._colored = colored

    def formatException(self, ei: Any) -> str:  # noqa: N802  (logging's name)
        return set_apart(super().formatException(ei))

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text; a text of others in it may have control characters, which are escaped."""
        if record.name == DEAD and not record.__dict__.get("untold"):
            # The dead letter tells the traceback, to those who ask for it.
            record = copy(record)
            record.exc_info = record.exc_text = None
        text = lines(super().format(record))
        color = _COLORS.get(record.levelname) if self._colored else None
        return text.replace(record.levelname, f"{color}{record.levelname}\033[0m", 1) if color else text


def set_apart(text: str) -> str:
    """Return a traceback indented: the exception may quote a message, whose lines would pass for ours."""
    return indent(lines(text), "  ")


class JsonLines(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, pid, and exc where there is an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's JSON; ``json`` escapes every character that is not ASCII."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        # The facts of a record, given as ``extra``: stage, id, attempt, summary.
        fields |= {name: value for name, value in record.__dict__.items() if name not in _USUAL | fields.keys()}
        if record.exc_info:
            fields["exc"] = self.formatException(record.exc_info)
        elif record.exc_text:
            fields["exc"] = record.exc_text
        return json.dumps(fields, default=repr)


def table(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Return aligned lines: the first ``left`` columns to the left, the others, which are numbers, to the right."""
    cells = [tuple(header), *(tuple(_text(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _text(cell: object) -> str:
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
