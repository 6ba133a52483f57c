"""Show how many requests are under way: idle, with short and long calls, after a step of the distance, after the end.

Each row is a window in one run of one worker over the stand-in; the ledger is asked again and again, and the means of
the requests that it had not answered are printed. *needed* is what keeps the function fed: calls per second times the
round trip, ten to a request (Little's law). A receive that waits in a long poll counts as under way.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import queues
from benchmarks.harness import Report, parse
from benchmarks.serving import serving
from benchmarks.watching import feed
from sqspipes_mp import Engine, Task

_COUNTED = ("ReceiveMessage", "SendMessageBatch", "DeleteMessageBatch")
#: Seconds between two looks at the ledger.
_LOOK = 0.02


def rest(value: object, seconds: float, calls: str) -> object:
    """Take so many seconds without CPU, which the stand-in needs, and note the call."""
    threading.Event().wait(seconds)
    with Path(calls).open("ab") as file:
        file.write(b".")
    return value


def window(server: Any, seconds: float, latency: float, calls: Path) -> list[str]:
    """Watch for so many seconds; return calls per second, the needed number, and the means under way."""
    sums, looks = dict.fromkeys(_COUNTED, 0), 0
    begun = calls.stat().st_size if calls.exists() else 0
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        ledger = server.ledger(messages=False)["requests"]
        for name in _COUNTED:
            sums[name] += ledger.get(name, {"under_way": 0})["under_way"]
        looks += 1
        threading.Event().wait(_LOOK)
    rate = ((calls.stat().st_size if calls.exists() else 0) - begun) / (time.monotonic() - start)
    means = [f"{sums[name] / looks:.1f}" for name in _COUNTED]
    return [f"{rate:.0f}", f"{rate * latency / 1000 / 10:.1f}", *means]


def run(length: float, first: float, then: float, seconds: float, report: list[list[str]]) -> None:
    """Run calls of ``length`` ms ``first`` ms away, step to ``then`` ms, let the queue run dry; add the rows."""
    with tempfile.TemporaryDirectory(prefix="under-way-") as folder, queues.sqs_standin(latency_ms=first) as made:
        server, fresh = made
        calls = Path(folder) / "calls"
        work = Task(partial(rest, seconds=length / 1000, calls=str(calls)), name="work")
        engine = Engine([Task(queues.nothing), work, Task(queues.after)], domain="bench", broker=fresh())
        feed(engine, "work", [])

        def row(state: str, latency: float) -> None:
            report.append([f"{length:g}", state, f"{latency:g}", *window(server, seconds, latency, calls)])

        with serving(engine, "work"):
            threading.Event().wait(seconds)
            row("idle", first)
            queues.fill(engine, "work", range(int(12 * seconds * 1000 / length)))
            threading.Event().wait(5.0 if seconds > 1 else 0.5)
            row("5 s later", first)
            server.faults(latency_ms=then)
            threading.Event().wait(1.0)
            row("1 s after the step", then)
            server.faults(latency_ms=first)
            while server.ledger(messages=False)["queues"]["bench-nothing"]["visible"]:
                threading.Event().wait(0.1)
            threading.Event().wait(25.0 if seconds > 1 else 1.0)
            row("25 s after the end", first)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", nargs="+", type=float, default=[1.0, 10.0, 100.0], metavar="MS")
    parser.add_argument("--first", type=float, default=5.0, metavar="MS", help="distance at first (default: 5)")
    parser.add_argument("--then", type=float, default=60.0, metavar="MS", help="distance after the step (default: 60)")
    parser.add_argument("--seconds", type=float, help="of each window (default: 3)")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each length and print one table."""
    options = parse(__doc__, argv, _options, interleaved=False)
    report = Report("under_way", options)
    rows: list[list[str]] = []
    for length in options.lengths[:1] if options.quick else options.lengths:
        run(length, options.first, options.then, options.seconds or (0.3 if options.quick else 3.0), rows)
    columns = ["ms", "when", "distance, ms", "calls/s", "needed", "receives", "sends", "deletes"]
    report.table("Requests under way, means", columns, rows)
    report.finish()


if __name__ == "__main__":
    main()
