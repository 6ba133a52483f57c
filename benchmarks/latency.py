"""Measure how long one message takes through three idle stages.

From the moment at which a source makes a value to the moment at which the third stage's function has it: three hops of
send and receive. Everything is idle in between, so each receive waits for its message.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import queues
from benchmarks.harness import Report, Spread, interleave, parse
from benchmarks.work import Tally
from sqspipes_mp import Engine, Task, TaskLike
from sqspipes_mp.brokers.base import Broker

#: Seconds between two messages: long enough for everything to be idle again.
_INTERVAL = 0.25


def begin() -> float:
    """Make a message: the time at which it was made (one clock for all processes of a machine)."""
    return time.monotonic()


def first(made: float) -> float:
    """Pass it on."""
    return made


def second(made: float) -> float:
    """Pass it on."""
    return made


@dataclass(frozen=True, slots=True)
class Arrive:
    """Take the message and note when it was made, and that it is here."""

    tally: Tally

    def __call__(self, made: float) -> None:
        self.tally.note(made)


def journeys(messages: int, broker: Callable[[], Broker]) -> list[float]:
    """Send messages, one at a time; return how many milliseconds each took, the first one left out."""
    with tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-") as folder:
        tally = Tally(f"{folder}/tally", messages + 1, os.getpid())
        tasks: list[TaskLike] = [Task(begin, interval=_INTERVAL), first, second, Task(Arrive(tally), name="third")]
        Engine(tasks, domain="bench", broker=broker()).run()
        spans = sorted(tally.spans())[1 : messages + 1]
    return [(arrived - made) * 1000 for made, arrived in spans]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--messages", type=int, metavar="N", help="in each round (default: 60; --quick: 2)")
    parser.add_argument(
        "--brokers", nargs="+", choices=("sqlite", "sqs"), default=["sqlite", "sqs"], help="default: both"
    )
    parser.add_argument("--latency", type=float, default=queues.LATENCY_MS, metavar="MS", help="of the stand-in")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each broker and print one table."""
    options = parse(__doc__, argv, _options)
    report = Report("latency", options)
    messages = options.messages or (2 if options.quick else 60)
    took: dict[str, list[float]] = {kind: [] for kind in options.brokers}

    def median(kind: str) -> float:
        with queues.brokers(kind, options.latency) as broker:
            found = journeys(messages, broker)
        took[kind] += found
        return statistics.median(found)

    spreads = interleave({kind: partial(median, kind) for kind in options.brokers}, options.rounds)
    rows: list[list[object]] = []
    for kind, spread in spreads.items():
        report.keep(f"{kind}, ms", Spread(tuple(took[kind])))
        where = "SQLite" if kind == "sqlite" else f"SQS stand-in, {options.latency:g} ms"
        late = statistics.quantiles(took[kind], n=20, method="inclusive")[-1]
        rows.append([where, len(took[kind]), spread.text(1), f"{late:.1f}", f"{max(took[kind]):.1f}"])
    columns = ["queues on", "messages", "median of rounds", "95th percentile", "greatest"]
    report.table("Milliseconds from the source to the third idle stage", columns, rows)
    report.finish(partial(_draw, took))


def _draw(took: dict[str, list[float]], figure: Any) -> None:
    axes = figure.subplots()
    for kind, found in took.items():
        axes.plot([(index + 1) / len(found) * 100 for index in range(len(found))], sorted(found), label=kind)
    axes.set_xlabel("percentile")
    axes.set_ylabel("milliseconds through three idle stages")
    axes.set_ylim(bottom=0)
    axes.legend()


if __name__ == "__main__":
    main()
