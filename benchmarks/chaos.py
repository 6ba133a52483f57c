"""What does the engine lose or double when everything it consists of is killed again and again?

Two programs share three stages and 20,000 items. Twice a second something happens, by seeded dice: a worker is
SIGKILLed or stopped for a while, a keeper is killed or stopped, a whole program is stopped, killed or asked to end, and
started again. On SQS's wire (the stand-in of ``tests/standin``) 2 % of the requests are throttled, 1 % are reset, 1 %
lose their reply, 2 % of the batches' entries fail, and 1 % of the deliveries on standard queues come twice. Twelve
items are poison. Afterwards the queues decide; a broken rule makes the exit status 1.

Runs from a checkout only: the storm itself is ``tests/chaos``, which the suite runs for some seconds, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.chaos import Result, Weather, storm

BROKERS = ("sqlite", "fifo", "sqs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the storm over each broker asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=BROKERS, action="append", help="sqs: standard queues; default: all three")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1, help="of the dice: the same troubles, not the same instants")
    parser.add_argument("--turns", type=int, default=500, help="hits after which nothing is killed any more")
    parser.add_argument("--quick", action="store_true", help="300 items, some seconds: shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(argv)
    if options.items < 1:
        parser.error("--items must be 1 or more")
    told = {}
    broken = False
    for broker in options.broker or BROKERS:
        weather = Weather(broker=broker, items=options.items, seed=options.seed, most=options.turns)
        if options.quick:
            weather = Weather(broker=broker, items=300, poison=4, seed=options.seed, visibility=2.0, most=10)
        print(f"\n{broker}: {weather.items} items, {weather.poison} of them poison, seed {weather.seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            result = storm(weather, Path(folder), lambda line: print(line, flush=True))
            if result.broken:
                log = Path(f"chaos-{broker}-{weather.seed}.log").absolute()
                log.write_bytes((Path(folder) / "programs.log").read_bytes())
                result.broken.append(f"what the programs said: {log}")
        tell(broker, weather, result)
        told[broker] = {"weather": asdict(weather), **asdict(result)}
        broken = broken or bool(result.broken)
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return int(broken)


def tell(broker: str, weather: Weather, result: Result) -> None:
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
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    for rule in result.broken:
        print(f"  BROKEN: {rule}")
    print(f"  {broker}: {'BROKEN' if result.broken else 'every rule holds'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
