"""How soon are the messages that a killed worker held, but had not begun, back in their queue, and received again?

One worker runs a message that never ends and holds five more. It is SIGKILLed; the clock runs until all five can be
received again, and until its replacement begins one of them. That is done again and again, over SQLite and over SQS's
wire (the stand-in of ``tests/standin``, 5 ms latency per request). Runs from a checkout only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sqspipes_mp import SQS, Engine, SQLite, Task
from sqspipes_mp.brokers.base import Broker
from tests.gates import Log, eventually, feed
from tests.standin import standin

HELD = 5


def source() -> Iterator[object]:
    """Yield nothing: the messages are fed from outside."""
    yield from ()


def work(value: object, log: Log) -> None:
    """Tell when it began; a value "block" never ends."""
    log.note(value, os.getpid(), time.monotonic())
    if value == "block":
        threading.Event().wait()


def make(broker: Broker, log: Log) -> Engine:
    """Return the engine: one worker, and no second attempt for what it was running."""
    task = Task(partial(work, log=log), name="work", prefetch=HELD, max_attempts=1)
    return Engine([source, task], domain="recovery", broker=broker, on_error="retry", start_method="fork")


def run(engine: Engine) -> None:
    """Be the supervisor until SIGTERM."""
    engine.run(only="work")


def measure(broker: Broker, kills: int, visible: Callable[[Engine], int], folder: Path) -> list[tuple[float, float]]:
    """Return, for each kill, the seconds until the held messages are receivable, and until one is begun."""
    # Each kill would be a warning.
    logging.getLogger("sqspipes_mp").setLevel(logging.CRITICAL)
    log = Log(str(folder / "log"))
    engine = make(broker, log)
    process = multiprocessing.get_context("fork").Process(target=run, args=(engine,))
    feed(engine, "work", [])
    process.start()
    found = []
    try:
        for number in range(kills):
            before = len(log.lines())
            feed(engine, "work", ["block"])
            [(_, worker, _)] = log.wait_for(before + 1)[before:]
            feed(engine, "work", [number] * HELD)
            eventually(lambda: engine.stats()["work"].in_flight == 1 + HELD, "all are held")
            killed = time.monotonic()
            os.kill(worker, signal.SIGKILL)
            while visible(engine) < HELD:
                if time.monotonic() > killed + 60:
                    raise RuntimeError("a killed worker's messages did not come back within 60 s")
            receivable = time.monotonic() - killed
            begun = log.wait_for(before + 1 + HELD)[before + 1][2] - killed
            found.append((receivable, begun))
    finally:
        process.terminate()
        process.join(60)
        process.kill()
    return found


@contextlib.contextmanager
def places(folder: Path) -> Iterator[dict[str, tuple[Broker, Callable[[Engine], int]]]]:
    """Yield both brokers, and how to count what can be received without disturbing them."""
    with standin(latency_ms=5, ledger=0) as server:

        def visible(_: Engine) -> int:
            counts = server.ledger(messages=False)["queues"]["recovery-source"]
            return int(counts["visible"])

        sqs = SQS("us-east-1", endpoint_url=server.url, access_key="x", secret_key="x")
        yield {
            "sqlite": (SQLite(folder / "recovery.db"), lambda engine: engine.stats()["work"].visible),
            "sqs": (sqs, visible),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both brokers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="3 kills: shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the samples here")
    options = parser.parse_args(argv)
    kills = 3 if options.quick else options.kills
    told = {}
    print(f"{'':8}{'kills':>6}  {'receivable: p50':>16}{'max':>9}  {'begun again: p50':>17}{'max':>9}")
    with tempfile.TemporaryDirectory(prefix="recovery-") as name, places(Path(name)) as brokers:
        for broker, (made, visible) in brokers.items():
            folder = Path(name) / broker
            folder.mkdir()
            samples = measure(made, kills, visible, folder)
            told[broker] = samples
            receivable, begun = zip(*samples, strict=True)
            print(
                f"{broker:8}{kills:6}  {statistics.median(receivable) * 1000:13.0f} ms{max(receivable) * 1000:6.0f} ms"
                f"  {statistics.median(begun) * 1000:14.0f} ms{max(begun) * 1000:6.0f} ms",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
