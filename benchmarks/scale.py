"""Measure whether it stays fast: with a million messages waiting, with a second worker, with 64 idle ones.

waiting   SQLite: microseconds per message to receive and to complete (one output each), in batches of ten, with ever
          more messages waiting; and the plan of a look for work, which shows that no table is scanned
workers   calls per second of one and two workers, 10 ms of pure Python each
idle      the supervisor's CPU while (almost) all of its workers wait
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import queues
from benchmarks.harness import Report, Spread, interleave, parse
from benchmarks.modes import Case, process_mode
from benchmarks.work import calibrate
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.brokers.base import Completion, Output
from sqspipes_mp.brokers.sqlite import schema as sqlite_schema

#: What a receive asks first, by its names in ``sqlite_schema``; of a program in triggers SQLite shows no plan.
_STATEMENTS = ("DUE_STANDARD", "DUE_FIFO")
_BATCH = 10


def waiting(count: int, batches: int, file: Path) -> tuple[Spread, Spread]:
    """Fill a queue; return microseconds per message of each receive and each complete."""
    engine = Engine([queues.nothing, Task(queues.after, name="work"), Task(queues.after, name="next")],
                    domain="bench", broker=SQLite(file))  # fmt: skip
    queues.fill(engine, "work", range(count))
    inputs, (output,) = engine.pipeline.stage("work").inputs, engine.pipeline.stage("next").inputs
    receives, completes = [], []
    with contextlib.closing(engine.broker.open()) as connection:
        for _ in range(min(batches, count // _BATCH)):
            began = time.perf_counter()
            received = connection.receive(inputs, _BATCH, 0.0, 60.0)
            got = time.perf_counter()
            connection.complete(
                [Completion(each.handle, (Output(output, each.body, os.urandom(16).hex()),)) for each in received]
            )
            receives.append((got - began) / len(received) * 1e6)
            completes.append((time.perf_counter() - got) / len(received) * 1e6)
    return Spread(tuple(receives)), Spread(tuple(completes))


def plans(file: Path) -> list[list[object]]:
    """Return (statement, SQLite's plan for it); the plan of an insert by key is empty."""
    with contextlib.closing(sqlite3.connect(file)) as db:
        rows: list[list[object]] = []
        for name in _STATEMENTS:
            text = getattr(sqlite_schema, name)
            steps = db.execute(f"EXPLAIN QUERY PLAN {text}", [None] * text.count("?")).fetchall()
            rows.append([name, "; ".join(step[-1] for step in steps) or "(none: by its key)"])
    return rows


@dataclass(frozen=True, slots=True)
class Watch:
    """Watch the supervisor's CPU while every other worker waits for a message; then end the run."""

    file: str
    seconds: float
    supervisor: int

    def __call__(self, _value: int) -> None:
        supervisor = psutil.Process(self.supervisor)
        # The others are still starting.
        time.sleep(min(2.0, self.seconds))
        before, began = supervisor.cpu_times(), time.monotonic()
        time.sleep(self.seconds)
        after, took = supervisor.cpu_times(), time.monotonic() - began
        used = after.user + after.system - before.user - before.system
        Path(self.file).write_text(json.dumps(max(0.0, used / took)))
        os.kill(self.supervisor, signal.SIGTERM)


def idle(workers: int, seconds: float, folder: Path) -> float:
    """Return the share of one CPU that the supervisor of so many workers takes; one of them works."""
    told = folder / "idle"
    work = Task(Watch(str(told), seconds, os.getpid()), name="work", workers=workers, timeout=600.0)
    engine = Engine([Task(queues.nothing), work], domain="bench", broker=SQLite())
    queues.fill(engine, "work", [0])
    engine.run(only="work")
    return float(json.loads(told.read_text()))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--waiting", nargs="+", type=int, metavar="N", help="default: 1000 10000 100000 1000000")
    parser.add_argument("--idle-workers", type=int, metavar="N", help="default: 64 (--quick: 4)")
    parser.add_argument("--seconds", type=float, metavar="S", help="to watch the supervisor (default: 10)")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all three and print their tables."""
    options = parse(__doc__, argv, _options)
    report = Report("scale", options)
    counts = options.waiting or ([100, 1000] if options.quick else [1_000, 10_000, 100_000, 1_000_000])
    found: list[tuple[int, Spread, Spread]] = []
    with tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-") as name:
        folder = Path(name)
        for count in counts:
            received, completed = waiting(count, 10 if options.quick else 500, folder / f"{count}.db")
            report.keep(f"receive with {count} waiting, us", received)
            report.keep(f"complete with {count} waiting, us", completed)
            found.append((count, received, completed))
        report.table(
            "Microseconds per message, in batches of ten, on SQLite (median, least-greatest batch)",
            ["waiting", "receive", "complete"],
            [[count, received.text(1), completed.text(1)] for count, received, completed in found],
        )
        report.table("SQLite's plans", ["statement", "plan"], plans(folder / f"{counts[-1]}.db"))
        length = 1.0 if options.quick else 10.0
        case = Case(
            "python", length, 1, 20 if options.quick else 300, round(length * calibrate("python")), folder, SQLite
        )
        from_one = interleave({str(n): partial(process_mode, case.with_workers(n)) for n in (1, 2)}, options.rounds)
        report.table(
            f"Workers, {length:g} ms of pure Python per call, on SQLite",
            ["workers", "calls/s", "times as fast as one"],
            [[n, spread.text(1), spread.over(from_one["1"]).text()] for n, spread in from_one.items()],
        )
        for n, spread in from_one.items():
            report.keep(f"{n} workers, calls/s", spread)
        workers = options.idle_workers or (4 if options.quick else 64)
        seconds = options.seconds or (0.2 if options.quick else 10.0)
        share = interleave({"idle": partial(idle, workers, seconds, folder)}, 1 if options.quick else 3)["idle"]
        report.keep("supervisor, share of a CPU", share)
        report.table(
            "The supervisor with idle workers",
            ["workers", "percent of one CPU"],
            [[workers, Spread(tuple(each * 100 for each in share.samples)).text()]],
        )
    report.finish(partial(_draw, found))


def _draw(found: list[tuple[int, Spread, Spread]], figure: Any) -> None:
    axes = figure.subplots()
    counts = [count for count, _, _ in found]
    axes.plot(counts, [received.median for _, received, _ in found], marker="o", label="receive")
    axes.plot(counts, [completed.median for _, _, completed in found], marker="o", label="complete")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("messages waiting")
    axes.set_ylabel("microseconds per message")
    axes.legend()


if __name__ == "__main__":
    main()
