"""``sqspipes-mp run``: the user's engine, from flags and environment to an exit code (the command line's process)."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import cast

from sqspipes_mp.cli.console import Console
from sqspipes_mp.cli.exits import Exit
from sqspipes_mp.cli.loading import load
from sqspipes_mp.cli.options import run_options, task_names, worker_counts
from sqspipes_mp.cli.table import table
from sqspipes_mp.engine import override, plan_run, start_run
from sqspipes_mp.ipc.histogram import duration
from sqspipes_mp.ipc.summary import Summary
from sqspipes_mp.pipeline.leftovers import behind_source, finishing_command
from sqspipes_mp.pipeline.task import Policy


def run(flags: Namespace, console: Console) -> Exit:
    """Run the engine until it ends. Raises what it raises; ``flags.finish`` is then what finishes what it has left."""
    options = run_options(flags, os.environ)
    console.configure(options.log_level, options.log_format)
    engine = load(flags.target)
    override(engine, broker=options.broker)
    if options.on_error is not None:
        policy = cast("Policy", options.on_error.value)
        override(engine, on_error=policy, weakly=not options.on_error.from_flag)
    only = task_names(options.only, engine.pipeline)
    workers = worker_counts(options.workers, engine.pipeline, only)
    plan = plan_run(engine, only, workers=workers, until=options.until, idle=options.idle)
    flags.finish = finishing_command(behind_source(plan), flags.target, flags.broker)
    with console.held():
        engine.broker.check()
        names = ", ".join(f"{engine.pipeline.stages[index].name} x{plan.workers[index]}" for index in plan.selected)
        console.say(f"{engine.domain} on {engine.broker.describe()}: {names}")
    summary: Summary | None
    try:
        summary = start_run(engine, plan, options.progress)
    except KeyboardInterrupt as interrupt:
        # A task that raised it has none.
        summary = getattr(interrupt, "summary", None)
        if summary is None:
            raise
    return _exit(summary, console, flags.target)


def _exit(summary: Summary, console: Console, target: str) -> Exit:
    console.say(f"{summary.reason} after {summary.seconds:.1f} s\n\n{summary_table(summary)}")
    if summary.reason != "drained" or not summary.dead:
        return Exit.DONE
    stages = ", ".join(f"{stage.name} {stage.dead}" for stage in summary.stages if stage.dead)
    console.fail(f"drained, but with dead-lettered messages: {stages}. See sqspipes-mp dead list {target}")
    return Exit.FAILED


def summary_table(summary: Summary) -> str:
    """Return what each stage did, a line each."""
    columns = ("stage", "workers", "done", "failed", "dead", "retried", "busy", "p50", "p95")
    rows = [
        (
            stage.name, stage.workers, stage.done, stage.failed, stage.dead, stage.retried,
            f"{stage.busy:.0%}", duration(stage.p50), duration(stage.p95),
        )
        for stage in summary.stages
    ]  # fmt: skip
    return table(columns, rows)
