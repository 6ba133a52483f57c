"""What one ``engine.put`` costs its caller in CPU: with the kept connection, and with a new one for each call.

A web handler's call: one value, a small body. The stand-in's own CPU, which stands for SQS, is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks import queues
from benchmarks.harness import Report, interleave, parse
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.brokers.base import Broker


def work(value: object) -> None:
    """Never called."""


def cost(broker: Broker, calls: int, *, keep: bool, threads: int = 1) -> float:
    """Return CPU milliseconds of this process per call, after a first one."""
    engine = Engine([Task(work, input=True)], domain="put", broker=broker)
    engine.put(0)

    def put(value: int) -> None:
        if not keep:
            engine.close()
        engine.put(value)

    with ThreadPoolExecutor(threads) as pool:
        began = time.process_time()
        for _ in pool.map(put, range(calls)):
            pass
        used = time.process_time() - began
    engine.close()
    return used / calls * 1000


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both brokers and print the table."""
    options = parse(__doc__, argv, _extra)
    report = Report("put", options)
    calls = 20 if options.quick else options.calls
    with tempfile.TemporaryDirectory(prefix="put-") as name, queues.sqs_standin() as (_, fresh):
        brokers: dict[str, Callable[[], Broker]] = {"sqlite": lambda: SQLite(Path(name) / "put.db"), "sqs": fresh}

        def subject(broker: str, how: str) -> float:
            made = brokers[broker]()
            if how == "anew":
                return cost(made, max(5, calls // 50), keep=False)
            return cost(made, calls, keep=True, threads=16 if how == "threads" else 1)

        subjects = [(broker, how) for broker in brokers for how in ("kept", "threads", "anew")]
        measured = {f"{broker} {how}": partial(subject, broker, how) for broker, how in subjects}
        found = interleave(measured, options.rounds)
    ways = {"kept": "kept", "threads": "kept, 16 threads", "anew": "anew for each call"}
    for name, spread in found.items():
        report.keep(name, spread)
    rows = [[broker, ways[how], found[f"{broker} {how}"].text(2)] for broker, how in subjects]
    report.table("CPU of one put", ["broker", "connection", "CPU ms"], rows)
    report.finish()


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=int, default=1000)


if __name__ == "__main__":
    main()
