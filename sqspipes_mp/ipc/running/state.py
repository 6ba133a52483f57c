"""An engine's state as one JSON object: ``top --json``, ``ps --json`` and ``/api/state`` (any process).

``STATE`` is the number of its format. Keys may be added to a format; one that goes, or changes its meaning, makes a new
one. Times are seconds, ages count back from now, a value that is not known is null.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.host.memory import memory_of
from sqspipes_mp.host.process_cpu import cpu_of, cpu_of_machine
from sqspipes_mp.ipc.histogram import percentile
from sqspipes_mp.ipc.running.fixed import ENDING, NOT_READY
from sqspipes_mp.ipc.running.health import verdict
from sqspipes_mp.ipc.running.notes import long_call, notes
from sqspipes_mp.ipc.running.notes import verdict as told_verdict
from sqspipes_mp.ipc.statistics import (
    BUSY_NS,
    CALL_STARTED,
    CANCELLED,
    CONTINUED,
    CPU_NS,
    DEAD,
    DEAD_LETTERS,
    DONE,
    EMPTY_RECEIVES,
    ERROR_KINDS,
    ERRORS,
    EXPECTED,
    FAILED,
    FAILED_LATE,
    FINISHED,
    INCARNATION,
    KEEPER_BEAT,
    KEEPER_CANCELLED,
    KEEPER_CHARGED,
    KEEPER_DEAD,
    KEEPER_DONE,
    KEEPER_FAILED,
    KEEPER_LEASES_LOST,
    KILLED_REASONS,
    LAST_RECEIVE,
    LEASES_LOST,
    OPERATIONS,
    OUTPUTS_DROPPED,
    PAUSED,
    PID,
    QUEUE_STATES,
    QUEUE_WAITS,
    REJECTED,
    REQUESTS,
    RESTART_REASONS,
    RESTARTS,
    RESTS,
    RETRIED,
    RUN_TIMES,
    RUNNING,
    S_BOOTING,
    S_DRAINING,
    SEAT,
    SENT,
    STAGE,
    STARTED,
    STATE,
    SUPERVISOR_BEAT,
    TRANSPORT,
    TRANSPORTS,
    WAITING,
    WANTED,
    SlotField,
    StageField,
    Statistics,
)

#: Number of the format.
FORMAT = 1
#: Levels of priority that a stage may have.
_PRIORITIES = 16


def state(
    statistics: Statistics,
    *,
    here: bool = True,
    since: Mapping[str, Any] | None = None,
    steady: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the engine's state now.

    Args:
        statistics: the engine's.
        here: whether the engine's pids mean its processes in this process's pid namespace.
        since: an earlier state of the same run; rates and shares are those since then. None: they are null.
        steady: a state before it (``at``, and its stages' ``name`` and ``done``), from which the pace of ``eta`` is
            made; None: ``since``.
    """
    return _Reader(statistics, here=here).read(since, steady)


def ended(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the last state of an engine that has ended: its counts, without anything that would pass for now."""
    unknown = dict.fromkeys(("eta", "busy", "cpu", "oldest_call"))
    no_rates = dict.fromkeys(("done", "failed", "retried", "dead_lettered"))
    gone: dict[str, Any] = {"state": "ended", "call_age": None, "calls": [], "memory": None, "cpu": None}
    stages = [
        {**stage, **unknown, "running": 0, "ready": 0, "per_second": no_rates, "bottleneck": False, "long_call": False}
        for stage in found["stages"]
    ]
    return {**found, "stages": stages, "workers": [{**worker, **gone} for worker in found["workers"]], "notes": []}


class _Reader:
    def __init__(self, statistics: Statistics, *, here: bool) -> None:
        self._statistics = statistics
        self._here = here
        self._now = time.monotonic_ns()
        self._about: dict[str, Any] = json.loads(statistics.about or "{}")
        slots: dict[int, list[int]] = {}
        for slot in range(statistics.shape.slots):
            if stage := statistics.get(slot, STAGE):
                slots.setdefault(stage - 1, []).append(slot)
        #: The slots of each stage that runs here.
        self._slots = slots

    def read(self, since: Mapping[str, Any] | None, steady: Mapping[str, Any] | None = None) -> dict[str, Any]:
        stages = [self._stage(index) for index in self._selected()]
        found = {
            "format": FORMAT,
            "at": time.time(),
            "engine": self._engine(),
            "machine": self._machine(),
            "broker": self._broker(),
            "stages": stages,
            "workers": [
                self._worker(index, slot)
                for index in self._selected()
                for slot in self._slots[index]
                if self._lives(slot)
            ],
        }
        _add_rates(found, since)
        _add_etas(found, steady or since)
        add_notes(found)
        return found

    def _selected(self) -> list[int]:
        return sorted(self._slots)

    def _names(self) -> Sequence[str]:
        return list(self._about.get("stages", ()))

    def _name(self, index: int) -> str:
        names = self._names()
        return names[index] if index < len(names) else str(index)

    def _ago(self, then: int) -> float | None:
        """Return the seconds since a moment, monotonic nanoseconds; None where there was none."""
        return max(0.0, (self._now - then) / 1e9) if then else None

    def _engine(self) -> dict[str, Any]:
        about, statistics = self._about, self._statistics
        judged = verdict(statistics.fixed_words, self._now, self._names())
        keys = ("run", "pid", "caller", "domain", "broker", "target", "folder", "version", "python", "began")
        return {
            **{key: about.get(key) for key in keys},
            "transport": self._transport(),
            "up": self._ago(about.get("began_ns", 0)),
            "live": judged.live,
            "ready": judged.ready,
            "why": judged.why,
            "ending": judged.why == NOT_READY[ENDING],
            "supervisor_beat": self._ago(statistics.header(SUPERVISOR_BEAT)),
            "keeper_beat": self._ago(statistics.header(KEEPER_BEAT)),
        }

    def _transport(self) -> str | None:
        """Return the way of the requests, "boto3" where any process has fallen back to it; None: there is one only."""
        used = max(self._statistics.get(slot, TRANSPORT) for slot in range(self._statistics.shape.slots + 1))
        return TRANSPORTS[used - 1] if 0 < used <= len(TRANSPORTS) else None

    def _machine(self) -> dict[str, Any] | None:
        """Return this machine's CPUs, and the CPU seconds since its start; None where the engine runs elsewhere."""
        used, possible = (cpu_of_machine() if self._here else None) or (None, None)
        return {"cpus": cpus(), "cpu_seconds": used, "cpu_seconds_possible": possible} if self._here else None

    def _broker(self) -> dict[str, Any]:
        slots = range(self._statistics.shape.slots + 1)
        get = self._statistics.get
        errors = [
            {"operation": operation, "kind": kind, "count": count}
            for place, operation in enumerate(OPERATIONS)
            for number, kind in enumerate(ERROR_KINDS)
            if (count := sum(get(slot, ERRORS, place * len(ERROR_KINDS) + number) for slot in slots))
        ]
        return {
            "requests": {
                operation: sum(get(slot, REQUESTS, place) for slot in slots)
                for place, operation in enumerate(OPERATIONS)
            },
            "errors": errors,
            "empty_receives": sum(get(slot, EMPTY_RECEIVES) for slot in slots),
        }

    # -- stages -------------------------------------------------------------------------------------------------

    def _stage(self, index: int) -> dict[str, Any]:
        slots, stage = self._slots[index], self._statistics.stage
        run_times = self._statistics.histogram(slots, RUN_TIMES)
        waits = self._statistics.histogram(slots, QUEUE_WAITS)
        waiting, dead_letters = stage(index, WAITING), stage(index, DEAD_LETTERS)
        failures = self._failures(index, slots)
        threads = self._about.get("threads", ())
        return {
            "name": self._name(index),
            "paused": bool(stage(index, PAUSED)),
            "wanted": stage(index, WANTED),
            "ready": sum(self._state_of(slot) in {"idle", "busy", "resting"} for slot in slots),
            "threads": threads[index] if index < len(threads) else 1,
            "running": sum(self._running(slot) for slot in slots),
            "oldest_call": max((age for slot in slots if (age := self._call_age(slot)) is not None), default=None),
            "waiting": waiting - 1 if waiting else None,
            "queues": self._queues(index),
            "dead_letters": dead_letters - 1 if dead_letters else None,
            "done": self._total(slots, DONE) + stage(index, KEEPER_DONE),
            "retried": self._total(slots, RETRIED) + stage(index, KEEPER_CHARGED),
            "dead_lettered": self._total(slots, DEAD) + stage(index, KEEPER_DEAD),
            "continued": self._total(slots, CONTINUED),
            "cancelled": self._total(slots, CANCELLED) + stage(index, KEEPER_CANCELLED),
            "failed": sum(failures.values()),
            "failures": failures,
            "sent": self._total(slots, SENT),
            "dropped": self._total(slots, OUTPUTS_DROPPED),
            "restarts": {
                reason: stage(index, StageField(RESTARTS + place)) for place, reason in enumerate(RESTART_REASONS)
            },
            "leases_lost": self._total(slots, LEASES_LOST) + stage(index, KEEPER_LEASES_LOST),
            "busy_seconds": self._total(slots, BUSY_NS) / 1e9 + sum(self._call_age(slot) or 0.0 for slot in slots),
            "cpu_seconds": sum(self._cpu(slot) for slot in slots),
            "run_time": {"p50": percentile(run_times, 0.5), "p95": percentile(run_times, 0.95)},
            "queue_wait": {"p50": percentile(waits, 0.5), "p95": percentile(waits, 0.95)},
            "last_receive": self._ago(max(self._statistics.get(slot, LAST_RECEIVE) for slot in slots)),
        }

    def _total(self, slots: Sequence[int], field: SlotField) -> int:
        return sum(self._statistics.get(slot, field) for slot in slots)

    def _failures(self, index: int, slots: Sequence[int]) -> dict[str, int]:
        """Return the failed calls by reason; each call has one."""
        late, rejected = self._total(slots, FAILED_LATE), self._total(slots, REJECTED)
        killed = {
            reason: self._statistics.stage(index, StageField(KEEPER_FAILED + place))
            for place, reason in enumerate(KILLED_REASONS)
        }
        raised = max(0, self._total(slots, FAILED) - late - rejected)
        return {**killed, "exception": raised, "rejected": rejected, "timeout": killed["timeout"] + late}

    def _queues(self, index: int) -> list[dict[str, Any]]:
        """Return the counts of a stage's input queues by priority; empty where nobody counts them."""
        found = []
        for priority in range(_PRIORITIES):
            counts = [self._statistics.queue_count(index, priority, place) for place in range(len(QUEUE_STATES))]
            if any(count is not None for count in counts):
                found.append({"priority": priority, **dict(zip(QUEUE_STATES, counts, strict=True))})
        return found

    # -- workers ------------------------------------------------------------------------------------------------

    def _running(self, slot: int) -> int:
        return max(1, self._statistics.get(slot, RUNNING)) if self._statistics.get(slot, CALL_STARTED) else 0

    def _call_age(self, slot: int) -> float | None:
        return self._ago(self._statistics.get(slot, CALL_STARTED))

    def _cpu(self, slot: int) -> float:
        return self._statistics.get(slot, CPU_NS) / 1e9

    def _state_of(self, slot: int) -> str:
        """Return the state of a slot in one word."""
        get = self._statistics.get
        if not get(slot, PID):
            return "none"
        if get(slot, FINISHED):
            return "ended"
        said = get(slot, STATE)
        if said == S_BOOTING:
            return "booting"
        if said == S_DRAINING:
            return "leaving"
        if get(slot, CALL_STARTED):
            return "busy"
        return "resting" if get(slot, RESTS) else "idle"

    def _lives(self, slot: int) -> bool:
        """Tell whether a slot is to have a worker, or still has one."""
        return bool(self._statistics.get(slot, EXPECTED) or self._statistics.get(slot, PID))

    def _worker(self, index: int, slot: int) -> dict[str, Any]:
        get = self._statistics.get
        pid = get(slot, PID)
        calls = self._statistics.calls(slot) if get(slot, CALL_STARTED) else []
        return {
            "stage": self._name(index),
            "worker": get(slot, SEAT),
            "pid": pid,
            "state": self._state_of(slot),
            "up": self._ago(get(slot, STARTED)),
            "restarts": max(0, get(slot, INCARNATION) - 1),
            "done": get(slot, DONE),
            "call_age": self._call_age(slot),
            "calls": [
                {"id": call.hop, "age": self._ago(call.started), "fraction": call.fraction, "text": call.text}
                for call in calls
            ],
            "memory": (memory_of(pid) or None) if self._here and pid else None,
            "cpu_seconds": self._cpu(slot),
            # Of the present process alone, and up to date.
            "process_cpu_seconds": cpu_of(pid) / 1e9 if self._here and pid else None,
        }


# -- rates ------------------------------------------------------------------------------------------------------------


def _add_rates(found: dict[str, Any], since: Mapping[str, Any] | None) -> None:
    """Add rates and shares since an earlier state of the same run, and the bottleneck; null without one."""
    seconds = 0.0
    if since is not None and since["engine"]["run"] == found["engine"]["run"]:
        seconds = found["at"] - since["at"]
    before = {stage["name"]: stage for stage in since["stages"]} if since is not None and seconds > 0 else {}
    workers = {(one["stage"], one["worker"]): one for one in since["workers"]} if since is not None else {}
    for stage in found["stages"]:
        old = before.get(stage["name"])
        room = max(1, stage["wanted"]) * stage["threads"]
        stage["per_second"] = {
            key: _per_second(stage, old, key, seconds) for key in ("done", "failed", "retried", "dead_lettered")
        }
        busy = _per_second(stage, old, "busy_seconds", seconds)
        stage["busy"] = None if busy is None else min(1.0, max(0.0, busy / room))
        mine = [one for one in found["workers"] if one["stage"] == stage["name"]]
        used = [_cpu_share(one, workers.get((one["stage"], one["worker"])), seconds) for one in mine]
        known = [share for share in used if share is not None]
        stage["cpu"] = sum(known) if known else None
        for one, share in zip(mine, used, strict=True):
            one["cpu"] = share
    _add_machine(found, since if seconds > 0 else None)
    _mark_bottleneck(found["stages"])


def _add_etas(found: Mapping[str, Any], steady: Mapping[str, Any] | None) -> None:
    """Add the seconds until the waiting messages are done, at the pace since an earlier state; null: not known."""
    seconds = found["at"] - steady["at"] if steady is not None else 0.0
    before = {stage["name"]: stage for stage in steady["stages"]} if steady is not None else {}
    for stage in found["stages"]:
        rate = _per_second(stage, before.get(stage["name"]), "done", seconds)
        goes_on = rate and not stage["paused"] and not found["engine"]["ending"]
        stage["eta"] = stage["waiting"] / rate if goes_on and stage["waiting"] is not None else None


def _add_machine(found: Mapping[str, Any], since: Mapping[str, Any] | None) -> None:
    """Add the share of this machine's CPU time, or of the engine's quota, that is in use; null: not known."""
    machine, old = found["machine"], since["machine"] if since is not None else None
    if machine is None:
        return
    machine["busy"] = None
    if old is not None and old["cpu_seconds"] is not None and machine["cpu_seconds"] is not None:
        used, possible = (machine[key] - old[key] for key in ("cpu_seconds", "cpu_seconds_possible"))
        own = sum(stage["cpu"] or 0.0 for stage in found["stages"]) / machine["cpus"]
        machine["busy"] = min(1.0, max(own, used / possible if possible > 0 else 0.0))


def add_notes(found: dict[str, Any]) -> None:
    """Add the notes on a state, and the verdict that names the troubles among them."""
    for stage in found["stages"]:
        stage["long_call"] = long_call(stage, stage["oldest_call"])
        for worker in found["workers"]:
            if worker["stage"] == stage["name"]:
                worker["long_call"] = long_call(stage, worker["call_age"])
    found["notes"] = notes(found)
    found["verdict"] = told_verdict(found, found["notes"])


def _per_second(stage: Mapping[str, Any], old: Mapping[str, Any] | None, key: str, seconds: float) -> float | None:
    return None if old is None or seconds <= 0 else (stage[key] - old[key]) / seconds


def _cpu_share(one: Mapping[str, Any], old: Mapping[str, Any] | None, seconds: float) -> float | None:
    """Return the CPUs that a worker used since an earlier state; None where it is another process, or not known."""
    if old is None or seconds <= 0 or one["pid"] != old["pid"]:
        return None
    new, before = one["process_cpu_seconds"], old["process_cpu_seconds"]
    return None if new is None or before is None else max(0.0, (new - before) / seconds)


def _mark_bottleneck(stages: list[dict[str, Any]]) -> None:
    """Mark the busiest of the stages that work is waiting for, where it is busy most of the time.

    A stage whose waiting messages are not counted, a source say, is marked only where none of the others is. While a
    paused stage has messages waiting, all is held up by the pause, and none is marked.
    """
    for stage in stages:
        stage["bottleneck"] = False
    if any(stage["paused"] and stage["waiting"] for stage in stages):
        return
    busy = [
        stage for stage in stages if not stage["paused"] and (stage["busy"] or 0.0) >= 0.5 and stage["waiting"] != 0
    ]
    if busy:
        max(busy, key=lambda stage: (stage["waiting"] is not None, stage["busy"]))["bottleneck"] = True
