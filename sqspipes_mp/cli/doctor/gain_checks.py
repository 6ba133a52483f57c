"""Checks of the engine that runs here: each stage's gain from threads, batches, workers or fewer priorities. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqspipes_mp.cli.doctor.facts import Facts
from sqspipes_mp.cli.doctor.findings import Finding, ok, warn
from sqspipes_mp.pipeline.stages import Stage

#: Seconds in the function, and calls, below which figures say little.
_LEAST_BUSY, _LEAST_CALLS = 1.0, 20
#: Share of a CPU in each second of a call below which it waits more than it computes.
_WAITS = 0.25
#: Mean seconds of a call below which the engine's own work for a message weighs as much.
_SHORT = 0.001
#: Share of its time that a stage is in its function from which it is full.
_FULL = 0.9
#: Share of receives that bring nothing from which levels of priority cost more than they order.
_EMPTY = 0.5


def gains(facts: Facts) -> Iterator[Finding]:
    """Tell what each stage would gain, by its figures since the engine began."""
    if facts.state is None:
        return
    advice = []
    for figures in facts.state["stages"]:
        stage = next((one for one in facts.plan.pipeline.stages if one.name == figures["name"]), None)
        if stage is not None and figures["done"] >= _LEAST_CALLS:
            used = cpu_seconds(facts.state, figures)
            advice += [*_threads(stage, figures, used), *_batch(stage, figures), *_workers(stage, figures, facts)]
            advice += _priorities(stage, facts.state) if facts.examined.service == "sqs" else ()
    yield from advice or [ok("stages", "nothing to gain that the running engine's figures show")]


def cpu_seconds(state: Mapping[str, Any], figures: Mapping[str, Any]) -> float:
    """Return the CPU seconds of a stage: as noted, or as its processes have now, whichever is more.

    The supervisor notes them every few seconds, those of workers that have ended included.
    """
    workers = [worker for worker in state["workers"] if worker["stage"] == figures["name"]]
    now = sum(worker["process_cpu_seconds"] or 0.0 for worker in workers)
    return float(max(figures["cpu_seconds"], now))


def _threads(stage: Stage, figures: Mapping[str, Any], used: float) -> Iterator[Finding]:
    busy = figures["busy_seconds"]
    if stage.task.threads > 1 or stage.task.batch or stage.is_source or busy < _LEAST_BUSY or used >= _WAITS * busy:
        return
    # So many calls that only wait fill a CPU.
    threads = min(128, max(2, round(busy / used) if used else 16))
    yield warn(
        "threads",
        f"{stage.name}: its calls compute {used / busy:.0%} of their time, and wait for the rest",
        "a process for each call that waits costs memory, connections and receives",
        f"Task({stage.name}, threads={threads}, workers=1), where its code is thread-safe",
    )


def _batch(stage: Stage, figures: Mapping[str, Any]) -> Iterator[Finding]:
    mean = figures["busy_seconds"] / figures["done"]
    if (
        stage.task.batch
        or stage.task.threads > 1
        or stage.is_source
        or mean >= _SHORT
        or figures["busy_seconds"] < _LEAST_BUSY
    ):
        return
    yield warn(
        "batch",
        f"{stage.name}: a call takes {mean * 1e6:.0f} microseconds",
        "the engine's own work for a message takes as long",
        f"Task({stage.name}, batch=10), which gets a list, or values that hold more work each",
    )


def _workers(stage: Stage, figures: Mapping[str, Any], facts: Facts) -> Iterator[Finding]:
    assert facts.state is not None
    up = facts.state["engine"]["up"] or 0.0
    room = up * max(1, figures["wanted"]) * figures["threads"]
    used = sum(cpu_seconds(facts.state, one) for one in facts.state["stages"]) / up if up else 0.0
    full = room > 0 and figures["busy_seconds"] >= _FULL * room
    idle = facts.machine.cpus - used
    if stage.ends or not full or not figures["waiting"] or idle < 1:
        return
    yield warn(
        "workers",
        f"{stage.name}: its {figures['wanted']} workers are always busy, {figures['waiting']} messages wait, and "
        f"{idle:.1f} of {facts.machine.cpus} CPUs are idle",
        "it is the bottleneck, and there is room for more",
        f"sqspipes-mp scale {facts.state['engine']['domain']} {stage.name}={figures['wanted'] + int(idle)}",
    )


def _priorities(stage: Stage, state: Mapping[str, Any]) -> Iterator[Finding]:
    receives, empty = state["broker"]["requests"]["receive"], state["broker"]["empty_receives"]
    if len(stage.inputs) < 2 or receives < _LEAST_CALLS or empty < _EMPTY * receives:
        return
    yield warn(
        "priorities",
        f"{stage.name} has {len(stage.inputs)} levels, and {empty / receives:.0%} of the receives bring nothing",
        "each level is a queue that is asked, and billed, by itself",
        "fewer levels: Task(priorities=) of the task before it",
    )


CHECKS = (gains,)
