"""Sentences on what a person should see first, each with the cure. Pure (the command line's process)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqspipes_mp.cli.top.cells import long_time, short_time
from sqspipes_mp.cli.top.columns import long_call, worker_name
from sqspipes_mp.messages.plain import one_line

Values = Mapping[str, Any]

#: Busy share from which a stage is short of workers.
_SHORT = 0.8


def notes(state: Values, *, keys: bool) -> list[tuple[str, str]]:
    """Return (tone, sentence) pairs on a state, the gravest first; ``keys``: whether a cure may be a key of ``top``."""
    found: list[tuple[str, str]] = []
    for judge in (_long_calls, _deaths, _failures, _paused, _bottleneck):
        for stage in state["stages"]:
            found += judge(state, stage, keys)
    return found


def _long_calls(state: Values, stage: Values, keys: bool) -> Iterator[tuple[str, str]]:
    if not long_call(stage):
        return
    limit = max(30.0, stage["oldest_call"] / 2)
    late: Sequence[Values] = sorted(
        (one for one in state["workers"] if one["stage"] == stage["name"] and (one["call_age"] or 0.0) > limit),
        key=lambda one: -one["call_age"],
    )
    if not late:
        return
    usual = stage["run_time"]["p95"]
    beside = "" if usual is None else f", where 95% take less than {short_time(usual)}"
    more = f" (and {len(late) - 1} more workers)" if len(late) > 1 else ""
    cure = (
        "s shows where it is, c cancels it"
        if keys
        else f"sqspipes-mp stack {_target(state)} --stage {stage['name']} --worker {late[0]['worker']}"
    )
    yield "bad", f"{worker_name(late[0])}: a call runs for {long_time(late[0]['call_age'])}{beside}{more}: {cure}"


def _deaths(_state: Values, stage: Values, _keys: bool) -> Iterator[tuple[str, str]]:
    died = {reason: count for reason, count in stage["restarts"].items() if count and reason != "max_tasks"}
    if died:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in died.items())
        yield "bad", f"{stage['name']}: {sum(died.values()):,} workers had to be replaced ({reasons}): the log says why"


def _failures(state: Values, stage: Values, _keys: bool) -> Iterator[tuple[str, str]]:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in stage["failures"].items() if count)
    dead = max(stage["dead_letters"] or 0, stage["dead_lettered"])
    told = []
    if stage["failed"]:
        again = f", {stage['retried']:,} were tried again" if stage["retried"] else ""
        told.append(f"{stage['failed']:,} of {stage['failed'] + stage['done']:,} calls failed ({reasons}){again}")
    if dead:
        target = one_line(state["engine"]["target"] or "MODULE:ENGINE")
        told.append(
            f"{dead:,} dead letter{'s' if dead > 1 else ''}: sqspipes-mp dead list {target} --stage {stage['name']}"
        )
    if told:
        yield "bad", f"{stage['name']}: {'; '.join(told)}{'' if dead else ': the log says why'}"


def _paused(state: Values, stage: Values, keys: bool) -> Iterator[tuple[str, str]]:
    if stage["paused"]:
        cure = "p has it go on" if keys else f"sqspipes-mp resume {_target(state)} --stage {stage['name']}"
        yield "warn", f"{stage['name']} is paused: {cure}"


def _bottleneck(state: Values, stage: Values, keys: bool) -> Iterator[tuple[str, str]]:
    if not stage["bottleneck"] or stage["busy"] < _SHORT:
        return
    if not stage["waiting"]:
        # More of a generator there cannot be, and a queue that is empty needs no more workers.
        yield "", f"{stage['name']} is the bottleneck ({stage['busy']:.0%} busy): the other stages wait for it"
        return
    cure = (
        "+ gives it a worker" if keys else f"sqspipes-mp scale {_target(state)} {stage['name']}={stage['wanted'] + 1}"
    )
    yield "warn", f"{stage['name']} is the bottleneck ({stage['busy']:.0%} busy, {stage['waiting']:,} wait): {cure}"


def _target(state: Values) -> str:
    """Return the engine's TARGET."""
    return one_line(state["engine"].get("url") or state["engine"]["domain"])
