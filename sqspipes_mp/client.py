"""``TaskClient``: sqspipes's interface, a thin layer over ``Engine`` (caller).

``from sqspipes_mp.client import TaskClient`` instead of ``from sqspipes.client import TaskClient`` is all a script of
sqspipes needs; docs/coming_from/sqspipes.rst tells what else changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, Literal, overload
from uuid import uuid4

from sqspipes_mp.brokers import SQS
from sqspipes_mp.brokers.base import Broker, Completion
from sqspipes_mp.caller.results import Results
from sqspipes_mp.engine import Engine, connected, plan_run
from sqspipes_mp.errors import ConfigError, QueueMissing
from sqspipes_mp.ipc.summary import Summary
from sqspipes_mp.messages.ids import source_parent
from sqspipes_mp.pipeline.checks import flag
from sqspipes_mp.pipeline.domain import check_domain
from sqspipes_mp.pipeline.outputs import Built, Products
from sqspipes_mp.pipeline.stages import MAX_PRIORITY
from sqspipes_mp.pipeline.task import EmptyTaskOutput, Task, TaskCallback, TaskRef

__all__ = ["EmptyTaskOutput", "TaskCallback", "TaskClient", "TaskClientError"]

log = logging.getLogger("sqspipes_mp.client")

#: sqspipes's name of the error for a client's arguments.
TaskClientError = ConfigError


class TaskClient:
    """Tasks of one domain, each run by its name, usually one per process or machine: sqspipes's client.

    Args:
        domain: beginning of the queue names.
        aws_key, aws_secret: static credentials, both or none; None: boto3's own chain.
        aws_region: any region; None: boto3's own.
        ignore_none: drop outputs that are None.
        fifo: FIFO queues, in every region.
        broker: ``SQS(...)``, ``SQLite(path)`` or a URL, in place of the three ``aws_`` arguments, which are not looked
            at then. Without it the queues are at SQS, whatever ``SQSPIPES_BROKER`` says.

    Raises:
        ConfigError: naming the argument, its value, what is allowed and the cure.
    """

    def __init__(
        self,
        domain: str,
        aws_key: str | None = None,
        aws_secret: str | None = None,
        aws_region: str | None = "us-west-2",
        ignore_none: bool = True,
        fifo: bool = True,
        broker: Broker | str | None = None,
    ) -> None:
        check_domain("TaskClient(domain)", domain)
        flag("TaskClient(ignore_none)", ignore_none)
        flag("TaskClient(fifo)", fifo)
        self.domain = domain
        self.aws_region = aws_region
        self.ignore_none = ignore_none
        self.fifo = fifo
        self._broker = SQS(aws_region, access_key=aws_key, secret_key=aws_secret) if broker is None else broker
        self._engine: Engine | None = None

    def register_tasks(self, tasks: list[Any]) -> None:
        """Register the tasks in the order the values go, in place of those registered before.

        Args:
            tasks: list of functions, ``Task`` objects, or dicts with sqspipes's keys: ``method``, ``name`` (default:
                the method's), ``workers`` (processes, default 1), ``priorities`` (levels of its output, 1 to 16;
                more are 16) and ``interval`` (seconds between two calls, a number or a callable, default 0). The
                other arguments of ``Task`` (``timeout``, ``max_attempts``, ...) are keys, too.

        Raises:
            ConfigError: an entry is no task, has an unknown key (the nearest is named) or a value that is not allowed.
        """
        if isinstance(tasks, list):
            tasks = [_as_here(task) if isinstance(task, Mapping) else task for task in tasks]
        self._engine = Engine(
            tasks, domain=self.domain, broker=self._broker, fifo=self.fifo, ignore_none=self.ignore_none
        )

    @property
    def engine(self) -> Engine:
        """The engine underneath: ``stats()``, ``dead_letters()``, or ``sqspipes-mp run MODULE:ENGINE``.

        Raises:
            ConfigError: before ``register_tasks``.
        """
        if self._engine is None:
            raise ConfigError("TaskClient.tasks", [], "registered first", "Call register_tasks([...])")
        return self._engine

    @property
    def tasks(self) -> list[Task]:
        """The tasks registered, in order."""
        return [] if self._engine is None else [stage.task for stage in self._engine.pipeline.stages]

    def get_task_by_name(self, task_name: TaskRef) -> Task:
        """Return a task by its name or its index (from 0; -1 is the last). Raises ``ConfigError`` naming all."""
        stages = self.engine.pipeline.stages
        if type(task_name) is int and -len(stages) <= task_name < 0:
            task_name += len(stages)
        return self.engine.pipeline.stage(task_name).task

    @overload
    def run(
        self,
        task_name: TaskRef,
        args: tuple[Any, ...] | None = None,
        priority: int | Callable[[Any], int] = 0,
        iterate: Literal[False] = False,
        workers: int | None = None,
        min_priority: int | None = None,
        max_priority: int | None = None,
    ) -> Summary: ...
    @overload
    def run(
        self,
        task_name: TaskRef,
        args: tuple[Any, ...] | None = None,
        priority: int | Callable[[Any], int] = 0,
        *,
        iterate: Literal[True],
        workers: int | None = None,
        min_priority: int | None = None,
        max_priority: int | None = None,
    ) -> Results[Any]: ...
    @overload
    def run(
        self,
        task_name: TaskRef,
        args: tuple[Any, ...] | None = None,
        priority: int | Callable[[Any], int] = 0,
        iterate: bool = False,
        workers: int | None = None,
        min_priority: int | None = None,
        max_priority: int | None = None,
    ) -> Summary | Results[Any]: ...
    def run(
        self,
        task_name: TaskRef,
        args: tuple[Any, ...] | None = None,
        priority: int | Callable[[Any], int] = 0,
        iterate: bool = False,
        workers: int | None = None,
        min_priority: int | None = None,
        max_priority: int | None = None,
    ) -> Summary | Results[Any]:
        """Run one task until it is stopped or an exception ends it.

        Args:
            task_name: its name or index.
            args: further arguments of the method, after the value; of the first task: all of them.
            priority: level of the first task's outputs, or callable(output) for any task's.
            iterate: return an iterator over the task's outputs, which are sent on as well.
            workers: processes, for this run.
            min_priority, max_priority: the band of levels received, both ends included; default: all.

        Returns:
            With ``iterate`` the iterator, else a ``Summary`` once SIGTERM has stopped the run.

        Raises:
            ConfigError: before any process starts.
            Exception: the one the task raised, as itself, and the errors of ``Engine.run``.
        """
        return self.engine.run(
            self.get_task_by_name(task_name).name,
            args=args,
            workers=workers,
            priority=priority,
            min_priority=min_priority,
            max_priority=max_priority,
            iterate=iterate,
        )

    def submit(self, args: tuple[Any, ...], priority: int | Callable[[Any], int] = 0) -> None:
        """Run the first task once, here and now, and send its output on; returns when it was accepted.

        Args:
            args: the method's arguments.
            priority: level of the output, or callable(output).

        Raises:
            ConfigError: for arguments that are not allowed.
            OutputError, MessageTooLarge, BrokerError: the output could not be sent.
            Exception: the one the method raised; nothing was sent then.
        """
        engine = self.engine
        plan = plan_run(engine, 0, args=args, priority=priority)
        stage = plan.pipeline.stages[0]
        if not stage.is_source:
            raise ConfigError(f"Task({stage.name!r}).input", stage.task.input, "None for submit", "Use engine.put")
        products = Products(plan, stage)
        # Each call is a run of its own, so that no two submits share an id.
        parent = source_parent(uuid4().hex, stage.name, 0)
        with closing(Built(stage.task, plan.args[0])) as method:
            made = [products.make(value, None, parent, index) for index, value in enumerate(method.outputs())]
        outputs = tuple(product.output for product in made if product.output is not None)
        if outputs:
            with connected(engine) as connection:
                connection.ensure(plan.pipeline.specs_for({0}), create=plan.settings.create_queues)
                connection.complete([Completion(None, outputs)])
        for product in made:
            if product.callback is not None:
                _call_back(product.callback, parent)

    @property
    def queues(self) -> list[str]:
        """The existing queues of exactly this pipeline: their URLs at SQS, their names in SQLite."""
        found = []
        with connected(self.engine) as connection:
            for name in self.engine.pipeline.queue_names():
                try:
                    found.append(connection.address(name))
                except QueueMissing:
                    continue
        return found

    def purge(self) -> None:
        """Empty exactly this pipeline's queues, dead letters included."""
        self.engine.purge()

    def delete(self) -> None:
        """Delete exactly this pipeline's queues."""
        self.engine.delete()


def _as_here(task: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a task's dict as sqspipes reads it: an empty name is the method's, and more than 16 priorities are 16."""
    taken = {key: value for key, value in task.items() if key != "name" or value}
    levels = taken.get("priorities")
    if isinstance(levels, int) and levels > MAX_PRIORITY + 1:
        taken["priorities"] = MAX_PRIORITY + 1
    return taken


def _call_back(callback: TaskCallback, parent: str) -> None:
    """Run a callback. Its exception is logged: raised, it would look as if the accepted output had not been sent."""
    try:
        callback.callback(*callback.callback_args)
    except Exception:
        log.exception("the callback of a task's output (submit %s) failed; the output was sent", parent)
