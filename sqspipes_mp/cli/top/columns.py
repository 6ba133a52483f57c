"""The columns of stages and workers, and their fit into a width. Pure (the command line's process).

Where a table is too wide, whole columns go, those of the highest rank first. A text is cut, a number never is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqspipes_mp.cli.top import cells
from sqspipes_mp.cli.top.cells import Cell
from sqspipes_mp.ipc.running.notes import LONG_CALL, worker_name
from sqspipes_mp.ipc.running.outcomes import SHOWN_ID

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    head: str
    cell: Callable[[Values], Cell]
    #: Columns with a higher rank go first; no two of a table have the same one.
    rank: int
    #: Least width of a text, which may be cut; 0: a number.
    least: int = 0
    #: Width that is kept for a number, so that no column goes and comes with another one's digits.
    kept: int = 0
    #: Characters at a text's end that a cut leaves, a worker's number say.
    tail: int = 0


@dataclass(frozen=True, slots=True)
class Placed:
    """A column with its width in a terminal."""

    column: Column
    width: int

    def pad(self, shown: str) -> str:
        """Return a text in exactly this width: texts to the left, numbers to the right."""
        if self.column.least:
            shown = cells.cut(shown, self.width, self.column.tail)
        space = " " * max(0, self.width - cells.width_of(shown))
        return f"{shown}{space}" if self.column.least else f"{space}{shown}"


class Fit:
    """Places a table's columns; a column's width never shrinks, so that a screen stands still."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._widest = {column.head: max(len(column.head), column.least, column.kept) for column in columns}

    def place(self, rows: Sequence[Values], width: int, gap: int) -> list[Placed]:
        """Return the columns that fit into ``width``, with ``gap`` spaces between them."""
        for column in self._columns:
            found = (cells.width_of(column.cell(row).text) for row in rows)
            self._widest[column.head] = max(self._widest[column.head], *found, 0)
        kept = sorted(self._columns, key=lambda column: column.rank)
        while len(kept) > 1 and self._needed(kept) + gap * (len(kept) - 1) > width:
            kept.pop()
        room = width - gap * (len(kept) - 1) - self._needed(kept)
        placed = []
        for column in self._columns:
            if column in kept:
                more = max(0, min(room, self._widest[column.head] - column.least)) if column.least else 0
                room -= more
                placed.append(Placed(column, (column.least or self._widest[column.head]) + more))
        return placed

    def _needed(self, columns: Sequence[Column]) -> int:
        return sum(column.least or self._widest[column.head] for column in columns)


def oldest(worker: Values) -> Values | None:
    """Return the call of a worker that runs for the longest time; None: none runs."""
    calls: Sequence[Values] = worker["calls"]
    return max(calls, key=lambda call: call["age"] or 0.0, default=None)


def in_order(workers: Sequence[Values]) -> list[Values]:
    """Return the workers with a long call first, the longest before the others; else by stage and number."""
    long = [worker for worker in workers if (worker["call_age"] or 0.0) > LONG_CALL]
    long.sort(key=lambda worker: -worker["call_age"])
    return [*long, *(worker for worker in workers if worker not in long)]


# -- stages -----------------------------------------------------------------------------------------------------------


def _busy(stage: Values) -> Cell:
    if stage["paused"]:
        return Cell("paused", "warn")
    cell = cells.share(stage["busy"])
    return Cell(f"{cell.text}*", "warn") if stage["bottleneck"] else cell


def _workers(stage: Values) -> Cell:
    return Cell(f"{stage['ready']}/{stage['wanted']}", "warn" if stage["ready"] < stage["wanted"] else "")


def _in_flight(stage: Values) -> Cell:
    counts = [queue["in_flight"] for queue in stage["queues"] if queue["in_flight"] is not None]
    return cells.number(sum(counts) if counts else None)


def _dead(stage: Values) -> Cell:
    return cells.number(max(stage["dead_letters"] or 0, stage["dead_lettered"]), "bad")


def _of(key: str, *inner: str) -> Callable[[Values], Any]:
    def get(values: Values) -> Any:
        found = values[key]
        for name in inner:
            found = found[name]
        return found

    return get


def _cell(make: Callable[..., Cell], key: str, *inner: str, tone: str = "") -> Callable[[Values], Cell]:
    get = _of(key, *inner)
    return (lambda values: make(get(values), tone)) if tone else (lambda values: make(get(values)))


#: Widths of a time ("59m59s"), of a rate ("9,999.9") and of a share of one CPU.
_TIME, _RATE, _CPU = 6, 7, 4

STAGES = (
    Column("stage", lambda stage: cells.text(stage["name"]), 0, least=8, tail=3),
    Column("workers", _workers, 1),
    Column("running", _cell(cells.number, "running"), 9),
    Column("waiting", _cell(cells.number, "waiting"), 2),
    Column("in flight", _in_flight, 12),
    Column("dead", _dead, 7),
    Column("done", _cell(cells.number, "done"), 18),
    Column("done/s", _cell(cells.rate, "per_second", "done"), 3, kept=_RATE),
    Column("failed", _cell(cells.number, "failed", tone="bad"), 5),
    Column("failed/s", _cell(cells.rate, "per_second", "failed", tone="bad"), 11),
    Column("retried/s", _cell(cells.rate, "per_second", "retried", tone="warn"), 16),
    Column("busy", _busy, 4, kept=len("paused")),
    Column("cpu", _cell(cells.share, "cpu"), 13, kept=_CPU),
    Column("p50", _cell(cells.time, "run_time", "p50"), 8, kept=_TIME),
    Column("p95", _cell(cells.time, "run_time", "p95"), 14, kept=_TIME),
    Column("longest", lambda stage: cells.time(stage["oldest_call"], "bad" if stage["long_call"] else ""), 6),
    Column("queued", _cell(cells.time, "queue_wait", "p50"), 15),
    Column("queued95", _cell(cells.time, "queue_wait", "p95"), 17),
    Column("eta", _cell(cells.time, "eta"), 10, kept=_TIME),
)

#: The meaning of the stages' columns, for the help.
STAGE_LEGEND = (
    ("workers", "ready, and wanted"),
    ("running", "calls that run now"),
    ("waiting", "messages that nobody has received"),
    ("in flight", "messages received and not done, of all machines"),
    ("dead", "dead letters"),
    ("done failed", "calls since the run began; a call that failed may be tried again"),
    ("done/s", "calls per second, of the last 3 seconds; failed/s and retried/s likewise"),
    ("busy", "share of the workers' time in calls; * marks the bottleneck, which the others wait for"),
    ("cpu", "CPUs in use: 100% is one"),
    ("p50 p95", "run time of half the calls, and of 95% of them, since the run began"),
    ("longest", "age of the oldest call that runs now"),
    ("queued", "time in the queue of half the messages that were received, since the run began"),
    ("queued95", "the same of 95% of them"),
    ("eta", "time until the waiting messages are done, at the pace of the last minute"),
)

# -- workers ----------------------------------------------------------------------------------------------------------


def _state(worker: Values) -> Cell:
    tone = {"none": "warn", "booting": "warn", "idle": "dim", "resting": "dim", "ended": "dim"}
    return cells.text(worker["state"], tone.get(worker["state"], ""))


def _fraction(worker: Values) -> Cell:
    call = oldest(worker)
    return cells.share(call["fraction"]) if call is not None and call["fraction"] is not None else Cell("")


def _call(worker: Values) -> Cell:
    call = oldest(worker)
    if call is None:
        return Cell("")
    others = len(worker["calls"]) - 1
    return Cell(f"{cells.text(call['id'][:SHOWN_ID]).text}{f' +{others}' if others else ''}")


def _telling(worker: Values) -> Cell:
    call = oldest(worker)
    return cells.text(call["text"]) if call is not None else Cell("")


def _age(worker: Values) -> Cell:
    return cells.time(worker["call_age"], "bad" if worker["long_call"] else "")


WORKERS = (
    Column("worker", lambda worker: cells.text(worker_name(worker)), 0, least=12, tail=5),
    Column("pid", lambda worker: Cell(str(worker["pid"] or "-")), 5),
    Column("state", _state, 1, least=7),
    Column("for", _age, 2, kept=_TIME),
    Column("call%", _fraction, 3),
    Column("memory", _cell(cells.memory, "memory"), 6),
    Column("cpu", _cell(cells.share, "cpu"), 7, kept=_CPU),
    Column("done", _cell(cells.number, "done"), 9),
    Column("restarts", _cell(cells.number, "restarts"), 8),
    Column("message", _call, 4, least=SHOWN_ID, tail=5),
    Column("progress", _telling, 10, least=8),
)

#: The meaning of the workers' columns and states, for the help.
WORKER_LEGEND = (
    ("worker", "its stage, and its number there"),
    ("state", "busy: in a call. idle: waits for a message. resting: waits for its turn, or for a smaller backlog"),
    ("", "booting: prepares itself. leaving: ends when its message is done. none: is about to be started"),
    ("for", "time that its oldest call runs"),
    ("call%", "how far that call is, where its function tells so (current_message().progress)"),
    ("message", "beginning of the id of that call's message, for cancel; +1: beside it another call runs"),
    ("progress", "the text that its function tells"),
    ("done", "messages that it and those before it in its place have done"),
    ("restarts", "workers that were in its place before, those that an order has ended included"),
    ("memory cpu", "its own; 100% is one CPU"),
)
