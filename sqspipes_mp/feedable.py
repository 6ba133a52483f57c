"""The part of ``Engine`` through which values go in: ``put``, ``put_many`` and ``map`` (caller)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sized
from functools import partial
from typing import Any

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.caller.feed import Feeder, put, put_many
from sqspipes_mp.caller.map import Mapping
from sqspipes_mp.caller.map_job import plan_job, survey
from sqspipes_mp.caller.map_lock import MapLock
from sqspipes_mp.caller.progress.progress import check as check_progress
from sqspipes_mp.caller.results import Iteration
from sqspipes_mp.caller.runs import Runs
from sqspipes_mp.caller.stats import opened
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.pipeline.plan import Settings, check_timeouts
from sqspipes_mp.pipeline.stages import Pipeline


class Feedable(ABC):
    """What an engine can be fed with."""

    _pipeline: Pipeline
    _settings: Settings
    _runs: Runs

    @property
    @abstractmethod
    def broker(self) -> Broker:
        """The broker in use."""

    def put(self, value: Any, *, priority: Any = 0, group: str | None = None, delay: float = 0, key: Any = None) -> str:
        """Send one value to the first task, declared with ``input=True``; any process may, no run is needed.

        Args:
            value: what the function gets, as JSON makes it.
            priority: 0 to 15, or callable(value), clamped to the first task's levels.
            group: FIFO group; default: the task's ``group``, else one per value.
            delay: seconds until it can be received, 0 to 900; standard queues only.
            key: a text, a whole number, or callable(value): the id it travels under. SQLite drops a value whose key
                it has seen since the last ``purge()``, SQS FIFO queues one seen within five minutes.

        Returns:
            Its id: the key, else a new one.

        Raises:
            ConfigError, OutputError, MessageTooLarge: nothing was sent.
            BrokerError: the queue service refuses.
        """
        feeder = Feeder(self._pipeline, self._settings, priority=priority, group=group, delay=delay, key=key)
        with opened(self.broker) as connection:
            return put(feeder, connection, value)

    def put_many(
        self,
        values: Iterable[Any],
        *,
        priority: Any = 0,
        group: str | None = None,
        delay: float = 0,
        key: Callable[[Any], Any] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Send many values, from any iterable, in batches that are checked as a whole before they are sent.

        Args:
            values: read as they are sent, so they may be more than fit into memory. Where they come slowly, one that
                comes 0.2 s or more after its batch was begun is sent at once, with what came before it; those that
                came quickly, fewer than a batch, wait for the next one or the end.
            priority, group, delay, key: as for ``put``; the key must be a callable.
            progress: called after each batch with the number of values sent so far.

        Returns:
            How many were new (on SQS, which does not tell: how many were sent).

        Raises:
            ConfigError: before anything is sent.
            PutError: later, with what was sent and what was not; the reason is its cause.
            Exception: the one that ``values`` or ``progress`` raised, with a note that tells how many were sent.
        """
        if key is not None and not callable(key):
            raise ConfigError("put_many(key)", key, "callable(value) or None", "One key for all would make them one")
        feeder = Feeder(
            self._pipeline, self._settings, priority=priority, group=group, delay=delay, key=key, where="put_many"
        )
        with opened(self.broker) as connection:
            return put_many(feeder, connection, values, progress)

    def map(
        self,
        values: Iterable[Any],
        *,
        ordered: bool = False,
        return_exceptions: bool = False,
        with_input: bool = False,
        key: Callable[[Any], Any] | None = None,
        resume: bool = False,
        progress: bool | None = None,
    ) -> Iteration:
        """Send values through all stages, run here, and iterate over what becomes of each.

        The first task is fed, also where it is declared as a source. A bounded number of values is on the way, so
        ``values`` may be endless; it is read in the caller's thread, between two results.

        Args:
            values: any iterable of what the first function takes.
            ordered: give results in the order of the values; default: as they come.
            return_exceptions: give the error of a value that was dead-lettered instead of raising it, its value in
                ``error.value``; "raise" as ``on_error`` then means "reject".
            with_input: give (value, result) pairs.
            key: callable(value) -> text or whole number, the id it travels under; needed for ``resume``. SQLite refuses
                one it has seen since the last ``purge()``, SQS one seen in this map.
            resume: continue a map that was interrupted (SQLite): what was done is skipped, what is under way awaited,
                and what is in a dead-letter queue ends as ``RemoteError``.
            progress: as of ``run``.

        Returns:
            An iterator, as of ``run(iterate=True)``: one result for each value, none where an output was dropped,
            several where a generator function made several. Its ``summary`` is there after the end.

        Raises:
            ConfigError, QueuesNotEmpty: before any process starts; MapRunning too, where another map of the pipeline
                is under way (SQLite).
            MapIncomplete: it was stopped, or others took messages; UnknownResult: others sent some.
            Exception: while iterating: as ``run``, and what a dead-lettered value's task raised.
        """
        plan, job = plan_job(
            self._pipeline, self._settings, values,
            ordered=ordered, return_exceptions=return_exceptions, with_input=with_input, key=key, resume=resume,
        )  # fmt: skip
        check_progress("map(progress)", progress)
        self._runs.check_beside(plan)
        broker = self.broker
        broker.check()
        check_timeouts(plan.pipeline, broker.longest_hold)
        # Of a resumed one nobody knows how many will be skipped.
        total = len(values) if isinstance(values, Sized) and not resume else None
        # Before the look at the queues: what is found there must be no other map's.
        lock = MapLock.take(broker, plan.pipeline.domain, "map")
        try:
            make = partial(Mapping, job, survey(plan, broker, job), lock)
            return self._runs.iterate(plan, broker, self, make, progress=progress, total=total)
        except BaseException:
            if lock is not None:
                # A supervisor that was started all the same keeps it until it ends.
                lock.close()
            raise
