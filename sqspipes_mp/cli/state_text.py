"""An engine's state as plain text, from 60 columns on. Pure (the command line's process)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqspipes_mp.cli.console import table
from sqspipes_mp.ipc.histogram import duration

_KIB = 1024
#: Characters of a message's id that are shown; ``top --json`` has all.
_ID = 12


def state_text(state: Mapping[str, Any]) -> str:
    """Return a state, with the rates since an earlier one, as text: the engine, its stages, its workers."""
    engine = state["engine"]
    head = (
        f"{engine['domain']} on {engine['broker']}\n"
        f"pid {engine['pid']}, up {long_time(engine['up'])}: {'' if engine['live'] else 'NOT LIVE, '}{engine['why']}"
    )
    return "\n\n".join([head, _stages(state["stages"]), _workers(state["workers"])])


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    columns = (
        "stage", "workers", "running", "waiting", "done", "done/s", "failed", "dead", "busy", "cpu", "p50", "p95",
        "waited", "eta",
    )  # fmt: skip
    rows = [
        (
            f"{stage['name']}{' *' if stage['bottleneck'] else ''}{' (paused)' if stage['paused'] else ''}",
            f"{stage['ready']}/{stage['wanted']}",
            stage["running"],
            _or_dash(stage["waiting"]),
            stage["done"],
            _rate(stage["per_second"]["done"]),
            stage["failed"],
            stage["dead_lettered"],
            _share(stage["busy"]),
            _share(stage["cpu"]),
            duration(stage["run_time"]["p50"]),
            duration(stage["run_time"]["p95"]),
            duration(stage["queue_wait"]["p50"]),
            long_time(stage["eta"]),
        )
        for stage in stages
    ]
    mark = "\n* the bottleneck" if any(stage["bottleneck"] for stage in stages) else ""
    return f"{table(columns, rows)}{mark}"


def _workers(workers: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{worker['stage']}[{worker['worker']}]",
            str(worker["pid"] or "-"),
            worker["state"],
            long_time(worker["call_age"]),
            _memory(worker["memory"]),
            _share(worker["cpu"]),
            worker["restarts"],
            _calls(worker["calls"]),
        )
        for worker in workers
    ]
    lines = table(("worker", "pid", "state", "for", "memory", "cpu", "restarts", ""), rows).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Return the oldest running call, and how many run beside it."""
    if not calls:
        return ""
    call = max(calls, key=lambda each: each["age"])
    told = [f"{call['fraction']:.0%}"] if call["fraction"] is not None else []
    told += [printable(call["text"])] if call["text"] else []
    more = [f"and {len(calls) - 1} more"] if len(calls) > 1 else []
    return ", ".join([" ".join([printable(call["id"])[:_ID], *told]), *more])


def printable(text: str) -> str:
    """Return a text without characters that would steer a terminal; it may come from a queue."""
    return "".join(char if char.isprintable() else " " for char in text)


def long_time(seconds: float | None) -> str:
    """Return a time in seconds in its two largest units; None: a dash."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _memory(size: int | None) -> str:
    return "-" if size is None else f"{size / _KIB / _KIB:,.0f} MB"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.1f}"


def _or_dash(value: object) -> object:
    return "-" if value is None else value
