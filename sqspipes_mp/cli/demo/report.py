"""What the demo has found, as text and as JSON. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from sqspipes_mp.cli.console import table
from sqspipes_mp.ipc.summary import StageSummary

_TOP = 10
_ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class OneProcess:
    """The same functions called in one process: so many ``files`` of ``total``."""

    files: int
    total: int
    lines: int
    seconds: float

    @property
    def lines_per_second(self) -> float:
        return self.lines / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came out of the pipeline; ``seconds``: from the call of ``run`` until every process was gone."""

    root: Path
    reports: Sequence[dict[str, Any]]
    seconds: float
    stages: Sequence[StageSummary]
    cpus: int

    @property
    def parsed(self) -> list[dict[str, Any]]:
        return [report for report in self.reports if "error" not in report]

    @property
    def errors(self) -> list[tuple[str, str]]:
        """(path, what is wrong) of each file that could not be measured."""
        return sorted((self.short(report["path"]), report["error"]) for report in self.reports if "error" in report)

    @property
    def lines(self) -> int:
        return sum(report["lines"] for report in self.parsed)

    @property
    def functions(self) -> int:
        return sum(report["functions"] for report in self.parsed)

    @property
    def files_per_second(self) -> float:
        return len(self.reports) / self.seconds

    @property
    def lines_per_second(self) -> float:
        return self.lines / self.seconds

    def top(self) -> list[tuple[int, str, str]]:
        """Return (complexity, name, file:line) of the most complex functions."""
        found = (
            (paths, name, f"{self.short(report['path'])}:{line}")
            for report in self.parsed
            for paths, name, line in report["top"]
        )
        return heapq.nsmallest(_TOP, found, key=lambda item: (-item[0], item[2]))

    def short(self, path: str) -> str:
        """Return a path as seen from the root."""
        return path.removeprefix(f"{self.root}/")


def as_text(measured: Measured, alone: OneProcess) -> str:
    """Return the report for people."""
    return "\n".join(_lines(measured, alone))


def _lines(measured: Measured, alone: OneProcess) -> Iterator[str]:
    yield f"The most complex functions of {measured.root} (McCabe; site-packages and hidden folders left out):\n"
    yield table(("where", "function", "complexity"), [(where, name, n) for n, name, where in measured.top()], left=2)
    yield (
        f"\n{len(measured.reports):,} files, {measured.lines:,} lines, {measured.functions:,} functions "
        f"in {measured.seconds:.1f} s: {measured.files_per_second:,.0f} files and "
        f"{measured.lines_per_second:,.0f} lines per second\n"
    )
    yield table(
        ("stage", "workers", "files", "busy"),
        [(stage.name, stage.workers, stage.done, f"{stage.busy:.0%}") for stage in measured.stages],
    )
    yield "(files: messages done; a source's are its calls. busy: share of the workers' time in the function)\n"
    errors = measured.errors
    if errors:
        yield f"{len(errors):,} of the files could not be read or parsed, and have no lines or functions here:"
        yield from (f"  {path}: {shorten(error, 90)}" for path, error in errors[:_ERRORS_SHOWN])
        if len(errors) > _ERRORS_SHOWN:
            yield f"  and {len(errors) - _ERRORS_SHOWN:,} more"
        yield ""
    yield from _comparison(measured, alone)


def _comparison(measured: Measured, alone: OneProcess) -> Iterator[str]:
    if not alone.lines or not measured.lines:
        yield "Nothing could be parsed, so there is no speed to compare."
        return
    which = "all the files" if alone.files == alone.total else f"a random sample of {alone.files:,} of the files"
    yield (
        f"One process alone, without queues, just before: {which}, {alone.lines:,} lines in {alone.seconds:.1f} s,\n"
        f"{alone.lines_per_second:,.0f} lines per second."
    )
    faster = f"{_speedup(measured, alone):.2f} times as fast"
    yield f"The pipeline, its start and end included, was {faster}, with {measured.cpus} CPUs to use."
    yield "Whatever else runs on this machine disturbs both measurements."
    if _speedup(measured, alone) > measured.cpus:
        yield "More than its CPUs can give: the one process was disturbed. Run the demo again."
    if measured.seconds < 2:
        yield "(Starting and ending take most of so short a run.)"


def _speedup(measured: Measured, alone: OneProcess) -> float:
    return measured.lines_per_second / alone.lines_per_second


def as_json(measured: Measured, alone: OneProcess) -> dict[str, Any]:
    """Return the report as plain data."""
    return {
        "root": str(measured.root),
        "files": len(measured.reports),
        "lines": measured.lines,
        "functions": measured.functions,
        "seconds": measured.seconds,
        "files_per_second": measured.files_per_second,
        "lines_per_second": measured.lines_per_second,
        "most_complex": [{"complexity": n, "function": name, "where": where} for n, name, where in measured.top()],
        "errors": [{"path": path, "error": error} for path, error in measured.errors],
        "stages": [asdict(stage) for stage in measured.stages],
        "cpus": measured.cpus,
        "one_process": {
            "files": alone.files,
            "sample": alone.files < alone.total,
            "lines": alone.lines,
            "seconds": alone.seconds,
        },
        "speedup": _speedup(measured, alone) if alone.lines and measured.lines else None,
    }
