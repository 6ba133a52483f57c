"""What does an engine with nothing to do cost: CPU seconds per minute of each kind of process, requests per minute?

Thirty-two workers of one stage wait for messages that never come, over SQLite and over SQS's wire (the stand-in of
``tests/standin``). The first seconds after the start are left out. Runs from a checkout only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil

from sqspipes_mp import SQS, Engine, SQLite, Task
from sqspipes_mp.brokers.base import Broker
from tests.gates import Log, children
from tests.standin import StandIn, standin

#: Seconds from the last worker's start until the clock starts.
SETTLE = 10.0


def source() -> Iterator[object]:
    """Yield nothing; it does not run here."""
    yield from ()


def work(value: object) -> None:
    """Never called."""


def note(log: Log) -> None:
    """Tell that this worker is up."""
    log.note(os.getpid())


def run(engine: Engine) -> None:
    """Be the supervisor until SIGTERM."""
    engine.run(only="work")


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
    process = multiprocessing.get_context("fork").Process(target=run, args=(engine,))
    process.start()
    try:
        pids = set(log.wait_for(workers))
        pause = threading.Event().wait
        pause(settle)
        below = children(process.pid)
        kinds = {
            "supervisor": [psutil.Process(process.pid)],
            "keeper": [child for child in below if child.pid not in pids],
            "workers": [child for child in below if child.pid in pids],
        }
        assert len(kinds["workers"]) == workers
        before = {kind: seconds_of(processes) for kind, processes in kinds.items()}
        asked = requests_of(server)
        pause(seconds)
        per_minute = 60 / seconds
        found = {kind: (seconds_of(kinds[kind]) - used) * per_minute for kind, used in before.items()}
        found["requests"] = (requests_of(server) - asked) * per_minute
    finally:
        process.terminate()
        process.join(60)
        process.kill()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both brokers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="4 workers, 3 seconds: shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(argv)
    workers, seconds, settle = (4, 3.0, 1.0) if options.quick else (options.workers, options.seconds, SETTLE)
    told = {}
    print(f"{workers} idle workers; CPU seconds per minute, all processes of a kind together")
    print(f"{'':8}{'supervisor':>12}{'keeper':>10}{'workers':>10}{'requests per minute':>22}")
    with tempfile.TemporaryDirectory(prefix="idle-") as name, standin(ledger=0) as server:
        sqs = SQS("us-east-1", endpoint_url=server.url, access_key="x", secret_key="x")
        brokers: dict[str, tuple[Broker, StandIn | None]] = {
            "sqlite": (SQLite(Path(name) / "idle.db"), None),
            "sqs": (sqs, server),
        }
        for broker, (made, asked) in brokers.items():
            found = told[broker] = measure(made, workers, seconds, settle, Log(f"{name}/{broker}"), asked)
            requests = "-" if asked is None else f"{found['requests']:.0f}"
            print(
                f"{broker:8}{found['supervisor']:12.3f}{found['keeper']:10.3f}{found['workers']:10.3f}{requests:>22}",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
