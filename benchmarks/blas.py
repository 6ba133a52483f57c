"""Measure what workers times numeric threads cost: numpy's matrix product in one worker per CPU.

share   as the engine does it: max(1, CPUs // workers) threads in each worker
all     as many threads as CPUs in each worker, as libraries do when nobody tells them
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import queues
from benchmarks.harness import Report, interleave, parse
from benchmarks.work import Tally, installed
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.host.numeric_threads import share, variables

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Product:
    """Multiply two square matrices; numpy is imported in the worker, where it finds the environment of its engine."""

    size: int
    tally: Tally

    def __call__(self, _value: int) -> None:
        import numpy as np  # noqa: PLC0415  (optional, and read there)

        matrix = np.full((self.size, self.size), 0.5)
        started = time.monotonic()
        np.matmul(matrix, matrix)
        self.tally.note(started)


@contextlib.contextmanager
def _set(threads: int | None) -> Iterator[None]:
    """Set the variables as a user would; None: there are none."""
    kept = dict(os.environ)
    for name in variables({}, 1):
        os.environ.pop(name, None)
    if threads is not None:
        os.environ.update(variables({}, threads))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def products(threads: int | None, workers: int, calls: int, size: int, folder: Path) -> float:
    """Return products per second."""
    tally = Tally(str(folder / str(next(_numbers))), calls, os.getpid())
    work = Task(Product(size, tally), name="work", workers=workers)
    engine = Engine([Task(queues.nothing), work], domain="bench", broker=SQLite())
    queues.fill(engine, "work", range(calls))
    with _set(threads):
        engine.run(only="work")
    return tally.rate()


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=cpus(), metavar="N", help="default: one per CPU")
    parser.add_argument("--size", type=int, metavar="N", help="rows and columns (default: 700; --quick: 200)")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both and print one table."""
    options = parse(__doc__, argv, _options)
    report = Report("blas", options)
    if not installed("numpy"):
        report.note("left out: numpy is not installed")
        report.finish()
        return
    size = options.size or (200 if options.quick else 700)
    calls = options.workers * (2 if options.quick else 20)
    threads = {"share": share(cpus(), options.workers), "all": cpus()}
    with tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-") as name:
        run = partial(products, workers=options.workers, calls=calls, size=size, folder=Path(name))
        subjects = {"share": partial(run, None), "all": partial(run, cpus())}
        spreads = interleave(subjects, options.rounds)
    rows: list[list[object]] = []
    for subject, spread in spreads.items():
        report.keep(f"{subject}, products/s", spread)
        rows.append([subject, threads[subject], f"{spread.median:.1f}", spread.over(spreads["all"]).text()])
    columns = ["numeric threads", "in each worker", "products/s", "times as fast as all"]
    report.table(f"numpy.matmul of {size} x {size} in {options.workers} workers", columns, rows)
    report.finish(partial(_draw, spreads))


def _draw(spreads: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    axes.bar(list(spreads), [spread.median for spread in spreads.values()])
    axes.set_ylabel("products per second")


if __name__ == "__main__":
    main()
