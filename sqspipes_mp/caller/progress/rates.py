"""Progress in numbers: from readings of the scoreboard to rates, the time left, and the lines people read. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from sqspipes_mp.ipc.summary import Reading, Row

#: Seconds over which "per second" and "busy" are taken: some batches of deletes, and short enough to show a change.
WINDOW = 10.0
HEADER = ("stage", "waiting", "running", "done", "failed", "dead", "per s", "ETA", "busy")
#: Columns that a narrow terminal goes without, in this order.
_DISPENSABLE = ("busy", "per s", "running", "failed", "ETA", "waiting")
#: Columns of space between two columns.
_GAP = 2


class Pace:
    """Compares readings of one run over the last ``WINDOW`` seconds.

    Args:
        began: monotonic seconds.
        total: values that the first stage will get; None: unknown.
    """

    def __init__(self, began: float, total: int | None = None) -> None:
        self._total = total
        self._began = began
        self._past: deque[tuple[float, tuple[Reading, ...]]] = deque()

    def observe(self, now: float, readings: Sequence[Reading]) -> tuple[Row, ...]:
        """Return a row for each reading; ``readings``: of the same stages each time, ``now``: monotonic seconds."""
        past = self._past
        if not past:
            zeros = (Reading(name=each.name, workers=each.workers, room=each.room) for each in readings)
            past.append((self._began, tuple(zeros)))
        # The newest reading that is older than the window stays, to compare with.
        while len(past) > 1 and past[1][0] <= now - WINDOW:
            past.popleft()
        then, before = past[0]
        past.append((now, tuple(readings)))
        return tuple(
            self._row(index, reading, old, now - then)
            for index, (reading, old) in enumerate(zip(readings, before, strict=True))
        )

    def _row(self, index: int, reading: Reading, old: Reading, seconds: float) -> Row:
        per_second = max(0, reading.done - old.done) / seconds if seconds > 0 else 0.0
        left = reading.waiting
        if index == 0 and self._total is not None:
            left = max(0, self._total - reading.done - reading.dead)
        worked = max(0.0, reading.busy - old.busy)
        share = worked / (seconds * reading.room) if seconds > 0 and reading.room else 0.0
        return Row(reading=reading, per_second=per_second, busy=min(1.0, share), eta=eta(left, per_second))


def eta(left: int | None, per_second: float) -> float | None:
    """Return the seconds until ``left`` messages are done; None: unknown, or never at this pace."""
    if left is None or (left and per_second <= 0):
        return None
    return left / per_second if left else 0.0


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as texts, in the order of ``HEADER``."""
    reading = row.reading
    return (
        reading.name,
        "" if reading.waiting is None else f"{reading.waiting:,}",
        "rests" if reading.resting else f"{reading.running}/{reading.room}",
        f"{reading.done:,}",
        f"{reading.failed:,}",
        f"{reading.dead:,}",
        _rate(row.per_second),
        "" if row.eta is None else span(row.eta),
        f"{row.busy:.0%}",
    )


def fitting(table: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the columns of a table of ``cells`` that fit into ``width``; the least needed ones are left out first."""
    widths = [max(map(len, column)) + _GAP for column in zip(*table, strict=True)]
    kept = list(range(len(widths)))
    for name in _DISPENSABLE:
        if sum(widths[number] for number in kept) - _GAP <= width:
            break
        kept.remove(HEADER.index(name))
    return kept


def line(row: Row) -> str:
    """Return a row as part of a line of the log, without figures that are 0 or unknown."""
    reading = row.reading
    parts = [f"{reading.done:,} done", f"{_rate(row.per_second)} per s", f"busy {row.busy:.0%}"]
    if reading.resting:
        parts.append("rests")
    elif reading.running:
        parts.append(f"{reading.running:,} running")
    if reading.waiting:
        parts.append(f"{reading.waiting:,} waiting")
    if row.eta:
        parts.append(f"ETA {span(row.eta)}")
    parts += [f"{number:,} {name}" for number, name in ((reading.failed, "failed"), (reading.dead, "dead")) if number]
    return f"{reading.name} {', '.join(parts)}"


def span(seconds: float) -> str:
    """Return a time left as text, to the second: 9 s, 2:05, 3:02:01, 4 d 6 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, left = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}:{left:02}"
    days, rest = divmod(hours, 24)
    return f"{days:,} d {rest} h" if days else f"{hours}:{minutes:02}:{left:02}"


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 or not per_second else f"{per_second:.3g}"
