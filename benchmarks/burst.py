"""Measure how soon a few hundred waiting messages are done by workers that have just begun, over Pool's time.

Nothing is known yet: neither how long a call takes nor how far away the queues are. The clock runs from the first
receive's arrival at the stand-in to the reply of the last delete there; Pool's from the first call's start to the last
call's end. Receives, sends and deletes are counted, with the most of each that were under way at once.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import queues
from benchmarks.harness import Report, Spread, bars, interleave, parse
from benchmarks.hop import Case, pool
from benchmarks.work import calibrate
from sqspipes_mp import Engine, Task

_COUNTED = ("ReceiveMessage", "SendMessageBatch", "DeleteMessageBatch")


def burst(case: Case, latency: float, counted: list[dict[str, dict[str, Any]]]) -> float:
    """Return the seconds from the first receive to the last delete; add the ledger's counts to ``counted``."""
    with queues.sqs_standin(latency_ms=latency) as (server, fresh):
        work = Task(case.call(case.calls, stop=True), name="work", workers=case.workers)
        engine = Engine([Task(queues.nothing), work, Task(queues.after)], domain="bench", broker=fresh())
        queues.fill(engine, "work", range(case.calls))
        engine.run(only="work")
        counted.append(server.ledger(messages=False)["requests"])
    return float(counted[-1]["DeleteMessageBatch"]["last"] - counted[-1]["ReceiveMessage"]["first"])


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--messages", type=int, metavar="N", help="default: 400 (--quick: 40)")
    parser.add_argument("--length", type=float, default=10.0, metavar="MS", help="of a call (default: 10)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--latency", nargs="+", type=float, default=[5.0, 20.0, 60.0], metavar="MS")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each distance and print one table."""
    options = parse(__doc__, argv, _options)
    report = Report("burst", options)
    calls = options.messages or (40 if options.quick else 400)
    rows: list[list[object]] = []
    ratios: list[Spread] = []
    with tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-") as folder:
        case = Case(Path(folder), max(1, round(calibrate("python") * options.length)), options.workers, calls)
        for latency in options.latency:
            counted: list[dict[str, dict[str, Any]]] = []
            found = interleave(
                {"pool": lambda: calls / pool(case), "engine": partial(burst, case, latency, counted)}, options.rounds
            )
            ratios.append(found["engine"].over(found["pool"]))
            report.keep(f"{latency:g} ms, over Pool", ratios[-1])
            requests = [
                "/".join(str(counted[-1].get(name, {}).get(key, 0)) for name in _COUNTED)
                for key in ("requests", "most")
            ]
            rows.append([f"{latency:g}", *(found[name].text() for name in found), ratios[-1].text(), *requests])
    report.table(
        f"Seconds for {calls} messages of {options.length:g} ms, {options.workers} workers",
        ["distance, ms", "Pool", "engine", "engine over Pool", "receives/sends/deletes", "most at once"],
        rows,
    )
    report.finish(partial(_draw, options.latency, ratios))


def _draw(latencies: Sequence[float], ratios: Sequence[Spread], figure: Any) -> None:
    axes = figure.subplots()
    bars(axes, [f"{latency:g} ms" for latency in latencies], {"engine over Pool": ratios})
    axes.set_ylabel("time over Pool's")


if __name__ == "__main__":
    main()
