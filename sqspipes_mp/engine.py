"""``Engine``: joins pipeline, broker and supervisor; between two calls it owns a connection at most (caller)."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, Unpack, get_args, overload

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.caller.arguments import Args, MapArgs, Only, RunArgs, StartMethod, V
from sqspipes_mp.caller.call import NoValue, rehearse
from sqspipes_mp.caller.choice import Choice
from sqspipes_mp.caller.dead_letters import DeadLetter, discard, look, redrive
from sqspipes_mp.caller.feed import put, put_many
from sqspipes_mp.caller.parts import EngineParts, connected, every_queue, override, plan_run, remembering, start_run
from sqspipes_mp.caller.progress.progress import check as check_progress
from sqspipes_mp.caller.results import Results
from sqspipes_mp.caller.stats import PipelineStats, opened
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.ipc.map_lock import no_map
from sqspipes_mp.ipc.summary import Summary
from sqspipes_mp.messages.limits import MAX_VISIBILITY
from sqspipes_mp.pipeline.checks import flag, seconds, sync_callable
from sqspipes_mp.pipeline.domain import constructing_file, derive_domain
from sqspipes_mp.pipeline.keywords import suggesting
from sqspipes_mp.pipeline.plan import MIN_VISIBILITY, Settings
from sqspipes_mp.pipeline.stages import Pipeline
from sqspipes_mp.pipeline.task import Key, OnError, TaskLike, Workers, check_on_error

__all__ = ["Engine", "connected", "every_queue", "override", "plan_run", "start_run"]  # Functions: cli and client.


class Engine:
    """A pipeline of tasks over one broker.

    The constructor only checks: no file, no network, no process before the first call of a method.

    Args:
        tasks: list of ``Task``, sqspipes's dicts, or callables, in the order the values go.
        domain: beginning of the queue names. Default: ``SQSPIPES_DOMAIN``, else the stem of the file that builds
            the engine (its folder's name for ``__main__.py`` and ``__init__.py``).
        broker: ``SQS(...)``, ``SQLite(path)`` or a URL. Default: ``SQSPIPES_BROKER``, else SQLite in ``./{domain}.db``
            (with a warning); AWS settings in the environment choose no broker.
        fifo: FIFO queues: each message once within SQS's five minutes, order kept within a task's ``group``.
        ignore_none: drop outputs that are None.
        on_error: "raise" (the run ends with the exception), "retry", "reject", or callable(exception, attempt) that
            returns one of these or a ``Retry``.
        setup: called first in every child process (logging, tracing).
        visibility_timeout: seconds, 2 to 43,200, to which the lease of a held message is extended; after a power cut
            the message comes back at its end.
        shutdown_grace: seconds that running calls have once a stop is asked for.
        start_method: "fork", "forkserver", "spawn"; None: fork on Linux (forkserver where other threads are alive),
            else spawn.
        create_queues: create missing queues; False: a missing one is an error.
        json_default: as ``json.dumps(default=)``; numpy scalars work without.

    Raises:
        ConfigError: naming the argument, its value, what is allowed and the cure.
    """

    _given: frozenset[str]

    @remembering
    @suggesting
    def __init__(
        self,
        tasks: Sequence[TaskLike],
        *,
        domain: str | None = None,
        broker: Broker | str | None = None,
        fifo: bool = False,
        ignore_none: bool = True,
        on_error: OnError = "raise",
        setup: Callable[[], object] | None = None,
        visibility_timeout: float = 60.0,
        shutdown_grace: float = 25.0,
        start_method: StartMethod | None = None,
        create_queues: bool = True,
        json_default: Callable[[Any], Any] | None = None,
    ) -> None:
        for field, switch in (("fifo", fifo), ("ignore_none", ignore_none), ("create_queues", create_queues)):
            flag(f"Engine({field})", switch)
        for field, hook in (("setup", setup), ("json_default", json_default)):
            if hook is not None:
                sync_callable(f"Engine({field})", hook)
        if start_method is not None and start_method not in get_args(StartMethod):
            raise ConfigError("Engine(start_method)", start_method, 'None, "fork", "forkserver" or "spawn"')
        settings = Settings(
            ignore_none=ignore_none,
            on_error=check_on_error("Engine(on_error)", on_error),
            setup=setup,
            visibility=seconds(
                "Engine(visibility_timeout)", visibility_timeout, least=MIN_VISIBILITY, most=MAX_VISIBILITY
            ),
            grace=seconds("Engine(shutdown_grace)", shutdown_grace),
            start_method=start_method,
            create_queues=create_queues,
            json_default=json_default,
        )
        if domain is None:
            domain = os.environ.get("SQSPIPES_DOMAIN") or derive_domain(constructing_file())
        self._parts = EngineParts(tasks, domain=domain, broker=broker, fifo=fifo, settings=settings, given=self._given)

    @property
    def domain(self) -> str:
        """The beginning of the queue names."""
        return self._parts.pipeline.domain

    @property
    def pipeline(self) -> Pipeline:
        """The checked tasks in their places, with the names of their queues."""
        return self._parts.pipeline

    @property
    def broker(self) -> Broker:
        """The broker in use; chosen at the first access where the constructor was given none."""
        return self._parts.broker

    @overload
    def run(self, only: Only = None, *, iterate: Literal[False] = False, **options: Unpack[RunArgs]) -> Summary: ...
    @overload
    def run(self, only: Only = None, *, iterate: Literal[True], **options: Unpack[RunArgs]) -> Results[Any]: ...
    @overload
    def run(self, only: Only = None, *, iterate: bool, **options: Unpack[RunArgs]) -> Summary | Results[Any]: ...
    @suggesting
    def run(
        self,
        only: Only = None,
        *,
        args: Args | None = None,
        workers: Workers | Mapping[str, Workers] | None = None,
        priority: int | Callable[[Any], int] = 0,
        min_priority: int | None = None,
        max_priority: int | None = None,
        iterate: bool = False,
        until: Literal["drained", "stopped"] | None = None,
        idle: float | None = None,
        wait_for_broker: float | None = None,
        progress: bool | None = None,
        http: str | None = None,
    ) -> Summary | Results[Any]:
        """Run the pipeline, or some of its stages, until stopped, drained, or an exception ends it.

        Args:
            only: a task's name or index, or a list of them: run just these here.
            args: positional arguments: a tuple where one task runs here, else {"name": tuple}.
            workers: a number or "auto" where one task runs here, else {"name": number}.
            priority: level of a source's outputs: an int, or callable(output) for every output sent here.
            min_priority: lowest level received here; default: all.
            max_priority: highest level received here; default: all.
            iterate: return an iterator over the outputs of the last task that runs here.
            until: "drained": return once the sources have ended and every queue is empty and settled; "stopped": go on
                until told. None: "drained" where the source is a generator and all tasks run here, else "stopped". The
                log line of the start tells which applies, and why.
            idle: seconds for which the queues must also have been empty, with "drained" and no source here. Default:
                60; 1 where the first task has ``input=True`` and all tasks run here. On SQS at least 60, as it is.
            wait_for_broker: seconds for which the start waits for a queue service that is unreachable (a container that
                starts at the same time); default: ``SQSPIPES_WAIT_FOR_BROKER``, which ``map`` heeds too, else 0.
            progress: None: a table of the stages at the foot of the terminal, where stderr is one and ``rich`` is
                installed (the extra ``progress``); True: elsewhere a line of the log (``sqspipes_mp.progress``, INFO)
                every 30 s in which something changed; False: nothing.
            http: "127.0.0.1:8090": serve metrics and health there, from a process of its own (the extra ``http``);
                ":8090": on every interface. Default: ``SQSPIPES_HTTP``, else none.

        Returns:
            Summary; or with ``iterate`` an iterator, closed by leaving its ``with``, ``close()`` or its end.

        Raises:
            ConfigError: before any process starts.
            KeyboardInterrupt: after a SIGINT has stopped the run, with the Summary as its ``summary``. After SIGTERM it
                returns.
            BrokerError, BootError, RestartLimit, RemoteError: as ``errors`` explains them.
            Exception: the one a task raised, as itself, with the worker's frames.
        """
        check_progress("run(progress)", progress)
        plan = self._parts.plan_run(
            only,
            args=args,
            workers=workers,
            priority=priority,
            min_priority=min_priority,
            max_priority=max_priority,
            iterate=iterate,
            until=until,
            idle=idle,
            wait_for_broker=wait_for_broker,
            http=http,
        )
        if plan.sink is not None:
            return self._parts.iterate(plan, self, progress)
        return self._parts.start_run(plan, progress)

    def stop(self) -> None:
        """Stop every run of this engine in this process, as SIGTERM does; from any thread."""
        self._parts.runs.stop()

    def pause(self, name: str) -> None:
        """Pause a task: no call of it begins from now on.

        Its workers finish their calls, give back what they hold, and receive nothing until ``resume``; the other tasks
        go on. Like ``resume``, ``scale`` and ``cancel`` it is for the runs of this engine that this process has under
        way, and any thread but the one in ``run`` may call it.

        Args:
            name: the task's.

        Raises:
            ConfigError: no task has this name.
            OrderRefused: no run under way has the task, or it has just ended.
        """
        self._parts.order({"do": "pause"}, name)

    def resume(self, name: str) -> None:
        """Have a paused task go on; as ``pause``."""
        self._parts.order({"do": "resume"}, name)

    def scale(self, name: str, workers: int) -> None:
        """Have so many workers of a task from now on, until the run's end.

        Workers are added, or leave when their message is done. Returns once new workers are ready, or after 10 s.

        Args:
            name: the task's.
            workers: 1 up to the room that was reserved at the start: four times the CPUs or the task's workers,
                whichever is more, at least 32. A generator source has one.

        Raises:
            ConfigError: no task has this name.
            OrderRefused: as of ``pause``; too many; or a new worker did not boot, and there are as many as before.
        """
        self._parts.order({"do": "scale", "workers": workers}, name)

    def cancel(self, id: str) -> None:
        """Cancel a running call: its worker is killed, and the message goes to the dead-letter queue as ``Cancelled``.

        Other calls of the worker (``threads``, ``batch``) run again, uncharged. With ``batch`` it is the message's next
        delivery that moves it.

        Args:
            id: the hop id of the call's message (``current_message().hop``), or its first characters.

        Raises:
            OrderRefused: no such call runs, or it ended before its worker could be killed.
        """
        self._parts.runs.order({"do": "cancel", "call": id})

    def put(
        self,
        value: V,
        *,
        priority: int | Callable[[V], int] = 0,
        group: str | None = None,
        tenant: str | Callable[[V], object] | None = None,
        delay: float = 0,
        key: Key | Callable[[V], Key] | None = None,
    ) -> str:
        """Send one value to the first task, declared with ``input=True``; any process may, no run is needed.

        Args:
            value: the function's input; the function gets what JSON makes of it.
            priority: 0 to 15, or callable(value), clamped to the first task's levels.
            group: FIFO group; default: the task's ``group``, else one per value.
            tenant: a text or callable(value): whose value it is, where tenants take turns (standard queues); default:
                the task's ``tenant``.
            delay: seconds until it is due; standard queues only. SQLite: any time; SQS: up to 43,200 (12 hours), and a
                day less than its retention.
            key: a text, a whole number, or callable(value): the value's id. SQLite drops a value whose key it has
                seen since the last ``purge()``, a FIFO queue of SQS one whose key it has seen within five minutes.

        Returns:
            The value's id: the key, else a new one.

        Raises:
            ConfigError, OutputError, MessageTooLarge: nothing was sent.
            BrokerError: the queue service refuses.
        """
        feeder = self._parts.feeder(priority=priority, group=group, tenant=tenant, delay=delay, key=key, where="put")
        with self._parts.connection.use(self.broker) as connection:
            return put(feeder, connection, value)

    def put_many(
        self,
        values: Iterable[V],
        *,
        priority: int | Callable[[V], int] = 0,
        group: str | None = None,
        tenant: str | Callable[[V], object] | None = None,
        delay: float = 0,
        key: Callable[[V], Key] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Send many values, from any iterable, in batches that are checked as a whole before they are sent.

        Args:
            values: any iterable, read as it is sent, so it may be larger than memory. A value that comes 0.2 s or more
                after its batch was begun is sent at once, with the batch; fewer values than a batch that came quickly
                wait for the next value or the end.
            priority, group, tenant, delay, key: as for ``put``; the key must be a callable.
            progress: called after each batch with the number of values sent so far.

        Returns:
            How many were new (on SQS, which does not tell: how many were sent).

        Raises:
            ConfigError: before anything is sent.
            PutError: later, with the numbers of values that were sent; the reason is its cause.
            Exception: the one that ``values`` or ``progress`` raised, with a note on how many were sent.
        """
        if key is not None and not callable(key):
            raise ConfigError("put_many(key)", key, "callable(value) or None", "One key for all would make them one")
        feeder = self._parts.feeder(
            priority=priority, group=group, tenant=tenant, delay=delay, key=key, where="put_many"
        )
        with self._parts.connection.use(self.broker) as connection:
            return put_many(feeder, connection, values, progress)

    @overload
    def map(
        self,
        values: Iterable[V],
        *,
        with_input: Literal[False] = False,
        return_exceptions: bool = False,
        **options: Unpack[MapArgs[V]],
    ) -> Results[Any]: ...
    @overload
    def map(
        self,
        values: Iterable[V],
        *,
        with_input: Literal[True],
        return_exceptions: bool = False,
        **options: Unpack[MapArgs[V]],
    ) -> Results[tuple[V, Any]]: ...
    @overload
    def map(
        self,
        values: Iterable[V],
        *,
        with_input: bool,
        return_exceptions: bool = False,
        **options: Unpack[MapArgs[V]],
    ) -> Results[tuple[V, Any]] | Results[Any]: ...
    @suggesting
    def map(
        self,
        values: Iterable[V],
        *,
        ordered: bool = False,
        return_exceptions: bool = False,
        with_input: bool = False,
        key: Callable[[V], Key] | None = None,
        resume: bool = False,
        keep_results: bool = False,
        progress: bool | None = None,
    ) -> Results[Any]:
        """Send values through all stages, run here, and iterate over their results.

        The first task is fed, also where it is declared as a source. A bounded number of values is on the way, so
        ``values`` may be endless; it is read in the caller's thread, between two results.

        Args:
            values: any iterable of inputs of the first function.
            ordered: give results in the order of the values; default: as they come.
            return_exceptions: give the error of a value that was dead-lettered instead of raising it, its value in
                ``error.value``; "raise" as ``on_error`` then means "reject".
            with_input: give (value, result) pairs.
            key: callable(value) -> text or whole number, the value's id; needed for ``resume``. SQLite refuses a key
                it has seen since the last ``purge()``, SQS a key seen in this map.
            resume: continue a map that was interrupted (SQLite): values that are done are skipped, those under way
                awaited, and those in a dead-letter queue end as ``RemoteError``.
            keep_results: keep the results, as JSON, in the SQLite file, and hand out those of earlier runs too, when
                ``values`` comes to their keys, until ``purge()``; implies ``resume``. A result that is no JSON fails
                the function. ``run`` keeps the results of values that it finishes.
            progress: as of ``run``.

        Returns:
            An iterator, as of ``run(iterate=True)``: one result for each value, none where an output was dropped,
            several where a generator function made several. Its ``summary`` is there after the end.

        Raises:
            ConfigError, QueuesNotEmpty: before any process starts; MapRunning too, where another map of the pipeline
                is under way (SQLite).
            ResultsNotKept: with ``keep_results``, for values that were done or sent without it.
            MapIncomplete: it was stopped, or others took messages; UnknownResult: others sent some.
            Exception: while iterating: as ``run``, and the exception that dead-lettered a value.
        """
        return self._parts.map(
            self, values, progress,
            ordered=ordered, return_exceptions=return_exceptions, with_input=with_input, key=key, resume=resume,
            keep_results=keep_results,
        )  # fmt: skip

    @overload
    def call(self) -> list[Any]: ...
    @overload
    def call(self, value: Any) -> list[Any]: ...
    def call(self, value: Any = NoValue.GIVEN) -> list[Any]:
        """Send one value through all functions here: no broker, no process, the same JSON and drop rules.

        Args:
            value: as for ``put``; of a source its only argument. Without it a source is called with its ``args``.

        Returns:
            The last function's outputs.

        Raises:
            ConfigError: the first function does not take that value.
            OutputError, MessageTooLarge: the value, or an output, cannot be sent.
            Exception: the one that a function raised, as itself; a ``Retry`` or ``Reject`` has a note on its meaning in
                a run.
        """
        return rehearse(self._parts.pipeline, self._parts.settings, value)

    def stats(self) -> PipelineStats:
        """Count every queue, and read this engine's latest run. Raises ``ConfigError`` and ``BrokerError``."""
        return self._parts.stats()

    def dead_letters(self) -> list[DeadLetter]:
        """Return all dead letters, by stage and time. On SQS they are hidden from others meanwhile.

        Raises ``ConfigError`` and ``BrokerError``.
        """
        return look(self._parts.feedable, self.broker)

    def redrive(
        self,
        ids: Collection[str] | None = None,
        *,
        stage: str | None = None,
        error: str | None = None,
        since: datetime | timedelta | None = None,
        match: str | None = None,
    ) -> list[DeadLetter]:
        """Put the dead letters that fit back into the queues they failed in, with no attempts charged.

        Args:
            ids: ids, or unique beginnings of ids; None: all.
            stage: only those of this task.
            error: only those of this exception, by its name.
            since: only those that failed at this time or later, or not longer ago than this.
            match: only those with this text in their key, value, body or error.

        Returns:
            The letters that were put back. What another command holds just now is left out.

        Raises:
            ConfigError, BrokerError: nothing was moved; the text says why.
        """
        chosen = Choice.of("redrive", stage=stage, error=error, since=since, match=match)
        return list(redrive(self._parts.feedable, self.broker, ids, chosen).letters)

    def discard(
        self,
        ids: Collection[str] | None = None,
        *,
        stage: str | None = None,
        error: str | None = None,
        since: datetime | timedelta | None = None,
        match: str | None = None,
    ) -> list[DeadLetter]:
        """Delete dead letters for good; arguments, result and errors as of ``redrive``."""
        chosen = Choice.of("discard", stage=stage, error=error, since=since, match=match)
        return list(discard(self._parts.feedable, self.broker, ids, chosen).letters)

    def purge(self) -> None:
        """Remove every message of exactly this pipeline's queues, dead letters included.

        Raises ``MapRunning`` while a map of the pipeline is under way, and ``ConfigError`` where one of the queues is
        another pipeline's own (both on SQLite only).
        """
        with no_map(self.broker, self.domain, "purge"), opened(self.broker) as connection:
            connection.check_owners(self._parts.feedable.queues)
            connection.purge(self._parts.existing(connection))

    def delete(self) -> None:
        """Delete exactly this pipeline's queues. Raises as ``purge`` does."""
        with no_map(self.broker, self.domain, "delete"), opened(self.broker) as connection:
            connection.check_owners(self._parts.feedable.queues)
            connection.delete(self._parts.feedable.queue_names())
        # It knows the addresses of the queues, which SQS answers for some time after their end.
        self._parts.connection.close()

    def close(self) -> None:
        """Close the connection that ``put``, ``put_many`` and ``stats`` keep for half a minute after their last use.

        Calls of other threads go on, and a later call opens another. A run closes it before it forks, and the end of
        the engine or the process closes it, too.
        """
        self._parts.connection.close()
