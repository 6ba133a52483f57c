"""Values as short texts for a table's cells. Pure (the command line's process)."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from sqspipes_mp.ipc.running.units import short_time
from sqspipes_mp.messages.plain import one_line

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell's text, without characters that would steer a terminal, and its tone."""

    text: str
    #: "": as any other. "warn", "bad": to be seen first. "dim": of no interest now.
    tone: str = ""


def text(value: str, tone: str = "") -> Cell:
    """Return a text of others as a cell; it may come from a queue."""
    return Cell(one_line(value), tone)


def number(value: float | None, tone: str = "") -> Cell:
    """Return a whole number; None: a dash. ``tone``: of a value that is not 0."""
    if value is None:
        return Cell("-", "dim")
    return Cell(f"{value:,.0f}", tone if value else "")


def rate(value: float | None, tone: str = "") -> Cell:
    """Return a number per second; None: a dash. ``tone``: of a value that is not 0."""
    if value is None:
        return Cell("-", "dim")
    return Cell(f"{value:,.1f}" if value < 1000 else f"{value:,.0f}", tone if value else "")


def share(value: float | None, tone: str = "") -> Cell:
    """Return a share of 1 as a percentage; None: a dash."""
    return Cell("-", "dim") if value is None else Cell(f"{value:.0%}", tone)


def memory(size: int | None) -> Cell:
    """Return bytes as mebibytes; None: a dash."""
    return Cell("-", "dim") if size is None else Cell(f"{size / _MIB:,.0f}M")


def time(seconds: float | None, tone: str = "") -> Cell:
    """Return a time in at most six characters below ten years; None: a dash."""
    return Cell("-", "dim") if seconds is None else Cell(short_time(seconds), tone)


def width_of(shown: str) -> int:
    """Return the columns of a terminal that a text takes."""
    if shown.isascii():
        return len(shown)
    return sum(_width(char) for char in shown)


def cut(shown: str, width: int, tail: int = 0) -> str:
    """Return a text in at most ``width`` columns of a terminal, "…" where it is cut; its ``tail`` last ones stay."""
    if width_of(shown) <= width:
        return shown
    end = shown[-tail:] if tail else ""
    room = width - width_of(end) - 1
    if room < 0:
        return cut(shown, width) if tail else ""
    kept = ""
    for char in shown:
        room -= _width(char)
        if room < 0:
            break
        kept += char
    return f"{kept}…{end}"


def _width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
