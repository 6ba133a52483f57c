"""What an engine has behind its public methods: settings, pipeline, broker, runs, connection (caller)."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Protocol, TypeVar, Unpack, cast

from sqspipes_mp.brokers.base import Broker, Connection
from sqspipes_mp.brokers.url import parse, resolve
from sqspipes_mp.caller.arguments import Only, PlanArgs
from sqspipes_mp.caller.feed import Feeder
from sqspipes_mp.caller.http import http_address
from sqspipes_mp.caller.importing import check_not_importing
from sqspipes_mp.caller.kept_connection import KeptConnection
from sqspipes_mp.caller.map import MapResults
from sqspipes_mp.caller.map_job import plan_job, survey
from sqspipes_mp.caller.progress.progress import check as check_progress
from sqspipes_mp.caller.results import Results
from sqspipes_mp.caller.runs import Runs
from sqspipes_mp.caller.stats import PipelineStats, existing, read_stats, total
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.ipc.map_lock import MapLock
from sqspipes_mp.ipc.summary import Summary
from sqspipes_mp.pipeline.checks import seconds
from sqspipes_mp.pipeline.plan import RunPlan, Settings, check_timeouts, make_plan
from sqspipes_mp.pipeline.stages import Pipeline, build, feedable
from sqspipes_mp.pipeline.task import OnError, TaskLike, check_on_error

log = logging.getLogger("sqspipes_mp.engine")

#: Default of ``run(wait_for_broker)``, and that of ``map``.
_WAIT_VARIABLE = "SQSPIPES_WAIT_FOR_BROKER"
F = TypeVar("F", bound=Callable[..., None])


def remembering(init: F) -> F:
    """Have an engine remember the names of the keyword arguments that its constructor was given."""

    @wraps(init)
    def remembered(engine: Any, *args: Any, **keywords: Any) -> None:
        engine._given = frozenset(keywords)
        init(engine, *args, **keywords)

    return cast("F", remembered)


class EngineParts:
    """One engine's objects. It is the engine's alone: nothing else keeps it alive.

    ``given``: the names of the keyword arguments that the engine was given; the others: checked, as of ``Engine``.
    """

    def __init__(
        self,
        tasks: Sequence[TaskLike],
        *,
        domain: str,
        broker: Broker | str | None,
        fifo: bool,
        settings: Settings,
        given: frozenset[str],
    ) -> None:
        self.settings = settings
        self._given = given
        self.pipeline = build(tasks, domain=domain, fifo=fifo, visibility=settings.visibility)
        #: With every queue the pipeline can have: a source's input queue too, which ``map`` feeds.
        self.feedable = feedable(self.pipeline)
        self._wanted = parse(broker) if isinstance(broker, str) else broker
        #: The broker was given by ``override``: the environment has no say.
        self._overridden = False
        if broker is not None:
            check_timeouts(self.pipeline, resolve(self._wanted, domain, {}).longest_hold)
        self._broker: Broker | None = None
        self.runs = Runs()
        self.connection = KeptConnection()

    @property
    def broker(self) -> Broker:
        """The broker in use; chosen at the first access where the engine was given none."""
        if self._broker is None:
            domain = self.pipeline.domain
            self._broker = resolve(self._wanted, domain, {} if self._overridden else os.environ)
            if self._broker.temporary:
                # Names, not the pipeline: its tasks may refer to the engine, which would then never be finalized.
                dead = [stage.dead for stage in self.feedable.stages if stage.dead is not None]
                names = [name for name in self.feedable.queue_names() if name not in dead]
                weakref.finalize(self, _clean_up, self._broker, self.connection, os.getpid(), domain, names, dead)
        return self._broker

    def use(self, *, broker: Broker | str | None = None, on_error: OnError | None = None, weakly: bool = False) -> None:
        """Use another broker or ``on_error``; see ``override``."""
        if on_error is not None and not (weakly and "on_error" in self._given):
            self.settings = replace(self.settings, on_error=check_on_error("Engine(on_error)", on_error))
        if broker is not None:
            self._broker = None
            self._overridden = True
            self._wanted = parse(broker) if isinstance(broker, str) else broker
            check_timeouts(self.pipeline, resolve(self._wanted, self.pipeline.domain, {}).longest_hold)

    def feeder(self, **options: Any) -> Feeder:
        """Return what makes messages of values, with ``put``'s options. Raises ``ConfigError``."""
        check_not_importing(options["where"])
        return Feeder(self.pipeline, self.settings, longest_delay=lambda: self.broker.longest_delay, **options)

    def order(self, order: Mapping[str, object], name: str) -> None:
        """Give an order to the runs of a task. Raises ``ConfigError`` and ``OrderRefused``."""
        stage = self.pipeline.stage(name)
        self.runs.order({**order, "stage": stage.name}, stage.index)

    def plan_run(
        self, only: Only = None, *, iterate: bool = False, http: str | None = None, **options: Unpack[PlanArgs]
    ) -> RunPlan:
        """Return the plan of ``Engine.run`` with these arguments. Raises ``ConfigError``."""
        check_not_importing("run")
        if options.get("wait_for_broker") is None:
            options["wait_for_broker"] = _wait_of_environment()
        plan = make_plan(self.pipeline, self.settings, only=only, iterate=iterate, **options)
        return replace(plan, http=http_address(http))

    def start_run(
        self, plan: RunPlan, progress: bool | None = None, *, ended: Callable[[Summary], None] | None = None
    ) -> Summary:
        """Run a plan until it ends; raises as ``Engine.run`` does, after ``ended`` got the summary."""
        outcome = self.runs.run(plan, self._ready_for(plan), progress)
        if ended is not None:
            ended(outcome.summary)
        if outcome.failed:
            raise outcome.exception()
        return outcome.summary

    def iterate(self, plan: RunPlan, owner: object, progress: bool | None) -> Results[Any]:
        """Start a plan with a sink; ``owner``: lives as long as the iterator that is returned."""
        return self.runs.iterate(plan, self._ready_for(plan), owner, progress=progress)

    def map(self, owner: object, values: Iterable[Any], progress: bool | None, **options: Any) -> Results[Any]:
        """Start a map with ``Engine.map``'s options; ``owner``: lives as long as the iterator."""
        check_not_importing("map")
        source = self.pipeline.stages[0].name if self.pipeline.stages[0].is_source else None
        plan, job = plan_job(
            self.feedable, self.settings, values, source=source, wait_for_broker=_wait_of_environment(), **options
        )
        check_progress("map(progress)", progress)
        plan = replace(plan, http=http_address(None))
        broker = self._ready_for(plan)
        # A resumed map skips an unknown number of values.
        count = len(values) if isinstance(values, Sized) and not job.resumed else None
        # Before the look at the queues: messages found there must not be another map's.
        lock = MapLock.take(broker, plan.pipeline.domain, "map")
        try:
            make = partial(MapResults, job, survey(plan, broker, job), lock)
            return self.runs.iterate(plan, broker, owner, make, progress=progress, total=count)
        except BaseException:
            if lock is not None:
                # A supervisor that was started all the same holds the lock until it ends.
                lock.close()
            raise

    def stats(self) -> PipelineStats:
        """Count every queue, and read the latest run. Raises ``ConfigError`` and ``BrokerError``."""
        running, implied = self.runs.stages(), self.pipeline.stages[0].is_source
        with self.connection.use(self.broker) as connection:
            return read_stats(self.feedable, self.broker, connection, running, implied=implied)

    def existing(self, connection: Connection) -> list[str]:
        """Return the pipeline's queues; those that only ``map`` makes, a source's, where they exist."""
        own = self.pipeline.queue_names()
        return [*own, *existing(connection, [name for name in self.feedable.queue_names() if name not in own])]

    def _ready_for(self, plan: RunPlan) -> Broker:
        """Return the broker for a run that is about to start. Raises ``ConfigError`` where the run may not."""
        self.runs.check_beside(plan)
        broker = self.broker
        broker.check()
        if not (broker.temporary or broker.exists()):
            # From another folder a relative path is another file, in which a run that only drains finds nothing.
            idle = plan.source is None and plan.until == "drained" and not plan.counted
            log.log(
                logging.WARNING if idle else logging.INFO,
                "%s: a new file%s", broker.describe(), ", so nothing waits in it" if idle else "",
            )  # fmt: skip
        check_timeouts(plan.pipeline, broker.longest_hold)
        self.connection.close()
        return broker


# The command line and ``TaskClient`` need more of an engine than its users do: the functions below.


class HasParts(Protocol):
    """An ``Engine``."""

    _parts: EngineParts


def every_queue(engine: HasParts) -> Pipeline:
    """Return the pipeline with every queue it can have: a source's input queue too, which ``map`` feeds."""
    return engine._parts.feedable


def override(
    engine: HasParts, *, broker: Broker | str | None = None, on_error: OnError | None = None, weakly: bool = False
) -> None:
    """Have an engine use another broker or ``on_error`` from its next call on; None: the one it has.

    ``weakly``: the constructor's ``on_error`` is kept where it was given one. Raises ``ConfigError``.
    """
    engine._parts.use(broker=broker, on_error=on_error, weakly=weakly)


def connected(engine: HasParts) -> AbstractContextManager[Connection]:
    """Lend the connection that the engine keeps between two calls."""
    return engine._parts.connection.use(engine._parts.broker)


def plan_run(
    engine: HasParts, only: Only = None, *, iterate: bool = False, http: str | None = None, **options: Unpack[PlanArgs]
) -> RunPlan:
    """Return the plan of ``engine.run`` with these arguments. Raises ``ConfigError``."""
    return engine._parts.plan_run(only, iterate=iterate, http=http, **options)


def start_run(
    engine: HasParts,
    plan: RunPlan,
    progress: bool | None = None,
    *,
    ended: Callable[[Summary], None] | None = None,
) -> Summary:
    """Run a plan until it ends; raises as ``engine.run`` does, after ``ended`` got the summary."""
    return engine._parts.start_run(plan, progress, ended=ended)


def _wait_of_environment() -> float | None:
    """Return the seconds of ``SQSPIPES_WAIT_FOR_BROKER``; None: it is not set. Raises ``ConfigError``."""
    text = os.environ.get(_WAIT_VARIABLE)
    if not text:
        return None
    try:
        return seconds(_WAIT_VARIABLE, float(text))
    except ValueError:
        raise ConfigError(_WAIT_VARIABLE, text, "a number of seconds from 0") from None


def _clean_up(
    broker: Broker, connection: KeptConnection, owner: int, domain: str, queues: list[str], dead: list[str]
) -> None:
    """Remove a temporary file, in the process that made it, and log how many messages go with it."""
    if os.getpid() != owner:
        return
    with contextlib.suppress(Exception):
        connection.close()
        messages, letters = total(broker, queues), total(broker, dead)
        if messages or letters:
            log.warning(
                "%s: %d messages and %d dead letters go with the temporary file they were in. To keep such, "
                'write Engine(broker="sqlite:///%s.db")',
                domain, messages, letters, domain,
            )  # fmt: skip
    broker.cleanup()
