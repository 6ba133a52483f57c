"""Measure how fast values are fed to SQS at a distance: ``put_many``, ``map``'s feeding, and a generator source.

Nothing receives what ``put_many`` and the source send; ``map`` has a stage that passes its values on, and its figure
is results per second from the first to the last.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks import queues
from benchmarks.harness import Report, Spread, bars, interleave, parse
from sqspipes_mp import Engine, Task
from sqspipes_mp.brokers.base import Broker


def numbers(count: int) -> Iterator[int]:
    """Make so many values."""
    yield from range(count)


def same(value: int) -> int:
    """Pass a value on."""
    return value


def by_put_many(count: int, fresh: Callable[[], Broker]) -> float:
    """Return values per second."""
    engine = Engine([Task(same, input=True)], domain="bench", broker=fresh())
    engine.put(0)
    began = time.monotonic()
    engine.put_many(range(count))
    return count / (time.monotonic() - began)


def by_source(count: int, fresh: Callable[[], Broker]) -> float:
    """Return values per second of a generator, its worker's start and end included."""
    engine = Engine([Task(numbers, args=(count,)), queues.after], domain="bench", broker=fresh())
    began = time.monotonic()
    summary = engine.run(only="numbers")
    took = time.monotonic() - began
    if summary["numbers"].done != count:
        raise RuntimeError(f"{summary['numbers'].done} of {count} values were sent")
    return count / took


def by_map(count: int, fresh: Callable[[], Broker]) -> float:
    """Return results per second, from the first to the last."""
    engine = Engine([Task(same, workers=2)], domain="bench", broker=fresh())
    results = engine.map(range(count))
    with results:
        next(results)
        began = time.monotonic()
        left = sum(1 for _ in itertools.islice(results, count - 1))
        return left / (time.monotonic() - began)


WAYS: dict[str, Callable[[int, Callable[[], Broker]], float]] = {
    "put_many": by_put_many,
    "source": by_source,
    "map": by_map,
}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--values", type=int, metavar="N", help="in each run (default: 5000; --quick: 200)")
    parser.add_argument("--latencies", nargs="+", type=float, metavar="MS", help="of the stand-in (default: 5 20 60)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="default: all")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each way at each distance."""
    options = parse(__doc__, argv, _options)
    report = Report("feed", options)
    count = options.values or (200 if options.quick else 5000)
    rows: list[list[object]] = []
    drawn: dict[str, list[Spread]] = {way: [] for way in options.ways}
    latencies = options.latencies or ([5.0] if options.quick else [5.0, 20.0, 60.0])
    for latency in latencies:
        with queues.sqs_standin(latency_ms=latency) as (_, fresh):
            spreads = interleave({way: partial(WAYS[way], count, fresh) for way in options.ways}, options.rounds)
        for way, spread in spreads.items():
            report.keep(f"{way}, {latency:g} ms", spread)
            drawn[way].append(spread)
            rows.append([f"{latency:g}", way, count, spread.text(0)])
    report.table("Values per second", ["ms away", "way", "values", "per second"], rows)
    report.note("The stand-in shares the CPUs with what is measured.")
    report.finish(partial(_draw, [f"{latency:g} ms" for latency in latencies], drawn))


def _draw(labels: list[str], drawn: dict[str, list[Spread]], figure: Any) -> None:
    axes = figure.subplots()
    bars(axes, labels, drawn)
    axes.set_ylabel("values per second")


if __name__ == "__main__":
    main()
