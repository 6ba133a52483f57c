"""``sqspipes-mp run``: flags and environment to the options of a run, then the run (the command line's process)."""

from __future__ import annotations

import logging
import math
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from sqspipes_mp.cli.console import Console, table
from sqspipes_mp.cli.exits import STOPPED_BY, Exit, Refused
from sqspipes_mp.cli.loading import load
from sqspipes_mp.cli.summary_file import check_writable, write_summary
from sqspipes_mp.engine import override, plan_run, start_run
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.ipc.histogram import duration
from sqspipes_mp.ipc.summary import Summary
from sqspipes_mp.pipeline.ends import has_end
from sqspipes_mp.pipeline.plan import RunPlan, Until
from sqspipes_mp.pipeline.source_leftovers import behind_source, finishing_command
from sqspipes_mp.pipeline.stages import Pipeline, Stage
from sqspipes_mp.pipeline.task import Policy

POLICIES = ("raise", "retry", "reject")
UNTIL = ("drained", "stopped")
LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("text", "json")
SWITCH = ("on", "off")


def run(flags: Namespace, console: Console) -> Exit:
    """Run the engine until it ends, and show its summary. Raises as ``engine.run`` does; ``console.finish`` is set."""
    options = run_options(flags, os.environ)
    console.configure(options.log_level, options.log_format)
    engine = load(flags.target)
    override(engine, broker=options.broker)
    if options.on_error is not None:
        policy = cast("Policy", options.on_error.value)
        override(engine, on_error=policy, weakly=not options.on_error.from_flag)
    only = task_names(options.only, engine.pipeline)
    workers = worker_counts(options.workers, engine.pipeline, only)
    plan = plan_run(
        engine,
        only,
        workers=workers,
        until=options.until,
        idle=options.idle,
        wait_for_broker=options.wait,
        http=flags.http,
    )
    plan = replace(plan, started_as=flags.target)
    console.finish = finishing_command(behind_source(plan), flags.target, flags.broker)
    with console.held():
        engine.broker.check()
        if not console.tells:
            names = ", ".join(f"{engine.pipeline.stages[index].name} x{plan.workers[index]}" for index in plan.selected)
            console.say(f"{engine.domain} on {engine.broker.describe()}: {names}")
    summary: Summary | None
    file = options.summary_json
    write = None if file is None else partial(write_summary, file, engine.domain)
    try:
        summary = start_run(engine, plan, options.progress, ended=write)
    except KeyboardInterrupt as interrupt:
        # A KeyboardInterrupt that a task raised has no summary.
        summary = getattr(interrupt, "summary", None)
        if summary is None:
            raise
    return _exit(plan, summary, console, flags.target)


def _exit(plan: RunPlan, summary: Summary, console: Console, target: str) -> Exit:
    if not console.tells_end:
        console.say(f"{summary.reason} after {summary.seconds:.1f} s\n\n{summary_table(summary)}")
    if has_end(plan) and (stopped := STOPPED_BY.get(summary.reason)):
        return stopped
    if summary.reason not in {"drained", "ended"} or not summary.dead:
        return Exit.DONE
    stages = ", ".join(f"{stage.name} {stage.dead}" for stage in summary.stages if stage.dead)
    console.fail(f"drained, but with dead-lettered messages: {stages}. See sqspipes-mp dead list {target}")
    return Exit.DEAD_LETTERS


def summary_table(summary: Summary) -> str:
    """Return a table of the stages' figures."""
    columns = ("stage", "workers", "done", "failed", "dead", "retried", "busy", "p50", "p95")
    rows = [
        (
            stage.name, stage.workers, stage.done, stage.failed, stage.dead, stage.retried,
            f"{stage.busy:.0%}", duration(stage.p50), duration(stage.p95),
        )
        for stage in summary.stages
    ]  # fmt: skip
    return table(columns, rows)


# -- options ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """A value that was given on the command line or in the environment."""

    #: Name of the flag or variable.
    source: str
    value: str

    @property
    def from_flag(self) -> bool:
        return self.source.startswith("--")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options of one run; None or empty: not given."""

    only: list[Given]
    #: Flags first, then those of the environment, which yield to the code.
    workers: list[Given]
    broker: str | None
    until: Until | None
    idle: float | None
    #: Seconds for which to wait for the broker; the engine reads the environment's itself.
    wait: float | None
    on_error: Given | None
    log_level: int
    log_format: str
    progress: bool
    #: Where to write the summary.
    summary_json: Path | None


def run_options(flags: Namespace, environ: Mapping[str, str]) -> RunOptions:
    """Read flags and environment. Raises ``Refused`` naming the flag or the variable."""

    def one(flag: str, allowed: Sequence[str], default: str | None = None) -> Given | None:
        found = _from_flag(flags, flag) or _from_variable(environ, flag)
        if not found:
            return Given("default", default) if default else None
        value = found[0].value.lower()
        if value not in allowed:
            raise Refused(f"{found[0].source} must be {_either(allowed)}, got {found[0].value!r}")
        return Given(found[0].source, value)

    only = _from_flag(flags, "only") or _split(_from_variable(environ, "only"))
    until, level, form = one("until", UNTIL), one("log-level", LEVELS, "info"), one("log-format", FORMATS, "text")
    progress = one("progress", SWITCH, "on")
    assert progress is not None
    assert level is not None
    assert form is not None
    return RunOptions(
        only=only,
        workers=[*_from_flag(flags, "workers"), *_split(_from_variable(environ, "workers"))],
        # The engine reads SQSPIPES_BROKER itself: it knows whether its constructor was given a broker.
        broker=flags.broker,
        until=cast("Until", until.value) if until else None,
        idle=_idle(flags, environ, ends=until is not None and until.value == "drained"),
        wait=next((_seconds(given) for given in _from_flag(flags, "wait-for-broker")), None),
        on_error=one("on-error", POLICIES),
        log_level=logging.getLevelNamesMapping()[level.value.upper()],
        log_format=form.value,
        progress=progress.value == "on",
        summary_json=_file(flags, environ),
    )


def task_names(given: Sequence[Given], pipeline: Pipeline) -> list[str] | None:
    """Return the names of the tasks to run here; None: all. Raises ``Refused`` for an unknown task."""
    return [_stage(one, pipeline, one.value).name for one in given] or None


def worker_counts(given: Sequence[Given], pipeline: Pipeline, only: Sequence[str] | None) -> dict[str, Any]:
    """Return the number of workers of each task that was named; a bare number is for the one task that runs here.

    Numbers of the environment yield to a ``Task(workers=)`` other than 1, and may name tasks that run elsewhere. Raises
    ``Refused`` for an unknown task, and for a value that is no number.
    """
    stages = [pipeline.stage(name) for name in only] if only else list(pipeline.stages)
    names = [stage.name for stage in stages]
    counts: dict[str, Any] = {}
    for one in given:
        named, _, text = one.value.rpartition("=")
        count: Any = int(text) if text.isdecimal() else text
        if count != "auto" and (not isinstance(count, int) or count < 1):
            raise Refused(f"{one.source} must be a number from 1, auto, or NAME=one of them, got {one.value!r}")
        if not named and len(names) > 1:
            raise Refused(
                f"{one.source} must be NAME={text} where several tasks run ({', '.join(names)}), got {one.value!r}. "
                f"Write {one.source}{' ' if one.from_flag else '='}{names[-1]}={text}, or run one of them with --only"
            )
        stage = _stage(one, pipeline, named or names[0])
        if one.from_flag or (stage.name in names and stage.task.workers == 1):
            counts.setdefault(stage.name, count)
    return counts


def _idle(flags: Namespace, environ: Mapping[str, str], *, ends: bool) -> float | None:
    """Return the seconds of ``run(idle)``; those of the environment hold only for runs with an end."""
    for given in _from_flag(flags, "idle") or (_from_variable(environ, "idle") if ends else []):
        seconds = _seconds(given)
        if not ends:
            raise Refused(f"{given.source} goes with an end that it puts off: add --until drained")
        return seconds
    return None


def _seconds(given: Given) -> float:
    """Return a number of seconds. Raises ``Refused``."""
    try:
        seconds = float(given.value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise Refused(f"{given.source} must be a number of seconds from 0, got {given.value!r}")
    return seconds


def _file(flags: Namespace, environ: Mapping[str, str]) -> Path | None:
    for given in _from_flag(flags, "summary-json") or _from_variable(environ, "summary-json"):
        check_writable(given.source, Path(given.value))
        return Path(given.value)
    return None


def _stage(given: Given, pipeline: Pipeline, name: str) -> Stage:
    try:
        return pipeline.stage(name, given.source)
    except ConfigError as error:
        raise Refused(str(error)) from None


def _from_flag(flags: Namespace, flag: str) -> list[Given]:
    value = getattr(flags, flag.replace("-", "_"))
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [Given(f"--{flag}", each) for each in values]


def _from_variable(environ: Mapping[str, str], flag: str) -> list[Given]:
    name = f"SQSPIPES_{flag.replace('-', '_').upper()}"
    return [Given(name, environ[name])] if environ.get(name) else []


def _split(found: list[Given]) -> list[Given]:
    return [Given(one.source, part.strip()) for one in found for part in one.value.split(",") if part.strip()]


def _either(allowed: Sequence[str]) -> str:
    return " or ".join([", ".join(allowed[:-1]), allowed[-1]] if len(allowed) > 1 else allowed)
