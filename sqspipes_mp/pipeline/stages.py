"""Tasks in their places: the stages of a pipeline and the queues between them. Pure; any process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from sqspipes_mp.brokers.base import QueueSpec
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.pipeline.domain import check_domain
from sqspipes_mp.pipeline.names import MAX_NAME, QueueNames
from sqspipes_mp.pipeline.task import Task

#: Highest priority of a message; 0 is the lowest.
MAX_PRIORITY = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A task in its place."""

    index: int
    task: Task
    #: Queues that the stage receives from, highest priority first; none for a source.
    inputs: tuple[str, ...]
    #: Queues that the stage sends to, by priority, lowest first; none for the last task.
    outputs: tuple[str, ...]
    #: Dead-letter queue; None for a source.
    dead: str | None
    #: The ``group`` of the task that receives the outputs.
    next_group: Callable[[Any], str] | None
    #: Its ``tenant``.
    next_tenant: Callable[[Any], object] | None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def is_source(self) -> bool:
        """Whether the stage receives nothing and is called again and again."""
        return not self.inputs

    @property
    def is_first(self) -> bool:
        """Whether the stage is the pipeline's first."""
        return self.index == 0

    @property
    def ends(self) -> bool:
        """Whether the stage is a source that comes to an end: a generator function."""
        return self.is_source and self.task.is_generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The stages in order, and the queues between them."""

    domain: str
    fifo: bool
    #: Visibility timeout of the queues, seconds.
    visibility: float
    stages: tuple[Stage, ...]
    #: Every queue of the stages: dead-letter queues first, others' queues with ``owned=False``.
    queues: tuple[QueueSpec, ...]

    def stage(self, name_or_index: object, field: str = "the task") -> Stage:
        """Return a stage by its task's name or its index from 0. Raises ``ConfigError`` naming all stages.

        ``field``: names the value in the error.
        """
        for stage in self.stages:
            if name_or_index == stage.name or (type(name_or_index) is int and name_or_index == stage.index):
                return stage
        known = ", ".join(f"{stage.name!r} ({stage.index})" for stage in self.stages)
        names = [stage.name for stage in self.stages]
        near = get_close_matches(name_or_index, names, 1) if isinstance(name_or_index, str) else []
        cure = f"Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(field, name_or_index, f"a task's name or index of this pipeline: {known}", cure)

    def queue_names(self, selected: Collection[int] | None = None) -> tuple[str, ...]:
        """Return the names of this pipeline's own queues (never others'); ``selected``: only those of these stages."""
        used = None if selected is None else self._used(selected)
        return tuple(spec.name for spec in self.queues if spec.owned and (used is None or spec.name in used))

    def specs_for(self, selected: Collection[int] | None = None) -> tuple[QueueSpec, ...]:
        """Return the queues that a run of these stages needs: inputs, outputs, and the dead-letter queues of all."""
        if selected is None:
            return self.queues
        used = self._used(selected)
        used |= {spec.dead for spec in self.queues if spec.name in used and spec.dead is not None}
        return tuple(spec for spec in self.queues if spec.name in used)

    def input_levels(self, stage: Stage, low: int = 0, high: int = MAX_PRIORITY) -> tuple[str, ...]:
        """Return a stage's input queues of the priorities ``low`` to ``high``, highest first; none for a source.

        Raises ``ConfigError`` where all of the stage's levels are below ``low``; a ``high`` above them is cut.
        """
        top = len(stage.inputs) - 1
        if stage.inputs and low > top:
            raise ConfigError(
                "run(min_priority)",
                low,
                f"at most {top}, the highest priority task {stage.name!r} receives",
                "Leave the task out with only=, or give the task before it (the first: itself) more priorities",
            )
        return tuple(queue for level, queue in enumerate(reversed(stage.inputs)) if low <= level <= high)[::-1]

    def _used(self, selected: Collection[int]) -> set[str]:
        stages = [self.stage(index) for index in selected]
        return {name for stage in stages for name in (*stage.inputs, *stage.outputs, stage.dead) if name is not None}


def build(tasks: object, *, domain: str, fifo: bool, visibility: float) -> Pipeline:
    """Check a task list as a whole and derive its stages and queues. Raises ``ConfigError``."""
    declared = [Task.from_any(item, position) for position, item in enumerate(_listed(tasks))]
    check_domain("Engine(domain)", domain)
    _check_unique(declared)
    for position, task in enumerate(declared):
        _check_place(task, position, fifo=fifo)
        if task.batch is not None and task.batch_wait >= visibility / 2:
            raise ConfigError(
                f"Task({task.name!r}).batch_wait",
                task.batch_wait,
                f"less than half of the visibility timeout ({visibility:g} s): what waits that long goes back",
                "Shorten it, or give Engine(visibility_timeout=) more",
            )
    pipeline = _placed(declared, domain=domain, fifo=fifo, visibility=visibility)
    problem = _name_problem(pipeline)
    if problem is not None:
        raise problem
    return pipeline


def fed(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with its first task fed, as ``map`` feeds it; itself where the task is declared so.

    Raises ``ConfigError`` for a first task that receives from a queue of others, and for a source whose input queue
    cannot be named.
    """
    first = pipeline.stages[0].task
    if isinstance(first.input, str):
        raise ConfigError(
            "map: the first task's input", first.input, "None or True: map feeds it itself", "Use run() here"
        )
    found = _with_input(pipeline)
    problem = _name_problem(found)
    if problem is not None:
        raise problem
    return found


def feedable(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with every queue it can have: a source's input queue too, which ``map`` feeds.

    The pipeline itself where that queue cannot be named, and so never exists.
    """
    found = _with_input(pipeline)
    return pipeline if _name_problem(found) is not None else found


def _with_input(pipeline: Pipeline) -> Pipeline:
    if not pipeline.stages[0].is_source:
        return pipeline
    source, *others = (stage.task for stage in pipeline.stages)
    tasks = [replace(source, input=True, max_waiting=None), *others]
    return _placed(tasks, domain=pipeline.domain, fifo=pipeline.fifo, visibility=pipeline.visibility)


def _placed(tasks: list[Task], *, domain: str, fifo: bool, visibility: float) -> Pipeline:
    names = QueueNames(domain, fifo)
    stages = []
    inputs = names.inputs(tasks[0])
    for position, task in enumerate(tasks):
        following = tasks[position + 1] if position + 1 < len(tasks) else None
        outputs = names.outputs(task) if following else ()
        stages.append(
            Stage(
                index=position,
                task=task,
                inputs=inputs[::-1],
                outputs=outputs,
                dead=names.dead(task) if inputs else None,
                next_group=following.group if following else None,
                next_tenant=following.tenant if following else None,
            )
        )
        inputs = outputs
    queues = _specs(stages, domain, fifo, visibility)
    return Pipeline(domain=domain, fifo=fifo, visibility=visibility, stages=tuple(stages), queues=queues)


def _listed(tasks: object) -> Iterable[object]:
    cure = ""
    if isinstance(tasks, (list, tuple)):
        if tasks:
            return tasks
        cure = "Give at least one: [function]"
    elif isinstance(tasks, (Task, Mapping)) or callable(tasks):
        cure = f"Write [{getattr(tasks, '__name__', 'task')}]"
    elif isinstance(tasks, Iterable) and not isinstance(tasks, (str, bytes)):
        cure = "Write list(...), in the order the values go"
    raise ConfigError("Engine(tasks)", tasks, "a list of one or more tasks", cure or "Write [function, function]")


def _check_unique(tasks: list[Task]) -> None:
    first: dict[str, int] = {}
    for position, task in enumerate(tasks):
        if task.name in first:
            raise ConfigError(
                f"tasks[{position}].name",
                task.name,
                f"a name of its own: tasks[{first[task.name]}] has this one",
                f"Name it: Task(..., name='{task.name}-{position}')",
            )
        first[task.name] = position


def _check_place(task: Task, position: int, *, fifo: bool) -> None:
    def refuse(keyword: str, allowed: str, cure: str) -> None:
        raise ConfigError(f"Task({task.name!r}).{keyword}", getattr(task, keyword), allowed, cure)

    is_source = position == 0 and task.input is None
    if isinstance(task.input, str) and task.input.endswith(".fifo") and not fifo:
        refuse("input", "a standard queue, as all of this engine's", "Give Engine(..., fifo=True): it keeps the order")
    if position > 0 and task.input is not None:
        refuse("input", "None except for the first task: a later one receives what the task before it sends", "Drop it")
    if is_source and task.is_generator:
        cure = "A generator source yields its outputs once; for parallel work let a second task receive them"
        for keyword in ("workers", "threads"):
            if getattr(task, keyword) != 1:
                refuse(keyword, "1 for a source that is a generator function", cure)
    elif is_source and task.threads != 1:
        refuse(
            "threads",
            "1 for a source: its calls are counted one after the other",
            "Use workers=, or let the task receive: behind a source, or with input=True",
        )
    if is_source and task.batch is not None:
        refuse(
            "batch", "None for a source: it receives nothing", "Drop it, or set input=True to feed the task with put"
        )
    if task.max_waiting is not None and not is_source:
        refuse("max_waiting", "None except for a source: only that makes messages without receiving any", "Drop it")
    if task.group is not None:
        if not fifo:
            refuse(
                "group", "None on standard queues, which have no groups", "Give Engine(..., fifo=True), or drop group"
            )
        if is_source:
            refuse("group", "None for a source: it receives nothing", "Give the group to the task that receives")
        if isinstance(task.input, str):
            refuse("group", f"None with input={task.input!r}: the queue's senders set its groups", "Drop it")
    if task.tenant is not None:
        if fifo:
            refuse("tenant", "None on FIFO queues, where each message is in a group", "Use group=, or standard queues")
        if is_source:
            refuse("tenant", "None for a source: it receives nothing", "Give the tenant to the task that receives")
        if isinstance(task.input, str):
            refuse("tenant", f"None with input={task.input!r}: the queue's senders set its tenants", "Drop it")


def _name_problem(pipeline: Pipeline) -> ConfigError | None:
    """Return why the queues cannot have their names; None: they can."""
    return _collision(pipeline.stages) or _excess(pipeline.stages, pipeline.domain)


def _collision(stages: Sequence[Stage]) -> ConfigError | None:
    owners: dict[str, str] = {}
    for stage in stages:
        for queue in (*(stage.inputs if stage.is_first else ()), *stage.outputs, *filter(None, (stage.dead,))):
            if queue in owners:
                return ConfigError(
                    f"Task({stage.name!r}).{'input' if queue == stage.task.input else 'name'}",
                    queue if queue == stage.task.input else stage.name,
                    f"another: queue {queue!r} would also be one of task {owners[queue]!r}",
                    "Avoid names that end in --dead or --p1 to --p15",
                )
            owners[queue] = stage.name
    return None


def _excess(stages: Sequence[Stage], domain: str) -> ConfigError | None:
    for stage in stages:
        # Names of others' queues are not ours to shorten. The highest level has the longest name.
        inputs = stage.inputs[:1] if stage.task.input is True else ()
        named = (*stage.outputs[-1:], *filter(None, (stage.dead,)))
        for queue in sorted((*named, *inputs), key=len, reverse=True):
            if len(queue) > MAX_NAME:
                lengths = f"domain {domain!r} has {len(domain)} characters, the name {stage.name!r} {len(stage.name)}"
                return ConfigError(
                    "Engine(domain)" if queue in inputs else f"Task({stage.name!r}).name",
                    domain if queue in inputs else stage.name,
                    f"shorter: queue {queue!r} has {len(queue)} characters, SQS allows {MAX_NAME}",
                    f"Cut {len(queue) - MAX_NAME} characters ({lengths})",
                )
    return None


def _specs(stages: list[Stage], domain: str, fifo: bool, visibility: float) -> tuple[QueueSpec, ...]:
    own = partial(QueueSpec, fifo=fifo, visibility=visibility, domain=domain)
    dead = [own(name=stage.dead) for stage in stages if stage.dead is not None]
    live = []
    for stage in stages:
        for name in reversed(stage.inputs):
            if isinstance(stage.task.input, str):
                # A queue of others: none of its attributes is set, so it has no dead-letter queue of ours.
                spec = partial(QueueSpec, name=name, fifo=name.endswith(".fifo"), visibility=visibility, owned=False)
                live.append(spec(ahead=stage.task.prefetch != 0))
            else:
                live.append(own(name=name, dead=stage.dead))
    return (*dead, *live)
