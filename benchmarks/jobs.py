"""Keep finite jobs on SQLite to the promises of ``engine.map``, at full length and disturbed all the time.

kills    a map over 50,000 values while workers are killed at random: each result must come exactly once
resume   a map over 100,000 values, SIGKILL of every process of it half-way, then ``resume=True``: each value's result
         must be handed out, and only what was in flight at the kill may come or be computed twice

The status is 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.harness import Report, parse
from sqspipes_mp import Engine, SQLite, Task

WORKERS = 2
#: Seconds between two kills, on average.
BETWEEN_KILLS = 0.5
KILLS, RESUME, QUICK = 50_000, 100_000, 3_000


def work(value: int, folder: str) -> int:
    """Note which values were computed, in a file per worker, and give the value back."""
    with (Path(folder) / f"ran-{os.getpid()}").open("a") as file:
        file.write(f"{value}\n")
    return value


def same(value: int) -> int:
    """Give the value back."""
    return value


def engine(folder: str) -> Engine:
    """Return the pipeline that both jobs run."""
    tasks = [Task(work, workers=WORKERS, args=(folder,)), Task(same, workers=WORKERS)]
    return Engine(tasks, domain="jobs", broker=SQLite(f"{folder}/queues.db"), visibility_timeout=5)


def kills(report: Report, count: int) -> bool:
    """Map over ``count`` values while workers are killed."""
    killed = 0
    over = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        results = engine(folder).map(range(count))
        supervisor = psutil.Process().children()[0]

        def killer() -> None:
            nonlocal killed
            while not over.wait(random.uniform(0, 2 * BETWEEN_KILLS)):
                # The keeper is the supervisor's first child, and is not what dies here.
                workers = sorted(supervisor.children(), key=lambda child: child.create_time())[1:]
                if workers:
                    random.choice(workers).kill()
                    killed += 1

        thread = threading.Thread(target=killer)
        thread.start()
        try:
            found = Counter(results)
        finally:
            over.set()
            thread.join()
        seconds = time.monotonic() - began
        computed = ran(folder)
    once = sum(number == 1 for number in found.values())
    report.table(
        f"a map over {count:,} values, workers killed at random",
        ["killed", "seconds", "came once", "more often", "never", "calls repeated"],
        [[killed, f"{seconds:.1f}", once, len(found) - once, count - len(found), computed.total() - count]],
    )
    return once == count == len(found)


def resume(report: Report, count: int) -> bool:
    """Map over ``count`` values in a program that is killed with all its children half-way, and resume it."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        program = start(folder, count)
        assert program.stdout is not None
        before: list[str] = []
        for line in program.stdout:
            before.append(line.strip())
            if len(before) == count // 2:
                kill_family(program.pid)
        program.wait()
        half = time.monotonic() - began
        program = start(folder, count)
        after = program.communicate()[0].split()
        seconds = time.monotonic() - began - half
        computed = ran(folder)
    wanted = {str(value) for value in range(count)}
    missing = wanted - set(before) - set(after)
    report.table(
        f"a map over {count:,} values, SIGKILL of all its processes half-way, and resumed",
        ["results before", "seconds", "seconds resumed", "never came", "came again", "calls repeated"],
        [[
            len(before), f"{half:.1f}", f"{seconds:.1f}", len(missing), len(set(before) & set(after)),
            computed.total() - count,
        ]],
    )  # fmt: skip
    return program.returncode == 0 and not missing and set(computed) == wanted and len(set(after)) == len(after)


def kill_family(pid: int) -> None:
    """Kill a process and all that came of it, and wait until they are gone."""
    process = psutil.Process(pid)
    children = process.children(recursive=True)
    for each in [process, *children]:
        each.send_signal(signal.SIGKILL)
    psutil.wait_procs(children)


def ran(folder: str) -> Counter[str]:
    """Count how often each value was computed."""
    counts: Counter[str] = Counter()
    for path in Path(folder).glob("ran-*"):
        counts.update(path.read_text().split())
    return counts


def start(folder: str, count: int) -> subprocess.Popen[str]:
    """Start the program that maps and prints each result."""
    command = [sys.executable, "-m", "benchmarks.jobs", "--in", folder, "--values", str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both jobs."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--values", type=int, metavar="N", help="values of each job (default: 50,000 and 100,000)")
        parser.add_argument("--in", dest="folder", help=argparse.SUPPRESS)

    options = parse(__doc__, argv, extra, interleaved=False)
    if options.folder is not None:
        for value in engine(options.folder).map(range(options.values), key=str, resume=True):
            print(value, flush=True)
        return 0
    report = Report("jobs", options)
    kept = kills(report, options.values or (QUICK if options.quick else KILLS))
    kept &= resume(report, options.values or (QUICK if options.quick else RESUME))
    report.finish()
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
