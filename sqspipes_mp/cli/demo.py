"""``sqspipes-mp demo``: the pipeline of ``demo_pipeline`` over real files, beside one process (the command line).

One dict holds the result: ``--json`` prints it, ``as_text`` formats it.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import signal
import sys
import sysconfig
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

from sqspipes_mp.cli import demo_pipeline
from sqspipes_mp.cli.console import Console, table
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.engine import Engine
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.ipc.summary import Summary

#: The sample measured in one process: one file in ``_SHARE``, at least ``_LEAST`` files.
_SHARE, _LEAST = 8, 50
_TOP, _ERRORS_SHOWN = 10, 5


def demo(flags: Namespace, console: Console) -> Exit:
    """Measure Python files in one process and with the pipeline. Raises ``Refused``, ``ConfigError``."""
    root = str(Path(flags.path or sysconfig.get_path("stdlib")))
    engine = demo_pipeline.pipeline(root, int(flags.workers) if flags.workers.isdecimal() else flags.workers)
    if not Path(root).exists():
        raise Refused(f"there is no {root!r}. Give a folder of Python files, or one file")
    paths = list(demo_pipeline.find(root))
    if not paths:
        print(f"There is no Python file (*.py) in {root}: nothing to measure.")
        return Exit.DONE
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        # As SIGTERM, so that nothing stays behind. Under nohup it is ignored.
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    shown = flags.progress != "off"
    tell = _teller(0.0 if shown else math.inf)
    with suppress(KeyboardInterrupt):
        alone = _one_process(paths, tell)
        reports, seconds, summary = _pipeline(engine, len(paths), tell, progress=None if shown else False)
        if summary is not None and summary.reason == "drained":
            result = _result(root, reports, seconds, summary, alone)
            print(json.dumps(result, indent=2) if flags.json else as_text(result))
            return Exit.DONE
    console.say("the demo was interrupted before its end, so there is nothing to compare")
    return Exit.DONE


def _one_process(paths: Sequence[str], tell: Callable[[str], None]) -> dict[str, Any]:
    """Call the pipeline's functions here, without queues, for files chosen at random, the same ones each time."""
    sample = random.Random(1).sample(paths, min(len(paths), max(_LEAST, len(paths) // _SHARE)))
    began, lines = time.perf_counter(), 0
    for number, path in enumerate(sample):
        tell(f"in one process, to compare with: {number:,} of {len(sample):,} files")
        lines += demo_pipeline.rank(demo_pipeline.measure(path)).get("lines", 0)
    seconds = time.perf_counter() - began
    return {"files": len(sample), "sample": len(sample) < len(paths), "lines": lines, "seconds": seconds}


def _pipeline(
    engine: Engine, total: int, tell: Callable[[str], None], *, progress: bool | None
) -> tuple[list[dict[str, Any]], float, Summary | None]:
    """Run the pipeline; return its outputs, and the seconds until its last process was gone."""
    reports, began = [], time.perf_counter()
    try:
        with engine.run(iterate=True, until="drained", progress=progress) as results:
            for report in results:
                reports.append(report)
                tell(f"{len(reports):,} of {total:,} files in {time.perf_counter() - began:.1f} s")
    finally:
        # Without a word: nobody needs the messages left after an interruption.
        engine.broker.cleanup()
    return reports, time.perf_counter() - began, results.summary


def _result(
    root: str, reports: Sequence[dict[str, Any]], seconds: float, summary: Summary, alone: dict[str, Any]
) -> dict[str, Any]:
    lines, start = sum(report.get("lines", 0) for report in reports), f"{root}/"
    functions = (
        {"complexity": complexity, "function": name, "where": f"{report['path'].removeprefix(start)}:{line}"}
        for report in reports
        for complexity, name, line in report["top"]
    )
    broken = sorted((report["path"].removeprefix(start), report["error"]) for report in reports if "error" in report)
    return {
        "root": root,
        "files": len(reports),
        "lines": lines,
        "functions": sum(report["functions"] for report in reports),
        "seconds": seconds,
        "files_per_second": len(reports) / seconds,
        "lines_per_second": lines / seconds,
        "most_complex": heapq.nsmallest(_TOP, functions, key=lambda each: (-each["complexity"], each["where"])),
        "errors": [{"path": path, "error": error} for path, error in broken],
        "stages": [asdict(stage) for stage in summary.stages],
        "cpus": cpus(),
        "one_process": alone,
        "speedup": lines / seconds * alone["seconds"] / alone["lines"] if lines and alone["lines"] else None,
    }


def as_text(result: dict[str, Any]) -> str:
    """Format a result for people. Pure."""
    return "\n".join(_text(result))


def _text(result: dict[str, Any]) -> Iterator[str]:
    yield f"The most complex functions of {result['root']} (McCabe; site-packages and hidden folders left out):\n"
    top = [(each["where"], each["function"], each["complexity"]) for each in result["most_complex"]]
    yield table(("where", "function", "complexity"), top, left=2)
    yield (
        f"\n{result['files']:,} files, {result['lines']:,} lines, {result['functions']:,} functions "
        f"in {result['seconds']:.1f} s: {result['files_per_second']:,.0f} files and "
        f"{result['lines_per_second']:,.0f} lines per second\n"
    )
    stages = [(each["name"], each["workers"], each["done"], f"{each['busy']:.0%}") for each in result["stages"]]
    yield table(("stage", "workers", "files", "busy"), stages)
    yield "(files: messages done; a source's are its calls. busy: share of the workers' time in the function)\n"
    if errors := result["errors"]:
        yield f"{len(errors):,} of the files could not be read or parsed, and have no lines or functions here:"
        yield from (f"  {each['path']}: {shorten(each['error'], 90)}" for each in errors[:_ERRORS_SHOWN])
        yield f"  and {len(errors) - _ERRORS_SHOWN:,} more\n" if len(errors) > _ERRORS_SHOWN else ""
    alone, speedup, usable = result["one_process"], result["speedup"], result["cpus"]
    if speedup is None:
        yield "Nothing could be parsed, so there is no speed to compare."
        return
    which = f"a random sample of {alone['files']:,} of the files" if alone["sample"] else "all the files"
    yield (
        f"One process alone, without queues, just before: {which}, {alone['lines']:,} lines "
        f"in {alone['seconds']:.1f} s,\n{alone['lines'] / alone['seconds']:,.0f} lines per second.\n"
        f"The pipeline, its start and end included, was {speedup:.2f} times as fast, with {usable} CPUs to use.\n"
        "Whatever else runs on this machine disturbs both measurements."
    )
    if speedup > usable:
        yield "More than its CPUs can give: the one process was disturbed. Run the demo again."
    if result["seconds"] < 2:
        yield "(Starting and ending take most of so short a run.)"


def _teller(due: float) -> Callable[[str], None]:
    """Return a function that prints a text to stderr once a second, from ``due`` on (monotonic seconds)."""

    def tell(text: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + 1
            print(text, file=sys.stderr, flush=True)

    return tell
