"""What one ``run()`` is to do: the engine's settings and the call's arguments, checked together. Pure (caller)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.host.numeric import share
from sqspipes_mp.pipeline.callables import misfit
from sqspipes_mp.pipeline.stages import Pipeline, Stage

#: What every receive asks for at most, seconds: a receive whose reply is lost costs that long. The keeper extends.
FIRST_LEASE = 15.0
#: The shortest visibility timeout that heartbeats can keep, seconds.
MIN_VISIBILITY = 2.0
#: ``run(idle)`` where it is not given, seconds.
IDLE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The engine's own arguments that its processes need."""

    ignore_none: bool = True
    on_error: Any = "raise"
    setup: Callable[[], object] | None = None
    visibility: float = 60.0
    grace: float = 25.0
    start_method: str | None = None
    create_queues: bool = True
    json_default: Callable[[Any], Any] | None = None


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot: which stage it works for, and its number there."""

    stage: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """One run. ``selected``: indexes of the stages run here; ``inputs``: the queues each receives from, highest first;
    ``sink``: the stage whose results go to the caller (``iterate=True``); ``priority``: an int or a callable(output);
    ``counted``: everything a message becomes is told to the caller (``map``); ``window``: results one worker may have
    on their way to the caller, None: any number; ``count_every``: seconds between two counts of what waits for each
    stage (the keeper's, for progress), None: not counted.
    """

    pipeline: Pipeline
    settings: Settings
    selected: tuple[int, ...]
    workers: Mapping[int, int]
    args: Mapping[int, tuple[Any, ...]]
    inputs: Mapping[int, tuple[str, ...]]
    priority: Any = 0
    until: str | None = None
    idle: float = IDLE
    sink: int | None = None
    counted: bool = False
    window: int | None = 16
    count_every: float | None = None

    @property
    def seats(self) -> tuple[Seat, ...]:
        return tuple(Seat(stage, index) for stage in self.selected for index in range(self.workers[stage]))

    @property
    def first_lease(self) -> float:
        """Seconds for which a receive hides its messages."""
        return min(self.settings.visibility, FIRST_LEASE)

    @property
    def keeper_patience(self) -> float:
        """Seconds that one of the keeper's calls may take; it stands still for twice as long before it is replaced."""
        return max(0.5, self.first_lease / 8)

    @property
    def queue_names(self) -> tuple[str, ...]:
        """Every queue of the pipeline; leases name theirs by its place here."""
        return tuple(spec.name for spec in self.pipeline.queues)

    @property
    def calls(self) -> int:
        """Calls that may run at once in one worker."""
        return max(self.pipeline.stages[index].task.threads for index in self.selected)

    @property
    def numeric_threads(self) -> int:
        """Threads that numeric libraries get in each worker run here."""
        return share(cpus(), sum(self.workers[index] for index in self.selected))

    @property
    def watched(self) -> tuple[str, ...]:
        """The queues that must be empty for ``until="drained"``, upstream first: up to the last stage run here."""
        names: list[str] = []
        for stage in self.pipeline.stages[: max(self.selected) + 1]:
            names += self.inputs.get(stage.index, stage.inputs)
        return tuple(names)

    @property
    def source(self) -> Stage | None:
        """The source, if it runs here."""
        first = self.pipeline.stages[0]
        return first if first.is_source and 0 in self.selected else None


def check_timeouts(pipeline: Pipeline, longest: float | None) -> None:
    """Refuse a timeout beyond what the broker can keep a message for (its ``longest_hold``). Raises ``ConfigError``."""
    for stage in pipeline.stages:
        timeout = stage.task.timeout
        if longest is not None and timeout is not None and timeout > longest and not stage.is_source:
            raise ConfigError(
                f"Task({stage.name!r}).timeout",
                timeout,
                f"at most {longest:g} s ({longest / 3600:g} h) on SQS, which lets no message be in flight for longer",
                "Make its calls shorter (one message for each part of the work), or use SQLite, which has no limit",
            )


def make_plan(
    pipeline: Pipeline,
    settings: Settings,
    *,
    only: object = None,
    args: object = None,
    workers: object = None,
    priority: object = 0,
    min_priority: object = None,
    max_priority: object = None,
    iterate: object = False,
    until: object = None,
    idle: object = None,
) -> RunPlan:
    """Check ``run``'s arguments against the pipeline. Raises ``ConfigError``."""
    selected = _select(pipeline, only)
    check_flag("run(iterate)", iterate)
    plan = RunPlan(
        pipeline=pipeline,
        settings=settings,
        selected=selected,
        workers=_workers(pipeline, selected, workers),
        args=_args(pipeline, selected, args),
        inputs=_bands(pipeline, selected, min_priority, max_priority),
        idle=IDLE if idle is None else number("run(idle)", idle, least=0.0),
        sink=selected[-1] if iterate else None,
    )
    plan = replace(plan, priority=_priority(plan, priority), until=_until(plan, until))
    if idle is not None and plan.until is None:
        raise ConfigError(
            "run(idle)", idle, "given with until, whose end it puts off", 'Add until="drained", or drop it'
        )
    return plan


def _select(pipeline: Pipeline, only: object) -> tuple[int, ...]:
    if only is None:
        return tuple(range(len(pipeline.stages)))
    items = list(only) if isinstance(only, (list, tuple, set, frozenset)) else [only]
    if not items:
        raise ConfigError("run(only)", only, "a task's name or index, or a list of them", "Leave it out to run all")
    chosen = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int)):
            raise ConfigError("run(only)", item, f"a task's name or index, of {_names(pipeline)}")
        chosen.append(pipeline.stage(item).index)
    return tuple(sorted(set(chosen)))


def _names(pipeline: Pipeline) -> str:
    return ", ".join(repr(stage.name) for stage in pipeline.stages)


def _per_stage(pipeline: Pipeline, selected: Sequence[int], field: str, value: object) -> dict[int, Any]:
    """Spread a bare value (one stage only) or ``{"name": value}`` over stages."""
    if isinstance(value, Mapping):
        spread: dict[int, Any] = {}
        for name, item in value.items():
            index = pipeline.stage(name).index
            if index not in selected:
                raise ConfigError(field, name, "a task that runs here", "Drop it, or add it to only=")
            spread[index] = item
        return spread
    if len(selected) != 1:
        raise ConfigError(
            field,
            value,
            "a dict {task name: value} where several tasks run",
            f"Write {{{pipeline.stages[selected[0]].name!r}: {value!r}}}",
        )
    return {selected[0]: value}


def _workers(pipeline: Pipeline, selected: Sequence[int], workers: object) -> dict[int, int]:
    given = {} if workers is None else _per_stage(pipeline, selected, "run(workers)", workers)
    counts: dict[int, int] = {}
    for index in selected:
        stage = pipeline.stages[index]
        count = given.get(index, stage.task.workers)
        if count == "auto":
            count = cpus()
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"run(workers) of task {stage.name!r}", count, 'a whole number from 1, or "auto"')
        if stage.ends and count != 1:
            raise ConfigError(
                f"run(workers) of task {stage.name!r}",
                count,
                "1 for a generator source",
                "Each worker would yield it all",
            )
        counts[index] = count
    return counts


def _args(pipeline: Pipeline, selected: Sequence[int], args: object) -> dict[int, tuple[Any, ...]]:
    given = {} if args is None else _per_stage(pipeline, selected, "run(args)", args)
    bound: dict[int, tuple[Any, ...]] = {}
    for index in selected:
        value = given.get(index, pipeline.stages[index].task.args)
        if not isinstance(value, (tuple, list)):
            raise ConfigError(
                f"run(args) of task {pipeline.stages[index].name!r}", value, "a tuple or list", f"Write ({value!r},)"
            )
        bound[index] = tuple(value)
        if pipeline.stages[index].is_source:
            _check_source(pipeline.stages[index], bound[index])
    return bound


def _check_source(stage: Stage, args: tuple[Any, ...]) -> None:
    """Raise ``ConfigError`` where a source's function cannot be called with what it will get."""
    problem = misfit(stage.task.method, args)
    if problem is not None:
        raise ConfigError(
            f"the arguments of task {stage.name!r}",
            args,
            f"what its function takes ({problem})",
            "It is the first task and has no input, so it is a source, called without a value. Give it args=, or write "
            f"Task({stage.name}, input=True) and feed it with put, or use map",
        )


def _bands(pipeline: Pipeline, selected: Sequence[int], low: object, high: object) -> dict[int, tuple[str, ...]]:
    for field, value in (("run(min_priority)", low), ("run(max_priority)", high)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 15):
            raise ConfigError(field, value, "None or a whole number from 0 to 15")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        raise ConfigError("run(min_priority)", low, f"at most max_priority ({high})", "Swap the two")
    return {
        index: pipeline.input_levels(
            pipeline.stages[index],
            low if isinstance(low, int) else None,
            high if isinstance(high, int) else None,
        )
        for index in selected
    }


def _priority(plan: RunPlan, priority: object) -> object:
    if callable(priority):
        return priority
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise ConfigError("run(priority)", priority, "a whole number, or a callable that gets the output")
    source = plan.source
    levels = source.task.priorities if source is not None else 16
    if not 0 <= priority < levels:
        raise ConfigError(
            "run(priority)",
            priority,
            f"from 0 to {levels - 1}, the levels of task {source.name!r}" if source else "from 0 to 15",
            f"Declare more levels: Task(..., priorities={priority + 1})" if 0 <= priority < 16 else "",
        )
    return priority


def _until(plan: RunPlan, until: object) -> str | None:
    if until is None:
        return None
    if until != "drained":
        raise ConfigError("run(until)", until, 'None or "drained"')
    source = plan.source
    if source is not None and not source.ends:
        raise ConfigError(
            "run(until)",
            until,
            f"None here: the source {source.name!r} is a function that is called for ever, so nothing ever drains",
            "Write it as a generator function that ends (yield each output)",
        )
    return "drained"


def check_flag(field: str, value: object) -> None:
    """Check a switch. Raises ``ConfigError``."""
    if not isinstance(value, bool):
        raise ConfigError(field, value, "True or False")


def number(field: str, value: object, *, least: float, above: bool = False, most: float = math.inf) -> float:
    """Check a number of seconds. Raises ``ConfigError``."""
    span = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(field, value, f"a number of seconds, {span}")
    if value < least or (above and value == least) or value > most:
        raise ConfigError(field, value, f"a number of seconds, {span}")
    return float(value)
