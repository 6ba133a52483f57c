"""Measure how soon workers are ready, what each costs in memory, and how soon one is replaced.

ready    from ``run()`` to the moment at which all workers are inside the function with a first message
memory   private memory (USS) of each worker then; the supervisor's resident memory over many replacements
replace  from a worker's last call to its successor's first: planned (``max_tasks_per_worker=1``), and after a
         SIGKILL (less the backoff of the first restart)
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import select
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import queues
from benchmarks.harness import Report, Spread, interleave, parse
from benchmarks.work import Tally
from sqspipes_mp import Engine, Task, current_message
from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.supervisor.restart import FIRST_BACKOFF

#: Seconds after which a worker that waits for the others gives up.
_PATIENCE = 60.0
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Assemble:
    """Hold every worker in its first call until all are there; the last one measures them, then lets them go."""

    folder: str
    workers: int
    supervisor: int

    def __call__(self, _value: int) -> None:
        seen = os.open(f"{self.folder}/seen", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(seen, b"%10d\n" % os.getpid())
        size = os.fstat(seen).st_size
        os.close(seen)
        gate = os.open(f"{self.folder}/gate", os.O_RDWR | os.O_NONBLOCK)
        if size == self.workers * 11:
            self._measure()
            os.kill(self.supervisor, signal.SIGTERM)
            # Nobody reads it, and it stays open for as long as this process lives: open to all from now on.
            os.write(gate, b"!")
            return
        poll = select.poll()
        poll.register(gate, select.POLLIN)
        poll.poll(_PATIENCE * 1000)
        os.close(gate)

    def _measure(self) -> None:
        now = time.monotonic()
        pids = [int(line) for line in Path(f"{self.folder}/seen").read_text().split()]
        uss = [psutil.Process(pid).memory_full_info().uss / _MIB for pid in pids if pid != os.getpid()]
        told = {"ready": now, "uss": uss, "supervisor": psutil.Process(self.supervisor).memory_info().rss / _MIB}
        Path(f"{self.folder}/told").write_text(json.dumps(told))


def start(workers: int, broker: Callable[[], Broker]) -> dict[str, Any]:
    """Start so many workers; return seconds until ``ready``, private MiB of each worker, MiB of the supervisor."""
    with tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-") as folder:
        os.mkfifo(f"{folder}/gate")
        work = Task(Assemble(folder, workers, os.getpid()), name="work", workers=workers)
        engine = Engine([Task(queues.nothing), work], domain="bench", broker=broker())
        # More than enough: each worker may hold some that it does not run.
        queues.fill(engine, "work", range(workers * 12))
        began = time.monotonic()
        engine.run(only="work")
        told: dict[str, Any] = json.loads(Path(f"{folder}/told").read_text())
    return {**told, "ready": told["ready"] - began}


@dataclass(frozen=True, slots=True)
class Replaced:
    """Note the call and the supervisor's memory; where ``kill`` is set, die of every second message, once.

    The others are progress, which keeps the backoff at its first value.
    """

    tally: Tally
    memory: str
    supervisor: int
    kill: bool

    def __call__(self, value: int) -> None:
        started = time.monotonic()
        pages = Path(f"/proc/{self.supervisor}/statm")
        if pages.exists():
            with Path(self.memory).open("a") as file:
                file.write(f"{int(pages.read_text().split()[1]) * os.sysconf('SC_PAGESIZE')}\n")
        self.tally.note(started)
        if self.kill and value % 2 == 0 and current_message().attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def replace(times: int, *, kill: bool, broker: Callable[[], Broker]) -> tuple[list[float], list[float]]:
    """Replace one worker so many times; return the gaps in seconds, and the supervisor's MiB at each call."""
    with tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-") as folder:
        calls = times * 2 + 1 if kill else times + 1
        tally = Tally(f"{folder}/tally", calls, os.getpid())
        function = Replaced(tally, f"{folder}/memory", os.getpid(), kill)
        work = Task(function, name="work", max_tasks_per_worker=None if kill else 1)
        engine = Engine([Task(queues.nothing), work], domain="bench", broker=broker(), on_error="retry")
        queues.fill(engine, "work", range(calls))
        if kill:
            logging.getLogger("sqspipes_mp").setLevel(logging.ERROR)
        engine.run(only="work")
        memory = Path(f"{folder}/memory")
        used = [int(line) / _MIB for line in memory.read_text().split()] if memory.exists() else []
        spans = sorted(tally.spans())
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    return ([gap - FIRST_BACKOFF for gap in gaps if gap >= FIRST_BACKOFF] if kill else gaps), used


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="default: 32 (--quick: 4)")
    parser.add_argument("--replacements", type=int, metavar="N", help="default: 300 (--quick: 10)")
    parser.add_argument("--broker", choices=("sqlite", "sqs"), default="sqlite", help="sqs: the stand-in of the tests")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all three and print one table each."""
    options = parse(__doc__, argv, _options)
    report = Report("start", options)
    workers = options.workers or (4 if options.quick else 32)
    times = options.replacements or (10 if options.quick else 300)
    with queues.brokers(options.broker) as broker:
        told: list[dict[str, Any]] = []

        def ready() -> float:
            told.append(start(workers, broker))
            return float(told[-1]["ready"])

        seconds = interleave({"ready": ready}, options.rounds)["ready"]
        report.keep("ready, s", seconds)
        private = Spread(tuple(sum(each["uss"]) / len(each["uss"]) for each in told))
        greatest = Spread(tuple(max(each["uss"]) for each in told))
        report.table(
            f"{workers} workers inside their first message, on {options.broker}",
            ["what", "median (least-greatest)"],
            [
                ["ready after, s", seconds.text()],
                ["private memory per worker, MiB, mean", private.text(1)],
                ["private memory per worker, MiB, greatest", greatest.text(1)],
                ["supervisor, resident MiB", Spread(tuple(each["supervisor"] for each in told)).text(1)],
            ],
        )
        planned, used = replace(times, kill=False, broker=broker)
        # Each waits for its backoff.
        killed, _ = replace(2 if options.quick else 10, kill=True, broker=broker)
    rows: list[list[object]] = []
    for what, gaps in (("planned", planned), ("killed, less its backoff", killed)):
        spread = Spread(tuple(gap * 1000 for gap in gaps))
        report.keep(f"{what}, ms", spread)
        rows.append([what, len(gaps), spread.text(1)])
    report.table(
        "From a worker's last call to its successor's first, ms",
        ["replacement", "times", "median (least-greatest)"],
        rows,
    )
    if used:
        tenth = max(1, len(used) // 10)
        marks = [(index, used[index]) for index in (tenth, len(used) // 2, len(used) - 1)]
        report.table(
            "The supervisor's resident memory", ["replacements", "MiB"], [[index, f"{mib:.2f}"] for index, mib in marks]
        )
    report.finish(partial(_draw, used))


def _draw(used: list[float], figure: Any) -> None:
    axes = figure.subplots()
    axes.plot(range(len(used)), used)
    axes.set_xlabel("replacements of a worker")
    axes.set_ylabel("supervisor's resident memory, MiB")
    axes.set_ylim(bottom=0)


if __name__ == "__main__":
    main()
