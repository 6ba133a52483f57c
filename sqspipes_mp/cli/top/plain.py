"""An engine's state as plain text, from 60 columns on. Pure (the command line's process)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from sqspipes_mp.cli.top.cells import cut, share
from sqspipes_mp.cli.top.columns import STAGES, WORKERS, Column, Fit, in_order
from sqspipes_mp.ipc.running.notes import sentence
from sqspipes_mp.ipc.running.units import counted, short_time
from sqspipes_mp.messages.plain import one_line

#: Most characters of a sentence.
_MOST = 1000


def head_lines(state: Mapping[str, Any]) -> list[str]:
    """Return the engine in three lines: the run, its process and machine, and its health."""
    engine, machine = state["engine"], state.get("machine")
    busy = "" if machine is None else f", {counted(machine['cpus'], 'CPU')} {share(machine['busy']).text} busy"
    return [
        one_line(f"{engine['domain']} on {engine['broker']}"),
        one_line(f"pid {engine['pid'] or '-'}, up {short_time(engine['up'] or 0.0)}{busy}"),
        one_line(state["verdict"]["told"], _MOST),
    ]


def state_text(state: Mapping[str, Any], width: int, height: int = 0) -> str:
    """Return a state, with the rates since an earlier one, as text: the engine, its stages, its workers, the notes.

    Args:
        state: of ``ipc/running/state.py``.
        width: columns of the terminal.
        height: its lines, into which the workers are cut; 0: all of them.
    """
    head = "\n".join(cut(line, width) for line in head_lines(state))
    stages = _table(STAGES, state["stages"], width)
    sentences = (one_line(sentence(note, keys=False), _MOST) for note in state["notes"])
    told = "\n".join(fill(each, width, subsequent_indent="  ", break_on_hyphens=False) for each in sentences)
    mark = "* the bottleneck" if any(stage["bottleneck"] for stage in state["stages"]) else ""
    above = [head, "\n".join(filter(None, [stages, mark])), *filter(None, [told])]
    workers = in_order(state["workers"])
    room = height - sum(part.count("\n") + 2 for part in above) - 3
    left = len(workers) - max(1, room) if height else 0
    if left > 0:
        workers = workers[:-left]
    more = f"\n{left} more workers" if left > 0 else ""
    return "\n\n".join([*above, f"{_table(WORKERS, workers, width)}{more}"])


def _table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], width: int) -> str:
    gap = 2 if width >= 100 else 1
    placed = Fit(columns).place(rows, width, gap)
    lines = [[each.pad(each.column.head) for each in placed]]
    lines += [[each.pad(each.column.cell(row).text) for each in placed] for row in rows]
    return "\n".join((" " * gap).join(line).rstrip() for line in lines)
