"""What every benchmark shares: its options, the machine's description, interleaved rounds, tables and files.

A benchmark is a module with a ``main``::

    def main(argv: Sequence[str] | None = None) -> None:
        options = parse(__doc__, argv)
        report = Report("name", options)
        spreads = interleave({"ours": ours, "theirs": theirs}, rounds=options.rounds)
        report.table("messages per second", ["subject", "median", "spread"], rows)
        report.finish(plot)

``parse`` gives each one ``--quick``, ``--rounds``, ``--json`` and ``--plot``; ``Report`` prints the machine first, then
each table as soon as it is known, and ``finish`` writes the files that were asked for.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqspipes_mp.host.cpus import cpus

#: Rounds of a full run, and of ``--quick``.
ROUNDS, QUICK_ROUNDS = 5, 1


@dataclass(frozen=True, slots=True)
class Spread:
    """What one subject measured, one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)

    def over(self, reference: Spread) -> Spread:
        """Return the ratios to another subject, round by round: what disturbs a round disturbs both of its sides."""
        return Spread(tuple(ours / theirs for ours, theirs in zip(self.samples, reference.samples, strict=True)))

    def text(self, digits: int = 2) -> str:
        """Write as ``median (low-high)``; the median alone where there is one sample."""
        median = f"{self.median:.{digits}f}"
        return median if len(self.samples) == 1 else f"{median} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def interleave(subjects: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Spread]:
    """Measure each subject once per round, in turn: every other round backwards, so that none is always the first."""
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        names = list(subjects)
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(subjects[name]())
    return {name: Spread(tuple(values)) for name, values in samples.items()}


def machine() -> dict[str, str | int]:
    """Describe the machine by its parts; never by its name."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cpus": os.cpu_count() or 1,
        "usable": cpus(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
    }


def parse(
    doc: str | None,
    argv: Sequence[str] | None = None,
    extra: Callable[[argparse.ArgumentParser], object] | None = None,
    *,
    interleaved: bool = True,
) -> argparse.Namespace:
    """Read the command line: ``quick``, ``rounds``, ``json`` and ``plot``, and what ``extra`` adds to the parser.

    Without ``interleaved`` there is no ``--rounds``: the benchmark has a count of its own (kills, seconds, items).
    """
    summary = (doc or "").strip()
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: shows that it works, measures nothing")
    if interleaved:
        parser.add_argument("--rounds", type=int, metavar="N", help=f"interleaved rounds (default: {ROUNDS})")
    else:
        parser.set_defaults(rounds=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables and samples here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them here (needs matplotlib)")
    if extra is not None:
        extra(parser)
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install '.[plot]' in the checkout")
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist")
    return options


def bars(axes: Any, labels: Sequence[str], series: Mapping[str, Sequence[Spread]]) -> None:
    """Draw a group of bars per label, a bar per series, with the least and greatest round as a line over each."""
    width = 0.8 / len(series)
    for place, (name, spreads) in enumerate(series.items()):
        shift = (place - (len(series) - 1) / 2) * width
        axes.bar(
            [index + shift for index in range(len(labels))],
            [spread.median for spread in spreads],
            width,
            label=name,
            yerr=[[each.median - each.low for each in spreads], [each.high - each.median for each in spreads]],
            error_kw={"linewidth": 0.8},
        )
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.legend(fontsize=8)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Lay out as an rst simple table: numbers to the right, everything else to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [bool(cells) and all(row[index][:1].isdigit() for row in cells) for index in range(len(columns))]
    rule = "  ".join("=" * width for width in widths)

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(f"{indent}{text}" for text in [rule, line(columns), rule, *map(line, cells), rule])


@dataclass(slots=True)
class Report:
    """The output of one benchmark: printed as it comes, written to files by ``finish``."""

    name: str
    options: argparse.Namespace
    tables: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    machine: dict[str, str | int] = field(default_factory=machine)
    date: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).date().isoformat())

    #: Processes that wanted a CPU in the minute before this one began: above 0.5 or so, somebody else is at work.
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    def __post_init__(self) -> None:
        print(f"{self.name}: {self.where()}; load {self.load:.2f} at the start", flush=True)
        if self.options.quick:
            print("--quick: shows that it works; the figures mean nothing", flush=True)

    def where(self) -> str:
        """Say when and on what this was measured, in one line."""
        about = self.machine
        return f"{self.date}, {about['cpu']}, {about['usable']} usable CPUs, {about['python']}, {about['system']}"

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table and keep it."""
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        print(f"\n{title}\n\n{table(columns, rows)}", flush=True)

    def note(self, text: str) -> None:
        """Print a line (what was left out and why, what a figure depends on) and keep it."""
        self.notes.append(text)
        print(text, flush=True)

    def keep(self, name: str, spread: Spread) -> None:
        """Keep the raw samples of a subject for the JSON file."""
        self.samples[name] = list(spread.samples)

    def finish(self, plot: Callable[[Any], object] | None = None) -> None:
        """Write what ``--json`` and ``--plot`` asked for. ``plot`` gets a matplotlib ``Figure`` to draw on."""
        if self.options.json is not None:
            kept = ("machine", "date", "load", "tables", "notes", "samples")
            told = {
                "benchmark": self.name,
                "quick": self.options.quick,
                "rounds": self.options.rounds,
                **{key: getattr(self, key) for key in kept},
            }
            self.options.json.write_text(json.dumps(told, indent=1, default=str) + "\n")
        if self.options.plot is not None and plot is None:
            print("--plot: this benchmark draws nothing", flush=True)
        elif self.options.plot is not None and plot is not None:
            # A Figure of its own: pyplot would start a graphical backend and keep state.
            from matplotlib.figure import Figure  # noqa: PLC0415  (optional)

            figure = Figure(figsize=(9, 5), layout="constrained")
            plot(figure)
            figure.supxlabel(self.where(), fontsize=8, color="gray")
            figure.savefig(self.options.plot, dpi=120)
