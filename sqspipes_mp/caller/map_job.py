"""The job of one ``engine.map``: its arguments checked, its plan made, its queues looked at (caller)."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any
from uuid import uuid4

from sqspipes_mp.brokers.base import Broker, KeyedConnection, as_keyed
from sqspipes_mp.brokers.waiting import once_reachable
from sqspipes_mp.caller.feed import Feeder
from sqspipes_mp.caller.ledger import Ledger
from sqspipes_mp.caller.stats import opened
from sqspipes_mp.errors import ConfigError, DecodeError, QueuesNotEmpty, RemoteError, ResultsNotKept
from sqspipes_mp.messages.envelope import decode
from sqspipes_mp.messages.failure import Failure, parse_failure
from sqspipes_mp.messages.ids import token
from sqspipes_mp.messages.plain import lines, one_line
from sqspipes_mp.pipeline.checks import flag
from sqspipes_mp.pipeline.plan import RunPlan, Settings, make_plan
from sqspipes_mp.pipeline.stages import Pipeline, fed
from sqspipes_mp.pipeline.task import Key
from sqspipes_mp.pipeline.value_ends import KEEP, RESUME, is_kept

log = logging.getLogger("sqspipes_mp.engine")


#: Results of each worker on the way: while values are fed over a network, nobody acknowledges any for a round trip.
_WINDOW = 128


@dataclass(slots=True, kw_only=True)
class Job:
    """The arguments of one map."""

    values: Iterable[Any]
    #: Makes and sends the values' messages.
    feeder: Feeder
    ordered: bool
    return_exceptions: bool
    with_input: bool
    #: Whether an interrupted map is to be continued.
    resumed: bool
    #: Whether the results are kept for every run.
    keeps: bool
    #: Results that were recorded under lower numbers are of earlier runs.
    recorded_before: int = 0
    #: Name of the first task where it is declared as a source: a ``run`` would call it instead of feeding it.
    source: str | None


def plan_job(
    pipeline: Pipeline,
    settings: Settings,
    values: Iterable[Any],
    *,
    ordered: bool,
    return_exceptions: bool,
    with_input: bool,
    key: Callable[[Any], Key] | None,
    resume: bool,
    keep_results: bool,
    source: str | None,
    wait_for_broker: float | None = None,
) -> tuple[RunPlan, Job]:
    """Check ``map``'s arguments. Raises ``ConfigError``.

    Args:
        pipeline: with every queue it can have (``pipeline.stages.feedable``).
        source: name of the first task where it is declared as a source.
    """
    for field, switch in (
        ("ordered", ordered), ("return_exceptions", return_exceptions), ("with_input", with_input), ("resume", resume),
        ("keep_results", keep_results),
    ):  # fmt: skip
        flag(f"map({field})", switch)
    if not isinstance(values, Iterable):
        raise ConfigError("map(values)", values, "an iterable", "Write [value]")
    if key is not None and not callable(key):
        raise ConfigError("map(key)", key, "callable(value) or None", "One key for all would make them one")
    if (resume or keep_results) and key is None:
        wanted = "keep_results=True" if keep_results else "resume=True"
        raise ConfigError("map(key)", key, f"given with {wanted}", "Without a key no value is known again")
    pipeline = fed(pipeline)
    if return_exceptions:
        settings, pipeline = _rejecting(settings, pipeline)
    feeder = Feeder(pipeline, settings, key=key, where="map")
    if key is not None:
        feeder.mark = KEEP if keep_results else RESUME
    plan = make_plan(pipeline, settings, iterate=True, wait_for_broker=wait_for_broker)
    plan = replace(plan, counted=True, idle=0.0, window=None if ordered else _WINDOW)
    job = Job(
        values=values,
        feeder=feeder,
        ordered=ordered,
        return_exceptions=return_exceptions,
        with_input=with_input,
        resumed=resume or keep_results,
        keeps=keep_results,
        source=source,
    )
    return plan, job


def _rejecting(settings: Settings, pipeline: Pipeline) -> tuple[Settings, Pipeline]:
    """Have every task whose ``on_error`` is "raise" dead-letter its message instead."""
    if settings.on_error == "raise":
        settings = replace(settings, on_error="reject")
    stages = [
        replace(stage, task=replace(stage.task, on_error="reject")) if stage.task.on_error == "raise" else stage
        for stage in pipeline.stages
    ]
    return settings, replace(pipeline, stages=tuple(stages))


def survey(plan: RunPlan, broker: Broker, job: Job) -> Ledger:
    """Look into the queues before anything runs; return the ledger of the messages that an interrupted map has left.

    A message counts as left by a map where its value was sent with a key, by ``map`` or ``put``: the iterable may come
    to that value. Raises ``QueuesNotEmpty`` for any other message, ``ResultsNotKept`` for one whose results would not
    be kept, and ``ConfigError``.
    """
    ledger = Ledger(ordered=job.ordered, inputs=job.with_input)
    pipeline = plan.pipeline
    if job.keeps and not broker.remembers_keys:
        instead = "Write the results to a place of your own, or use SQLite"
        raise ConfigError("map(keep_results)", True, "False on SQS, which has no place for them", instead)
    queues = [name for stage in pipeline.stages for name in stage.inputs]
    with opened(broker) as connection:
        ensure = partial(connection.ensure, pipeline.specs_for(plan.selected), create=plan.settings.create_queues)
        once_reachable(ensure, plan.wait_for_broker, threading.Event().wait)
        looking = as_keyed(broker, connection)
        if looking is None:
            job.feeder.mark = None
            # FIFO queues drop a key of the last five minutes without a word: its result would never come.
            job.feeder.salt = uuid4().hex
        if not job.resumed:
            depths = [connection.depth(name) for name in queues]
            if count := sum(depth.visible + depth.in_flight + depth.delayed for depth in depths):
                raise QueuesNotEmpty(pipeline.domain, count, cure(job, broker))
            return ledger
        if looking is None:
            raise ConfigError("map(resume)", True, "False on SQS, which cannot tell what was sent before")
        if held := sum(connection.depth(name).in_flight for name in queues):
            log.warning(
                "%s: waiting for %d messages that a killed run held (or one that goes on holds): they come back within "
                "%g s, when its leases end",
                pipeline.domain, held, plan.settings.visibility,
            )  # fmt: skip
        left: list[tuple[str, str]] = []
        unkept = 0
        for name in queues:
            for body, ident, _ in looking.bodies(name):
                # A body that cannot be decoded gives no result, only a dead letter.
                with contextlib.suppress(DecodeError):
                    message = decode(body, ident)
                    left.append((token(message.id), message.parent))
                    unkept += not is_kept(message.meta)
        keyed = looking.keyed(pipeline.stages[0].inputs, list({name for name, _ in left}))
        if strange := sum(name not in keyed for name, _ in left):
            # Sent without a key: no iterable will ever come to their values.
            raise QueuesNotEmpty(pipeline.domain, strange, _cure_beside(job, len(left) - strange))
        if unkept and job.keeps:
            raise not_kept(job, unkept, "are under way")
        # After the look: a result that is recorded in between is of an earlier run.
        job.recorded_before = looking.next_end()
        for name, hop in left:
            ledger.left(name, [hop])
        # After the live queues: a message that is dead-lettered meanwhile is seen twice rather than never.
        for name in [stage.dead for stage in pipeline.stages if stage.dead is not None]:
            for body, ident, failure in looking.bodies(name):
                with contextlib.suppress(DecodeError):
                    message = decode(body, ident)
                    ledger.dead(token(message.id), message.parent, _dead_error(name, failure))
        _tell_of_earlier(pipeline, looking, ledger, keeps=job.keeps)
    if len(ledger):
        log.info("%s: %d values of an interrupted map are still in the queues", pipeline.domain, len(ledger))
    return ledger


def _tell_of_earlier(pipeline: Pipeline, connection: KeyedConnection, ledger: Ledger, *, keeps: bool) -> None:
    """Warn of the values that earlier runs have done: they are not run again."""
    known = [connection.keys(name) for name in pipeline.stages[0].inputs]
    done = sum(count for count, _ in known) - len(ledger) - ledger.dead_values
    if done <= 0:
        return
    first = min((since for _, since in known if since is not None), default=None)
    since = "" if first is None else f" since {datetime.fromtimestamp(first).astimezone():%Y-%m-%d %H:%M:%S %Z}"
    meaning = (
        "map(keep_results=True) hands out their kept results again. Where the functions have changed, purge() first"
        if keeps
        else "map(resume=True) hands out none but the results that a run() made of its values since. "
        "map(keep_results=True) hands out all results in every run; purge() forgets what was done"
    )
    log.warning("%s: %d values were done by earlier runs%s: %s", pipeline.domain, done, since, meaning)


def _dead_error(queue: str, text: str | None) -> RemoteError:
    """Return the error of a value that was dead-lettered before: its text only, as nothing of a queue is unpickled."""
    failure = Failure(error="unknown", text="the reason did not fit") if text is None else parse_failure(text)
    # Escaped: anybody who may send to the queue has written this.
    whole = lines(failure.traceback or failure.stack or failure.text)
    error = RemoteError(one_line(failure.error), one_line(failure.text, len(failure.text)), whole)
    error.add_note(
        f"an earlier run moved it to {queue}: `sqspipes-mp dead list` shows it, `dead redrive` has the next map run it "
        "again, `dead discard` gives it up; map(return_exceptions=True) goes on without it"
    )
    return error


def cure(job: Job, broker: Broker) -> str:
    """Return the cure for messages that are left in the queues, in this very case."""
    clearing = _clearing(job)
    if not (broker.remembers_keys and job.feeder.keyed):
        return clearing
    if job.resumed:
        return "Run it again, with the same values: it goes on where it was"
    return f"Continue an interrupted map that had this key with resume=True, {clearing[0].lower()}{clearing[1:]}"


def _clearing(job: Job) -> str:
    finish = 'Finish them with run(until="drained", idle=1)'
    if job.source is not None:
        finish = f'Finish them: write Task({job.source}, input=True), then run(until="drained", idle=1)'
    return f"{finish}, or drop them with purge()"


def _cure_beside(job: Job, keyed: int) -> str:
    """Return the cure for messages without a key, where a map with a key is to be continued."""
    text = f"They were sent without a key, so resume=True cannot continue them. {_clearing(job)}"
    if keyed:
        text += (
            f"; either does so with the {keyed:,} of the interrupted map, too, whose results are then not handed out"
        )
    return text


def not_kept(job: Job, count: int, state: str) -> ResultsNotKept:
    """Return the error of values that were done, or sent, without ``keep_results``; ``state`` says which."""
    finish = "Leave keep_results out and go on with resume=True, or run them all anew after purge()"
    return ResultsNotKept(job.feeder.domain, count, state, finish)


def known_key(key: str, broker: Broker) -> ConfigError:
    """Return the error of a value whose key was seen before."""
    if broker.remembers_keys:
        allowed = "a key that was not seen before, in this map or an earlier one"
        return ConfigError(
            "map(key)", key, allowed, "resume=True continues an interrupted map, purge() forgets all keys"
        )
    return ConfigError("map(key)", key, "a key that was not seen before in this map", "Return another for each value")
