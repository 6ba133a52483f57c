"""Measure how much faster than one loop threads, multiprocessing.Pool and the engine are, for which tasks.

Modes, all with the same function, the same number of calls, and a clock that runs from the first call's start to the
last call's end (starting up is the business of ``start``):

  serial              one loop, one thread: the reference, 1.00
  threads (no queue)  concurrent.futures.ThreadPoolExecutor: the limit of threads
  Pool (no queue)     multiprocessing.Pool.imap_unordered: the limit of processes
  thread mode         Task(threads=N): one worker process, durable queues on both sides
  process mode        Task(workers=N): N worker processes, durable queues on both sides
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import page, queues
from benchmarks.harness import Report, Spread, bars, interleave, parse, table
from benchmarks.work import ABOUT, KINDS, Job, Tally, calibrate, installed
from sqspipes_mp import Engine, Task
from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.host.cpus import cpus

SERIAL, THREADS, POOL, THREAD_MODE, PROCESS_MODE = (
    "serial",
    "threads (no queue)",
    "Pool (no queue)",
    "thread mode",
    "process mode",
)
MODES = (SERIAL, THREADS, POOL, THREAD_MODE, PROCESS_MODE)
#: Seconds a run should last where every worker is busy all the time, so that its ends do not matter.
_LASTS, _QUICK_LASTS = 2.0, 0.02
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    kind: str
    length: float
    workers: int
    calls: int
    units: int
    folder: Path
    broker: Callable[[], Broker]

    def with_workers(self, workers: int) -> Case:
        """Return the same case for another number of workers."""
        return replace(self, workers=workers)

    def job(self, *, stop: bool = False) -> Job:
        path = self.folder / str(next(_numbers))
        return Job(self.kind, self.units, Tally(str(path), self.calls, os.getpid() if stop else 0))


def serial(case: Case) -> float:
    """Run a plain loop; a worker's part of the calls is enough to know its speed."""
    alone = replace(case, calls=max(1, case.calls // case.workers))
    job = alone.job()
    for value in range(alone.calls):
        job(value)
    return job.tally.rate()


def threads(case: Case) -> float:
    """Run in a thread pool."""
    job = case.job()
    with ThreadPoolExecutor(case.workers) as executor:
        list(executor.map(job, range(case.calls)))
    return job.tally.rate()


def pool(case: Case) -> float:
    """Run in a process pool."""
    job = case.job()
    with multiprocessing.Pool(case.workers) as processes:
        for _ in processes.imap_unordered(job, range(case.calls)):
            pass
        processes.close()
        processes.join()
    return job.tally.rate()


def engine(case: Case, **how: Any) -> float:
    """One hop: receive, call, send on, delete. The backlog waits before the run begins; the last call ends it."""
    job = case.job(stop=True)
    work = Task(job, name="work", **how)
    built = Engine([Task(queues.nothing), work, Task(queues.after)], domain="bench", broker=case.broker())
    queues.fill(built, "work", range(case.calls))
    built.run(only="work")
    return job.tally.rate()


def thread_mode(case: Case) -> float:
    """Run in one worker of several threads."""
    return engine(case, threads=case.workers)


def process_mode(case: Case) -> float:
    """Run in several workers."""
    return engine(case, workers=case.workers)


RUN: dict[str, Callable[[Case], float]] = {
    SERIAL: serial,
    THREADS: threads,
    POOL: pool,
    THREAD_MODE: thread_mode,
    PROCESS_MODE: process_mode,
}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to run (default: all)")
    parser.add_argument("--lengths", nargs="+", type=float, default=None, metavar="MS", help="default: 1 10 100")
    parser.add_argument("--workers", nargs="+", type=int, default=None, metavar="N", help="default: 1 2 4")
    parser.add_argument("--broker", choices=("sqlite", "sqs"), default="sqlite", help="sqs: the stand-in of the tests")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help=f"of a run with all workers busy (default: {_LASTS:g})"
    )
    parser.add_argument(
        "--publish", action="store_true", help="measure the cases of the documentation, and rewrite its table"
    )


def _wanted(options: argparse.Namespace) -> list[tuple[str, float, int]]:
    """Return (kind, milliseconds, workers) of each line."""
    if options.publish:
        # Waiting needs more workers than there are CPUs.
        busy: list[tuple[str, float]] = [("python", 1.0), ("python", 10.0), ("python", 100.0), ("zlib", 10.0)]
        return [(kind, length, cpus()) for kind, length in (*busy, ("numpy", 10.0))] + [("sleep", 100.0, 32)]
    lengths = options.lengths or ((1.0,) if options.quick else (1.0, 10.0, 100.0))
    counts = options.workers or ((2,) if options.quick else (1, 2, 4))
    return list(itertools.product(options.kinds, lengths, counts))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case and print one table."""
    options = parse(__doc__, argv, _options)
    if options.publish and options.quick:
        raise SystemExit("--publish writes figures down, and those of --quick mean nothing: leave one of them out")
    if options.publish and options.plot is None:
        page.PICTURE.parent.mkdir(exist_ok=True)
        options.plot = page.PICTURE
    report = Report("modes", options)
    wanted = _wanted(options)
    for kind in dict.fromkeys(kind for kind, _, _ in wanted):
        report.note(f"{kind}: {ABOUT[kind]}" if installed(kind) else f"{kind}: left out, {kind} is not installed")
    wanted = [case for case in wanted if installed(case[0])]
    units = {kind: calibrate(kind) for kind in {kind for kind, _, _ in wanted}}
    found: list[tuple[Case, dict[str, Spread]]] = []
    with tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-") as name, queues.brokers(options.broker) as broker:
        for kind, length, workers in wanted:
            lasts = options.seconds or (_QUICK_LASTS if options.quick else _LASTS)
            # A multiple of the workers, so that none is left alone at the end.
            each = max(
                2, round(lasts * 1000 / length * (workers if kind == "sleep" else min(workers, cpus())) / workers)
            )
            case = Case(kind, length, workers, each * workers, max(1, round(length * units[kind])), Path(name), broker)
            if options.rounds > 1:
                # Once for nothing: caches, imports.
                serial(replace(case, calls=1))
            spreads = interleave({mode: partial(RUN[mode], case) for mode in MODES}, options.rounds)
            for mode, spread in spreads.items():
                report.keep(f"{kind} {length:g} ms x{workers} {mode}", spread)
            found.append((case, spreads))
            print(f"  {kind} {length:g} ms x{workers}: done", flush=True)
    where = "SQLite" if options.broker == "sqlite" else f"the SQS stand-in, {queues.LATENCY_MS:g} ms per request"
    title = f"Times as fast as the serial loop (median, least-greatest of {options.rounds}); queues on {where}"
    columns = ["task", "length", "workers", "serial calls/s", *MODES[1:], "process mode / Pool"]
    rows = [_row(case, spreads) for case, spreads in found]
    report.table(title, columns, rows)
    report.finish(partial(_draw, found))
    if options.publish:
        short = [
            [f"{case.kind}, {case.length:g} ms", case.workers]
            + [spreads[mode].over(spreads[SERIAL]).text() for mode in MODES[1:]]
            for case, spreads in found
        ]
        page.rewrite(f"{report.where()}; load {report.load:.1f}", table(["task", "workers", *MODES[1:]], short))


def _row(case: Case, spreads: dict[str, Spread]) -> list[object]:
    base = spreads[SERIAL]
    return [
        case.kind,
        f"{case.length:g} ms",
        case.workers,
        f"{base.median:.1f}",
        *(spreads[mode].over(base).text() for mode in MODES[1:]),
        spreads[PROCESS_MODE].over(spreads[POOL]).text(),
    ]


def _draw(found: list[tuple[Case, dict[str, Spread]]], figure: Any) -> None:
    """Draw a group of bars per case, a bar per mode."""
    axes = figure.subplots()
    labels = [f"{case.kind}\n{case.length:g} ms\nx{case.workers}" for case, _ in found]
    bars(axes, labels, {mode: [spreads[mode].over(spreads[SERIAL]) for _, spreads in found] for mode in MODES[1:]})
    axes.axhline(1.0, color="gray", linewidth=0.8)
    # Two workers and thirty-two on one axis.
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("times as fast as one loop (log scale)")


if __name__ == "__main__":
    main()
