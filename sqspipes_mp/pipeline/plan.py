"""The plan of one run: the engine's settings and the arguments of ``run``, checked together. Pure (caller)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.host.numeric_threads import share
from sqspipes_mp.pipeline.callables import misfit
from sqspipes_mp.pipeline.checks import flag, is_whole, seconds, whole_number
from sqspipes_mp.pipeline.http_address import HttpAddress
from sqspipes_mp.pipeline.stages import MAX_PRIORITY, Pipeline, Stage
from sqspipes_mp.pipeline.task import OnError, Task, check_workers

#: Longest visibility timeout of a receive, seconds: messages of a lost reply come back after it. The keeper extends it.
FIRST_LEASE = 15.0
#: The shortest visibility timeout that heartbeats can keep, seconds.
MIN_VISIBILITY = 2.0
#: Default of ``run(idle)``, seconds: where a source runs elsewhere, and where all tasks of a fed pipeline run here.
IDLE, FED_IDLE = 60.0, 1.0
Until: TypeAlias = Literal["drained", "stopped"]
#: Most messages of one running batch that are told to readers.
_SHOWN = 64
#: Seats reserved for each stage at least, and for each CPU and each worker of the start: an order may add workers.
_LEAST_ROOM, _ROOM_FACTOR = 32, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The engine's arguments that its processes need; docs/reference/options.rst explains each."""

    ignore_none: bool = True
    on_error: OnError = "raise"
    setup: Callable[[], object] | None = None
    #: Visibility timeout of a held message, seconds.
    visibility: float = 60.0
    #: Seconds that running calls have once a stop is asked for.
    grace: float = 25.0
    start_method: str | None = None
    create_queues: bool = True
    json_default: Callable[[Any], Any] | None = None


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of a slot: its stage, and its number there."""

    stage: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """One run; stages are named by their indexes."""

    pipeline: Pipeline
    settings: Settings
    #: The stages that run here, in order.
    selected: tuple[int, ...]
    #: Worker processes of each stage at the start.
    workers: Mapping[int, int]
    #: Positional arguments of each stage's function after the value (a source: all of them).
    args: Mapping[int, tuple[Any, ...]]
    #: Queues that each stage receives from, highest priority first.
    inputs: Mapping[int, tuple[str, ...]]
    #: Priority of a source's outputs, or callable(output) for all outputs sent here.
    priority: int | Callable[[Any], int] = 0
    #: "drained": the run ends when every queue is empty; "stopped": never by itself; None: with its sources, where no
    #: other stage runs here, else never.
    until: Until | None = None
    #: Whether ``run`` was given ``until``, and whether it was given ``idle``.
    until_given: bool = False
    idle_given: bool = False
    #: Seconds for which the queues must have been empty, where the source runs elsewhere.
    idle: float = IDLE
    #: Seconds for which the start waits for a queue service that is unreachable.
    wait_for_broker: float = 0.0
    #: The stage whose outputs go to the caller (``iterate=True``); None: no stage's do.
    sink: int | None = None
    #: Whether workers tell the caller of every message that another one becomes (``map``).
    counted: bool = False
    #: Results that one worker may have on their way to the caller; None: any number.
    window: int | None = 16
    #: Seconds between the keeper's counts of waiting messages, for progress; None: it counts none.
    count_every: float | None = None
    #: Worker processes that each stage can have; a stage that is not in it: those of the start.
    room: Mapping[int, int] = field(default_factory=dict)
    #: Where the run's HTTP process listens; None: it has none.
    http: HttpAddress | None = None
    #: The MODULE:ENGINE by which the command line started the run; empty: another program did.
    started_as: str = ""
    #: The line to the program's log (``ipc.log_line``); None: the children are forked, and have its handlers.
    logs: Any = None

    @property
    def seats(self) -> tuple[Seat, ...]:
        """The places of all slots, reserved ones included; a slot's number is its index here."""
        return tuple(Seat(stage, index) for stage in self.selected for index in range(self.room_of(stage)))

    def room_of(self, stage: int) -> int:
        """Return the worker processes that a stage can have."""
        return self.room.get(stage, self.workers[stage])

    def slots(self, stage: int) -> range:
        """Return the numbers of a stage's slots, reserved ones included."""
        first = sum(self.room_of(index) for index in self.selected if index < stage)
        return range(first, first + self.room_of(stage))

    def calls_of(self, stage: int) -> int:
        """Return the calls that may run at once in one worker of a stage."""
        return self.pipeline.stages[stage].task.threads

    @property
    def first_lease(self) -> float:
        """Visibility timeout of a receive, seconds."""
        return min(self.settings.visibility, FIRST_LEASE)

    @property
    def keeper_patience(self) -> float:
        """Seconds that a call of the keeper may take; a keeper that stands still for twice as long is replaced."""
        return max(0.5, self.first_lease / 8)

    @property
    def queue_names(self) -> tuple[str, ...]:
        """Every queue of the pipeline; a lease names its queue by the place in this tuple."""
        return tuple(spec.name for spec in self.pipeline.queues)

    @property
    def calls(self) -> int:
        """Calls that may run at once in one worker."""
        return max(self.pipeline.stages[index].task.threads for index in self.selected)

    @property
    def lanes(self) -> int:
        """Messages that may run at once in one worker, of a batch those that are shown."""
        batches = [self.pipeline.stages[index].task.batch or 1 for index in self.selected]
        return max(self.calls, min(max(batches), _SHOWN))

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
    """Raise ``ConfigError`` for a task's timeout beyond ``longest``, the broker's ``longest_hold`` in seconds."""
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
    wait_for_broker: object = None,
) -> RunPlan:
    """Check ``run``'s arguments against the pipeline. Raises ``ConfigError``."""
    selected = _select(pipeline, only)
    flag("run(iterate)", iterate)
    counts = _workers(pipeline, selected, workers)
    plan = RunPlan(
        pipeline=pipeline,
        settings=settings,
        selected=selected,
        workers=counts,
        room={index: _room(pipeline.stages[index], count) for index, count in counts.items()},
        args=_args(pipeline, selected, args),
        inputs=_bands(pipeline, selected, min_priority, max_priority),
        idle=_default_idle(pipeline, selected) if idle is None else seconds("run(idle)", idle),
        sink=selected[-1] if iterate else None,
        until_given=until is not None,
        idle_given=idle is not None,
        wait_for_broker=0.0 if wait_for_broker is None else seconds("run(wait_for_broker)", wait_for_broker),
    )
    plan = replace(plan, priority=_priority(plan, priority), until=_until(plan, until))
    if idle is not None and plan.until != "drained":
        raise ConfigError(
            "run(idle)", idle, "given with until, whose end it puts off", 'Add until="drained", or drop it'
        )
    return plan


def endless(plan: RunPlan) -> str | None:
    """Return why a run has no natural end; None: it has one, the source's."""
    first = plan.pipeline.stages[0]
    if first.is_source and not first.ends:
        return f"the source {first.name!r} is called for ever"
    if not first.is_source:
        return f"others may send to {first.name!r} at any time"
    if plan.source is None:
        return f"the source {first.name!r} runs elsewhere"
    if len(plan.selected) < len(plan.pipeline.stages):
        return "some tasks run elsewhere"
    if any(plan.inputs[stage.index] != tuple(stage.inputs) for stage in plan.pipeline.stages):
        return "some priorities are received elsewhere"
    return None


def _default_idle(pipeline: Pipeline, selected: Sequence[int]) -> float:
    """Return the default of ``idle``: those who feed a pipeline that runs here are most likely done, too."""
    fed_here = pipeline.stages[0].task.input is True and len(selected) == len(pipeline.stages)
    return FED_IDLE if fed_here else IDLE


def _select(pipeline: Pipeline, only: object) -> tuple[int, ...]:
    if only is None:
        return tuple(range(len(pipeline.stages)))
    items = list(only) if isinstance(only, (list, tuple, set, frozenset)) else [only]
    if not items:
        raise ConfigError("run(only)", only, "a task's name or index, or a list of them", "Leave it out to run all")
    chosen = []
    for item in items:
        if not (is_whole(item) or isinstance(item, str)):
            raise ConfigError("run(only)", item, f"a task's name or index, of {_names(pipeline)}")
        chosen.append(pipeline.stage(item, "run(only)").index)
    return tuple(sorted(set(chosen)))


def _names(pipeline: Pipeline) -> str:
    return ", ".join(repr(stage.name) for stage in pipeline.stages)


def _per_stage(pipeline: Pipeline, selected: Sequence[int], field: str, value: object) -> dict[int, Any]:
    """Spread a bare value (one stage only) or ``{"name": value}`` over stages."""
    if isinstance(value, Mapping):
        spread: dict[int, Any] = {}
        for name, item in value.items():
            index = pipeline.stage(name, field).index
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
        asked = check_workers(f"run(workers) of task {stage.name!r}", given.get(index, stage.task.workers))
        count = cpus() if asked == "auto" else asked
        if stage.ends and count != 1:
            raise ConfigError(
                f"run(workers) of task {stage.name!r}",
                count,
                "1 for a generator source",
                "Each worker would yield it all",
            )
        counts[index] = count
    return counts


def _room(stage: Stage, workers: int) -> int:
    """Return the workers that a stage can have; each worker of a generator source would yield it all."""
    return 1 if stage.ends else max(_LEAST_ROOM, _ROOM_FACTOR * cpus(), _ROOM_FACTOR * workers)


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
        else:
            _check_receiver(pipeline.stages[index], bound[index])
    return bound


def _check_source(stage: Stage, args: tuple[Any, ...]) -> None:
    """Raise ``ConfigError`` where a source's function does not take its arguments."""
    problem = misfit(stage.task.method, args, stage.task.kwargs)
    if problem is not None:
        raise ConfigError(
            f"the arguments of task {stage.name!r}",
            args,
            f"what its function takes ({problem})",
            "It is the first task and has no input, so it is a source, called without a value. Give it args=, or write "
            f"Task({stage.name}, input=True) and feed it with put, or use map",
        )


def _check_receiver(stage: Stage, args: tuple[Any, ...]) -> None:
    """Raise ``ConfigError`` where a function does not take a value and its arguments."""
    task = stage.task
    problem = misfit(task.method, (None, *args), task.kwargs)
    if problem is not None:
        value = "the list of values" if task.batch else "the value"
        raise ConfigError(
            f"the arguments of task {stage.name!r}",
            args,
            f"what its function takes after {value} ({problem})",
            f"Each call is {_call_text(task)}. Give the missing ones by args= or kwargs=, or drop those that are too "
            "many",
        )


def _call_text(task: Task) -> str:
    """Return how a task's function is called, for people."""
    value = "values" if task.batch else "value"
    keywords = "".join(f", {name}=..." for name in task.kwargs or ())
    return f"{task.name}({value}, *args{keywords})"


def _bands(pipeline: Pipeline, selected: Sequence[int], low: object, high: object) -> dict[int, tuple[str, ...]]:
    lowest, highest = _level("run(min_priority)", low, 0), _level("run(max_priority)", high, MAX_PRIORITY)
    if lowest > highest:
        raise ConfigError("run(min_priority)", low, f"at most max_priority ({highest})", "Swap the two")
    return {index: pipeline.input_levels(pipeline.stages[index], lowest, highest) for index in selected}


def _level(field: str, value: object, default: int) -> int:
    return default if value is None else whole_number(field, value, least=0, most=MAX_PRIORITY, also=" or None")


def _priority(plan: RunPlan, priority: object) -> int | Callable[[Any], int]:
    if callable(priority):
        return priority
    source = plan.source
    top = MAX_PRIORITY if source is None else source.task.priorities - 1
    also = "" if source is None else f" (the levels of task {source.name!r})"
    cure = ""
    if is_whole(priority) and top < priority <= MAX_PRIORITY:
        cure = f"Declare more levels: Task(..., priorities={priority + 1})"
    also += ", or a callable that gets the output"
    return whole_number("run(priority)", priority, least=0, most=top, also=also, cure=cure)


def _until(plan: RunPlan, until: object) -> Until | None:
    if until is None:
        # A source alone ends with itself: there is no queue to look at.
        return "drained" if endless(plan) is None and len(plan.selected) > 1 else None
    if until == "stopped":
        return "stopped"
    if until != "drained":
        raise ConfigError("run(until)", until, 'None, "drained" or "stopped"')
    source = plan.source
    if source is not None and not source.ends:
        raise ConfigError(
            "run(until)",
            until,
            f'"stopped" or None here: the source {source.name!r} is a function that is called for ever, so nothing '
            "ever drains",
            "Write it as a generator function that ends (yield each output)",
        )
    return "drained"
