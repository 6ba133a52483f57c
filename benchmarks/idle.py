"""What an engine with nothing to do costs: CPU seconds per minute of each kind of process, requests per minute.

Thirty-two workers of one stage wait for messages that never come, over SQLite and over SQS's wire (the stand-in of
``standin/``). The first seconds after the start are left out. Runs from a checkout only.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil

from benchmarks.harness import Report, parse
from benchmarks.queues import sqs_standin
from benchmarks.serving import serving
from benchmarks.watching import Log, children
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.brokers.base import Broker
from standin import StandIn

#: Seconds from the last worker's start until the clock starts.
SETTLE = 10.0


def source() -> Iterator[object]:
    """Yield nothing; it does not run here."""
    yield from ()


def work(value: object) -> None:
    """Never called."""


def note(log: Log) -> None:
    """Tell this worker's pid."""
    log.note(os.getpid())


def seconds_of(processes: Sequence[psutil.Process]) -> float:
    """Return the CPU seconds the processes have used."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def requests_of(server: StandIn | None) -> int:
    """Return the requests the stand-in has answered."""
    if server is None:
        return 0
    return sum(count["requests"] for count in server.ledger(messages=False)["requests"].values())


def measure(
    broker: Broker, workers: int, seconds: float, settle: float, log: Log, server: StandIn | None
) -> dict[str, float]:
    """Return CPU seconds per minute by kind of process, and requests per minute."""
    task = Task(work, workers=workers, init=partial(note, log))
    engine = Engine([source, task], domain="idle", broker=broker, start_method="fork")
    with serving(engine, "work") as supervisor:
        pids = set(log.wait_for(workers))
        pause = threading.Event().wait
        pause(settle)
        below = children(supervisor)
        kinds = {
            "supervisor": [psutil.Process(supervisor)],
            "keeper": [child for child in below if child.pid not in pids],
            "workers": [child for child in below if child.pid in pids],
        }
        if len(kinds["workers"]) != workers:
            raise RuntimeError(f"{len(kinds['workers'])} of {workers} workers are alive")
        before = {kind: seconds_of(processes) for kind, processes in kinds.items()}
        asked = requests_of(server)
        pause(seconds)
        per_minute = 60 / seconds
        found = {kind: (seconds_of(kinds[kind]) - used) * per_minute for kind, used in before.items()}
        found["requests"] = (requests_of(server) - asked) * per_minute
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both brokers and print the table."""
    options = parse(__doc__, argv, _extra, interleaved=False)
    report = Report("idle", options)
    workers, seconds, settle = (4, 3.0, 1.0) if options.quick else (options.workers, options.seconds, SETTLE)
    rows = []
    with tempfile.TemporaryDirectory(prefix="idle-") as name, sqs_standin() as (server, fresh):
        brokers: dict[str, tuple[Broker, StandIn | None]] = {
            "sqlite": (SQLite(Path(name) / "idle.db"), None),
            "sqs": (fresh(), server),
        }
        for broker, (made, asked) in brokers.items():
            found = measure(made, workers, seconds, settle, Log(f"{name}/{broker}"), asked)
            requests = "-" if asked is None else f"{found['requests']:.0f}"
            rows.append([broker, *(f"{found[kind]:.2f}" for kind in ("supervisor", "keeper", "workers")), requests])
    columns = ["broker", "supervisor", "keeper", "workers", "requests per minute"]
    report.table(f"{workers} idle workers: CPU seconds per minute, all of a kind together", columns, rows)
    report.finish()


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)


if __name__ == "__main__":
    main()
