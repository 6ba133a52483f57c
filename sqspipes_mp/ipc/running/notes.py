"""Sentences on what a person should see first, each with its cure: for ``top``, its plain text and the page. Pure.

Any process. A note has only what is in the state that it is made of: without ids in it, none are in its notes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqspipes_mp.ipc.running.units import counted, short_time

Values = Mapping[str, Any]

#: Seconds from which a call is long, and this many times the stage's 95th percentile of run times.
LONG_CALL, LONG_CALL_TIMES = 30.0, 5
#: Busy share from which a stage is short of workers.
_SHORT = 0.8
#: Share of the machine's CPU time from which no CPU is free.
_FULL = 0.9
#: CPUs per worker that is in a call from which a stage computes, and below which it waits for something.
_COMPUTES, _WAITS = 0.5, 0.2
#: Troubles that the verdict names.
_NAMED = 3


def notes(state: Values) -> list[dict[str, Any]]:
    """Return a state's notes, the gravest first.

    ``tone`` is "bad", "warn" or "". ``told`` is the sentence, ``brief`` a few words of it; empty: it is no trouble.
    ``keys`` is the cure by keys of ``top``, ``command`` the one in a shell, ``advice`` a word on either, or a cure that
    is neither; each is empty where there is none. ``stage`` and ``worker`` (a number, or None) name the row, and
    ``on_row`` tells whether the keys need it chosen.
    """
    found: list[dict[str, Any]] = []
    for judge in (_long_calls, _deaths, _failures, _paused, _bottleneck):
        for stage in state["stages"]:
            found += judge(state, stage)
    return found


def sentence(note: Values, *, keys: bool) -> str:
    """Return a note with its cure; ``keys``: whether that may be a key of ``top``."""
    cure = " ".join(filter(None, ((keys and note["keys"]) or note["command"], note["advice"])))
    return f"{note['told']}: {cure}" if cure else str(note["told"])


def verdict(state: Values, found: Sequence[Values]) -> dict[str, str]:
    """Return the engine's health in one line (``told``) with its ``tone``: "good", "warn" or "bad"."""
    engine = state["engine"]
    if not engine["live"]:
        return {"tone": "bad", "told": f"NOT LIVE: {engine['why']}"}
    if not engine["ready"]:
        return {"tone": "warn", "told": str(engine["why"])}
    troubles = [note for note in found if note["brief"]]
    if not troubles:
        return {"tone": "good", "told": str(engine["why"])}
    more = f"; and {len(troubles) - _NAMED} more" if len(troubles) > _NAMED else ""
    told = f"{engine['why']}, but {'; '.join(note['brief'] for note in troubles[:_NAMED])}{more}"
    return {"tone": "bad" if any(note["tone"] == "bad" for note in troubles) else "warn", "told": told}


def long_call(stage: Values, age: float | None) -> bool:
    """Tell whether a call of a stage, of this age in seconds, runs far longer than its calls do; None: none runs."""
    return age is not None and age > max(LONG_CALL, LONG_CALL_TIMES * (stage["run_time"]["p95"] or 0.0))


def worker_name(worker: Values) -> str:
    """Return a worker's name for people: its stage, and its number there."""
    return f"{worker['stage']}[{worker['worker']}]"


def _note(
    tone: str,
    stage: Values,
    told: str,
    *,
    brief: str = "",
    keys: str = "",
    command: str = "",
    advice: str = "",
    worker: int | None = None,
    on_row: bool = False,
) -> dict[str, Any]:
    return {
        "tone": tone, "stage": stage["name"], "worker": worker, "told": told, "brief": brief, "keys": keys,
        "command": command, "advice": advice, "on_row": on_row,
    }  # fmt: skip


def _long_calls(state: Values, stage: Values) -> Iterator[dict[str, Any]]:
    late = [each for each in state["workers"] if each["stage"] == stage["name"] and long_call(stage, each["call_age"])]
    late.sort(key=lambda each: -each["call_age"])
    if not late:
        return
    name, age, usual = worker_name(late[0]), short_time(late[0]["call_age"]), stage["run_time"]["p95"]
    beside = "" if usual is None else f", where 95% take less than {short_time(usual)}"
    more = f" (and {counted(len(late) - 1, 'more worker')})" if len(late) > 1 else ""
    yield _note(
        "bad",
        stage,
        f"{name}: a call runs for {age}{beside}{more}",
        brief=f"a call of {name} runs for {age}",
        keys="s shows where it is, c cancels it",
        command=f"sqspipes-mp stack {_target(state)} --stage {stage['name']} --worker {late[0]['worker']}",
        worker=late[0]["worker"],
        on_row=True,
    )


def _deaths(_state: Values, stage: Values) -> Iterator[dict[str, Any]]:
    died = {reason: count for reason, count in stage["restarts"].items() if count and reason != "max_tasks"}
    if died:
        replaced = f"{counted(sum(died.values()), 'worker')} had to be replaced"
        told = f"{stage['name']}: {replaced} ({_listed(died)}): the log says why"
        yield _note("bad", stage, told, brief=f"{stage['name']}: {replaced}")


def _failures(state: Values, stage: Values) -> Iterator[dict[str, Any]]:
    dead = max(stage["dead_letters"] or 0, stage["dead_lettered"])
    told = []
    if stage["failed"]:
        reasons = _listed(stage["failures"])
        again = f", {stage['retried']:,} were tried again" if stage["retried"] else ""
        told.append(
            f"{stage['failed']:,} of {counted(stage['failed'] + stage['done'], 'call')} failed ({reasons}){again}"
        )
    if stage["cancelled"]:
        told.append(f"{counted(stage['cancelled'], 'call')} cancelled")
    if dead:
        told.append(counted(dead, "dead letter"))
    if not told:
        return
    why = f"{stage['name']}: {'; '.join(told)}"
    if not dead:
        yield _note("bad", stage, f"{why}: the log says why", brief=f"{stage['name']}: {told[0]}")
        return
    command = f"{_cd(state)}sqspipes-mp dead list {_module(state)} --stage {stage['name']}"
    unknown = "" if state["engine"].get("target") else " (MODULE:ENGINE: words:engine for engine in words.py)"
    advice = f"tells why{unknown}; once mended, dead redrive"
    yield _note("bad", stage, why, brief=f"{stage['name']}: {told[-1]}", command=command, advice=advice)


def _paused(state: Values, stage: Values) -> Iterator[dict[str, Any]]:
    if stage["paused"]:
        yield _note(
            "warn",
            stage,
            f"{stage['name']} is paused{_wait(stage)}",
            brief=f"{stage['name']} is paused",
            keys="p has it go on",
            command=f"sqspipes-mp resume {_target(state)} --stage {stage['name']}",
            on_row=True,
        )


def _bottleneck(state: Values, stage: Values) -> Iterator[dict[str, Any]]:
    if not stage["bottleneck"] or stage["busy"] < _SHORT:
        return
    alone, name, busy = len(state["stages"]) == 1, stage["name"], f"{stage['busy']:.0%} busy"
    if not stage["waiting"]:
        # More of a generator there cannot be, and a queue that is empty needs no more workers.
        if not alone:
            yield _note("", stage, f"{name} is the bottleneck ({busy}): the other stages wait for it")
        return
    told = f"{name} is {busy}{_wait(stage)}" if alone else f"{name} is the bottleneck ({busy}{_wait(stage)})"
    more, advice = _more_workers(state, stage)
    key = "+ gives it a worker" if more else ""
    command = f"sqspipes-mp scale {_target(state)} {name}={stage['wanted'] + 1}" if more else ""
    yield _note("warn", stage, told, keys=key, command=command, advice=advice, on_row=more)


def _more_workers(state: Values, stage: Values) -> tuple[bool, str]:
    """Tell whether a worker more may help a stage that is short of them, and a word on that."""
    machine: Values = state.get("machine") or {}
    cpus, full = machine.get("cpus") or math.inf, (machine.get("busy") or 0.0) >= _FULL
    share = (stage["cpu"] or 0.0) / max(0.01, stage["busy"] * stage["wanted"])
    if full and (share >= _WAITS or stage["wanted"] >= cpus):
        return False, "no CPU is free: more machines, or less work per call"
    if stage["wanted"] >= cpus and share >= _COMPUTES:
        return False, f"it has a worker per CPU ({cpus}): more machines, or less work per call"
    # Calls that wait for CPU time look like calls that wait for something else.
    return True, "(if its calls wait for something: no CPU is free)" if full else ""


def _wait(stage: Values) -> str:
    return f", {stage['waiting']:,} wait" if stage["waiting"] else ""


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if count)


def _target(state: Values) -> str:
    """Return the engine's TARGET."""
    return str(state["engine"].get("url") or state["engine"]["domain"])


def _module(state: Values) -> str:
    return str(state["engine"].get("target") or "MODULE:ENGINE")


def _cd(state: Values) -> str:
    """Return the way to the folder in which the engine's module is found; empty: it is not known."""
    folder = state["engine"].get("folder")
    return f"cd {shlex.quote(str(folder))} && " if folder else ""
