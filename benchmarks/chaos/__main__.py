"""What the engine loses or doubles when everything it consists of is killed again and again: nothing, it says.

Two programs share three stages and 20,000 items. Twice a second something happens, by seeded dice: a worker is
SIGKILLed or stopped for a while, a keeper is killed or stopped, a whole program is stopped, killed or asked to end, and
started again; a stage is paused for a while, or gets more or fewer workers (not with ``--no-orders``). On SQS's wire
(the stand-in, ``standin/``) 2 % of the requests are throttled, 1 % are reset, 1 % lose their reply, 2 % of the batches'
entries fail, and 1 % of the deliveries on standard queues come twice. Twelve items are poison. Afterwards the queues
decide; a broken rule makes the exit status 1.

Runs from a checkout only: the suite runs the same storm for some seconds, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos import Result, Weather, storm
from benchmarks.harness import Report, parse

BROKERS = ("sqlite", "fifo", "sqs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the storm over each broker asked for; return the exit status."""
    options = parse(__doc__, argv, _extra, interleaved=False)
    report = Report("chaos", options)
    broken = False
    for broker in options.broker or (BROKERS[:1] if options.quick else BROKERS):
        weather = Weather(
            broker=broker,
            items=options.items,
            seed=options.seed,
            most=options.turns,
            latency=options.latency,
            orders=options.orders,
        )
        if options.quick:
            weather = Weather(broker=broker, items=100, poison=2, seed=options.seed, visibility=2.0, most=4)
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            result = storm(weather, Path(folder), lambda line: print(line, flush=True))
            if result.broken:
                log = Path(f"chaos-{broker}-{weather.seed}.log").absolute()
                log.write_bytes((Path(folder) / "programs.log").read_bytes())
                result.broken.append(f"what the programs said: {log}")
        tell(report, weather, result)
        broken = broken or bool(result.broken)
    report.finish()
    return int(broken)


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--broker", choices=BROKERS, action="append", help="sqs: standard queues; default: all three")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1, help="of the dice: the same troubles, not the same instants")
    parser.add_argument("--latency", type=float, default=0.0, metavar="MS", help="of the stand-in (default: 0)")
    parser.add_argument("--no-orders", action="store_false", dest="orders", help="neither pause nor resize stages")
    parser.add_argument("--turns", type=int, default=500, help="hits after which nothing is killed any more")


def tell(report: Report, weather: Weather, result: Result) -> None:
    """Print what happened, and what came of it."""
    verdict = result.verdict
    rows: list[tuple[str, object]] = [
        ("seconds", f"{result.seconds:.0f}"),
        *sorted(result.done.items()),
        *(("requests", result.requests), *(sorted(result.faults.items()))),
        ("results", verdict.results),
        ("lost", len(verdict.lost)),
        ("doubled downstream", len(verdict.doubled)),
        ("dead letters", f"{verdict.dead} (poison: {weather.poison})"),
        ("innocents among them", len(verdict.innocent_dead)),
    ]
    title = f"{weather.broker}: {weather.items} items, seed {weather.seed}"
    report.table(title, ["what", "count"], rows)
    for rule in result.broken:
        report.note(f"BROKEN: {rule}")
    report.note(f"{weather.broker}: {'BROKEN' if result.broken else 'every rule holds'}")


if __name__ == "__main__":
    sys.exit(main())
