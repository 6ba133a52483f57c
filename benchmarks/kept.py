"""Keep ``map(keep_results=True)`` to its promise: the last run hands out every result, none missing, wrong or twice.

kills    a map over 100,000 values, among them fan-outs, drops, dead letters and tuples. Every process is SIGKILLed, a
         ``run`` finishes what was under way, every process is SIGKILLed twice more, and the last map is read to its end
memory   a map over 1,000,000 values whose results are kept already: seconds, and the memory it takes beyond 10,000 ones

The status is 1 where a result was missing, wrong, or came twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, parse
from benchmarks.jobs import kill_family
from sqspipes_mp import EmptyTaskOutput, Engine, Reject, SQLite, Task
from sqspipes_mp.messages.ids import token

WORKERS = 2
VALUES, QUICK = 100_000, 400
KEPT, QUICK_KEPT, FEW = 1_000_000, 20_000, 10_000
#: What a part of a value becomes.
KINDS = ("result", "result", "result", "result", "tuple", "tuple", "dropped", "dead")
Part = tuple[int, str]


def parts(value: int) -> list[Part]:
    """Return the parts of a value: none to four of them."""
    dice = random.Random(value)
    count = dice.choice((0, 1, 1, 1, 1, 1, 2, 3, 4))
    return [(index, dice.choice(KINDS)) for index in range(count)]


def split(value: int) -> Iterator[tuple[int, int, str]]:
    """Fan a value out."""
    for index, kind in parts(value):
        yield value, index, kind


def finish(part: tuple[int, int, str]) -> Any:
    """Return a part's result, drop it, or give it up."""
    value, index, kind = part
    if kind == "dead":
        raise Reject("it is one of those")
    if kind == "dropped":
        return EmptyTaskOutput
    return (value, index, ("a", "tuple")) if kind == "tuple" else {"value": value, "index": index}


def told(value: int, result: Any) -> str:
    """Write down a result, or a value's error."""
    return f"{value} {'dead' if isinstance(result, Exception) else json.dumps(result)}"


def expected(count: int) -> Counter[str]:
    """Return what each run has to hand out."""
    lines: Counter[str] = Counter()
    for value in range(count):
        kinds = parts(value)
        for index, kind in kinds:
            if kind in ("result", "tuple"):
                lines[told(value, finish((value, index, kind)))] += 1
        if any(kind == "dead" for _, kind in kinds):
            lines[told(value, Reject())] += 1
    return lines


def engine(folder: str) -> Engine:
    """Return the pipeline."""
    tasks = [Task(split, input=True, workers=WORKERS), Task(finish, workers=WORKERS)]
    return Engine(tasks, domain="kept", broker=SQLite(f"{folder}/queues.db"), on_error="reject", visibility_timeout=5)


def program(folder: str, count: int, *, drains: bool) -> None:
    """Map and print each result, or finish what is under way; then print the memory this process has had."""
    made = engine(folder)
    if drains:
        print(made.run(until="drained", idle=0.0)["finish"].done, flush=True)
        return
    results = made.map(range(count), key=str, keep_results=True, return_exceptions=True, with_input=True)
    for value, result in results:
        print(told(value, result), flush=True)
    # Not ru_maxrss, which begins with the memory of the process that started this one.
    [peak] = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    print(f"memory {peak}", flush=True)


def start(folder: str, count: int, *more: str) -> subprocess.Popen[str]:
    """Start this module as that program."""
    command = [sys.executable, "-m", "benchmarks.kept", "--in", folder, "--values", str(count), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def read(folder: str, count: int, most: int | None = None) -> tuple[Counter[str], int]:
    """Read a map's results, to its end or until it is killed after ``most``; returns them, and its memory in KiB."""
    process = start(folder, count)
    assert process.stdout is not None
    lines = Counter(line.rstrip("\n") for line in islice(process.stdout, most))
    if most is not None:
        kill_family(process.pid)
        # What it had printed before its death was handed out, too.
        lines.update(process.stdout.read().splitlines())
    if process.wait() and most is None:
        raise SystemExit(f"the map ended with status {process.returncode}")
    memory = [line for line in lines if line.startswith("memory")]
    del lines["".join(memory)]
    return lines, int(memory[0].split()[1]) if memory else 0


def kills(report: Report, count: int, seed: int) -> bool:
    """Kill a map three times, and compare what the last one hands out with what it should."""
    dice = random.Random(seed)
    wanted = expected(count)
    rows = []
    with tempfile.TemporaryDirectory(prefix="kept-") as folder:
        for number in range(3):
            began = time.monotonic()
            most = int(len(wanted) * dice.uniform(0.1, 0.3) * (number + 1))
            lines, _ = read(folder, count, most)
            rows.append([f"map {number + 1}, killed", f"{time.monotonic() - began:.1f}", *compared(lines, wanted)])
            if number == 0:
                began = time.monotonic()
                done = start(folder, count, "--drains").communicate()[0].strip()
                rows.append(["run, to its end", f"{time.monotonic() - began:.1f}", done, "", "", ""])
        for name in ("last map", "once more"):
            began = time.monotonic()
            lines, _ = read(folder, count)
            rows.append([name, f"{time.monotonic() - began:.1f}", *compared(lines, wanted)])
    report.table(
        f"{count:,} values with {wanted.total():,} results and errors, all processes killed three times, seed {seed}",
        ["run", "seconds", "results", "missing", "wrong", "twice"],
        rows,
    )
    # A run that was killed misses some; what it handed out was right all the same.
    return all(row[4:] in ([0, 0], ["", ""]) for row in rows) and [row[3] for row in rows[-2:]] == [0, 0]


def compared(lines: Counter[str], wanted: Counter[str]) -> list[int]:
    """Return how many lines came, are missing, are wrong, and came too often."""
    wrong = sum(count for line, count in lines.items() if line not in wanted)
    twice = sum(max(0, count - wanted[line]) for line, count in lines.items() if line in wanted)
    return [lines.total(), (wanted - lines).total(), wrong, twice]


def memory(report: Report, count: int) -> bool:
    """Measure the memory of a map that finds all of its results kept."""
    rows = []
    right = True
    for values in (min(FEW, count), count):
        with tempfile.TemporaryDirectory(prefix="kept-") as folder:
            fill(folder, values)
            began = time.monotonic()
            lines, kib = read(folder, values)
            right &= lines == Counter(told(value, [value, "kept"]) for value in range(values))
            rows.append([f"{values:,}", f"{time.monotonic() - began:.1f}", f"{kib / 1024:.1f}"])
    report.table("a map whose results are all kept", ["values", "seconds", "MiB of the caller's"], rows)
    return right


def fill(folder: str, count: int) -> None:
    """Write a file in which the results of all values are kept."""
    made = engine(folder)
    made.put(0, key="0")
    made.run(until="drained", idle=0.0)
    queue = made.pipeline.stages[0].inputs[-1]
    with contextlib.closing(sqlite3.connect(f"{folder}/queues.db")) as db, db:
        [number] = db.execute("SELECT id FROM queues WHERE name = ?", (queue,)).fetchone()
        tokens = ((number, token(str(value))) for value in range(1, count))
        db.executemany("INSERT INTO keys (queue, hop) VALUES (?, ?)", tokens)
        ends = ((number, token(str(value)), value + 1, json.dumps([value, "kept"])) for value in range(count))
        db.executemany("INSERT INTO ends (queue, token, seq, kept, result) VALUES (?, ?, ?, 1, ?)", ends)
        db.execute("UPDATE meta SET next_seq = next_seq + ?", (count + 1,))


def main(argv: Sequence[str] | None = None) -> int:
    """Run both jobs."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--values", type=int, metavar="N", help=f"values of the first job (default: {VALUES:,})")
        parser.add_argument("--kept", type=int, metavar="N", help=f"values of the second job (default: {KEPT:,})")
        parser.add_argument("--seed", type=int, default=1, help="of the kills")
        parser.add_argument("--in", dest="folder", help=argparse.SUPPRESS)
        parser.add_argument("--drains", action="store_true", help=argparse.SUPPRESS)

    options = parse(__doc__, argv, extra, interleaved=False)
    if options.folder is not None:
        program(options.folder, options.values, drains=options.drains)
        return 0
    report = Report("kept", options)
    right = kills(report, options.values or (QUICK if options.quick else VALUES), options.seed)
    right &= memory(report, options.kept or (QUICK_KEPT if options.quick else KEPT))
    report.note("every result came once" if right else "BROKEN: see the tables")
    report.finish()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
