"""How soon the messages that a killed worker held, but had not begun, are back in their queue, and begun again.

One worker runs a message that never ends and holds five more. It is SIGKILLed; the clock runs until all five can be
received again, and until its replacement begins one of them. That is done again and again, over SQLite and over SQS's
wire (the stand-in, ``standin/``, 5 ms latency per request).

Then a worker far from SQS, with a backlog, is SIGKILLed while receives are under way. The messages that these receives
bring are hidden until their visibility timeout ends: at most 15 s, and at most ten for each receive. Runs from a
checkout only.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, Spread, bars, parse
from benchmarks.queues import sqs_standin
from benchmarks.serving import serving
from benchmarks.watching import Log, eventually, feed
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.brokers.base import Broker

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


def measure(broker: Broker, kills: int, visible: Callable[[Engine], int], folder: Path) -> list[tuple[float, float]]:
    """Return, for each kill, the seconds until the held messages are receivable, and until one is begun."""
    # Each kill would be a warning.
    logging.getLogger("sqspipes_mp").setLevel(logging.CRITICAL)
    log = Log(str(folder / "log"))
    engine = make(broker, log)
    feed(engine, "work", [])
    found = []
    with serving(engine, "work"):
        for number in range(kills):
            before = len(log.lines())
            feed(engine, "work", ["block"])
            [(_, worker, _)] = log.wait_for(before + 1)[before:]
            feed(engine, "work", [number] * HELD)
            eventually(lambda: engine.stats()["work"].in_flight == 1 + HELD, "all are held")
            killed = time.monotonic()
            os.kill(worker, signal.SIGKILL)
            # On a busy machine the replacement may be quicker than the look at the queue.
            while visible(engine) < HELD and len(log.lines()) == before + 1:
                if time.monotonic() > killed + 60:
                    raise RuntimeError("a killed worker's messages did not come back within 60 s")
            receivable = time.monotonic() - killed
            begun = log.wait_for(before + 1 + HELD)[before + 1][2] - killed
            found.append((receivable, begun))
    return found


def quick(value: object, log: Log) -> object:
    """Tell which process ran it."""
    log.note(os.getpid())
    return value


def hidden(server: Any, broker: Broker, visibility: float, folder: Path) -> tuple[int, int, float]:
    """SIGKILL a worker with receives under way, and end the run; return their number, hidden messages, and seconds."""
    log = Log(str(folder / f"far-{time.monotonic_ns()}"))
    work = Task(partial(quick, log=log), name="work", max_attempts=1)
    engine = Engine([source, work, quick], domain="far", broker=broker, visibility_timeout=visibility)
    feed(engine, "work", range(2000))

    def queue() -> dict[str, Any]:
        return dict(server.ledger(messages=False)["queues"]["far-source"])

    def receives() -> int:
        counts = server.ledger(messages=False)["requests"].get("ReceiveMessage", {"under_way": 0})
        return int(counts["under_way"])

    with serving(engine, "work"):
        eventually(lambda: receives() >= 2, "receives are under way")
        under_way = receives()
        os.kill(log.lines()[-1], signal.SIGKILL)
        killed = time.monotonic()
    kept = queue()["in_flight"]
    while queue()["in_flight"]:
        if time.monotonic() > killed + 60:
            raise RuntimeError("a killed worker's messages did not come back within 60 s")
        threading.Event().wait(0.01)
    return under_way, kept, time.monotonic() - killed


@contextlib.contextmanager
def places(folder: Path) -> Iterator[dict[str, tuple[Broker, Callable[[Engine], int]]]]:
    """Yield both brokers, and how to count what can be received without disturbing them."""
    with sqs_standin(latency_ms=5) as (server, fresh):

        def visible(_: Engine) -> int:
            counts = server.ledger(messages=False)["queues"]["recovery-source"]
            return int(counts["visible"])

        yield {
            "sqlite": (SQLite(folder / "recovery.db"), lambda engine: engine.stats()["work"].visible),
            "sqs": (fresh(), visible),
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both brokers and print the table."""
    options = parse(__doc__, argv, _extra, interleaved=False)
    report = Report("recovery", options)
    rows = []
    drawn: dict[str, tuple[Spread, Spread]] = {}
    with tempfile.TemporaryDirectory(prefix="recovery-") as name, places(Path(name)) as brokers:
        for broker, (made, visible) in brokers.items():
            folder = Path(name) / broker
            folder.mkdir()
            samples = measure(made, 3 if options.quick else options.kills, visible, folder)
            receivable, begun = (Spread(times) for times in zip(*samples, strict=True))
            report.keep(f"{broker} receivable", receivable)
            report.keep(f"{broker} begun", begun)
            drawn[broker] = (receivable, begun)
            figures = (receivable.median, receivable.high, begun.median, begun.high)
            rows.append([broker, len(samples), *(f"{1000 * figure:.0f}" for figure in figures)])
    far = []
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        for latency in options.latency[:1] if options.quick else options.latency:
            with sqs_standin(latency_ms=latency) as (server, fresh):
                times, visibility = (1, 3.0) if options.quick else (options.far, 60.0)
                under_way, kept, seconds = zip(
                    *(hidden(server, fresh(), visibility, Path(name)) for _ in range(times)), strict=True
                )
            report.keep(f"hidden at {latency:g} ms, s", Spread(seconds))
            waits = [f"{wait:.1f}" for wait in (Spread(seconds).median, max(seconds))]
            far.append([f"{latency:g}", times, max(under_way), max(kept), *waits])
    columns = ["broker", "kills", "receivable: p50", "max", "begun again: p50", "max"]
    report.table("milliseconds from SIGKILL", columns, rows)
    columns = ["distance, ms", "kills", "receives under way: most", "hidden: most", "seconds: p50", "max"]
    report.table("messages hidden by receives under way at a SIGKILL, and seconds until all are visible", columns, far)
    report.finish(partial(_draw, drawn))


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="over each broker (default: 50; --quick: 3)")
    parser.add_argument(
        "--far", type=int, default=5, metavar="N", help="kills at each distance (default: 5; --quick: 1)"
    )
    parser.add_argument("--latency", nargs="+", type=float, default=[20.0, 60.0], metavar="MS", help="default: 20 60")


def _draw(drawn: dict[str, tuple[Spread, Spread]], figure: Any) -> None:
    axes = figure.subplots()
    in_ms = [[Spread(tuple(1000 * each for each in spread.samples)) for spread in pair] for pair in drawn.values()]
    bars(axes, list(drawn), {"receivable": [pair[0] for pair in in_ms], "begun again": [pair[1] for pair in in_ms]})
    axes.set_ylabel("ms from SIGKILL (median, least-greatest kill)")


if __name__ == "__main__":
    main()
