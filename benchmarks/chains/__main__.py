"""What is lost or doubled of values that go on and on (``Continue``), while everything is killed and drained?

Each seeded run feeds five values to two stages, each of which needs at least four calls for a value, and the second of
which yields outputs before each ``Continue``. Workers, keeper and program are killed or drained at random, and once all
are killed after a continuation was accepted and before its predecessor was deleted (SQLite, where one transaction does
both: while it is held up). Lost must be 0; doubled 0 on SQLite and FIFO; standard queues say how many are doubled.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from benchmarks.chains import BROKERS, Result
from benchmarks.chains.run import run_in_time
from benchmarks.harness import Report, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the seeds over each broker asked for, in turn; return the exit status."""
    options = parse(__doc__, argv, _extra, interleaved=False)
    report = Report("chains", options)
    brokers = options.broker or (BROKERS[:1] if options.quick else BROKERS)
    seeds = 1 if options.quick else options.seeds
    until = time.monotonic() + options.minutes * 60
    found: dict[str, list[Result]] = {broker: [] for broker in brokers}
    # Forked programs must not be forked from a process with threads of its own.
    with ProcessPoolExecutor(options.at_once, multiprocessing.get_context("spawn")) as pool:
        wanted = [(broker, options.seed + number) for number in range(seeds) for broker in brokers]
        running = {pool.submit(run_in_time, broker, seed, until) for broker, seed in wanted}
        for future in as_completed(running):
            if (result := future.result()) is None:
                continue
            found[result.broker].append(result)
            for rule in result.broken:
                print(f"BROKEN: {result.broker}, seed {result.seed}: {rule}", flush=True)
    for broker, results in found.items():
        tell(report, broker, results)
    report.finish()
    return int(any(result.broken for results in found.values() for result in results))


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--broker", choices=BROKERS, action="append", help="sqs: standard queues; default: all three")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument(
        "--at-once", type=int, default=4, help="runs under way at once; they wait more than they compute"
    )
    parser.add_argument("--minutes", type=float, default=600.0, help="no run begins later than this")


def tell(report: Report, broker: str, results: Sequence[Result]) -> None:
    """Print what was done to a broker's runs, and what came of it."""
    done: Counter[str] = Counter()
    for result in results:
        done.update(result.done)
    rows: list[tuple[str, object]] = [
        ("runs", len(results)),
        ("seconds in all", f"{sum(result.seconds for result in results):.0f}"),
        *sorted(done.items()),
        ("outputs lost", sum(result.lost for result in results)),
        ("outputs wrong", sum(result.wrong for result in results)),
        ("outputs doubled", sum(result.doubled for result in results)),
        ("runs with a rule broken", sum(bool(result.broken) for result in results)),
    ]
    report.table(f"{broker}: chains under fire", ["what", "count"], rows)


if __name__ == "__main__":
    sys.exit(main())
