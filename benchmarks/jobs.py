"""Finite jobs on SQLite, disturbed: what ``engine.map`` promises, at full length.

    python -m benchmarks.jobs [kills [VALUES]] [resume [VALUES]]

``kills``: a map over so many values (50,000) while a worker is killed at random every fraction of a second: each result
must come exactly once. ``resume``: a map over so many values (100,000), SIGKILL of every process of it half-way, and
``resume=True``: each value's result must be handed out, and only what was in flight at the kill may be computed twice.
Exits with status 1 where a promise is broken.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from sqspipes_mp import Engine, SQLite, Task

WORKERS = 2
#: Seconds between two kills, on average.
BETWEEN_KILLS = 0.5


def work(value: int, folder: str) -> int:
    """Note which values were computed, in a file per worker, and give the value back."""
    with Path(f"{folder}/ran-{os.getpid()}").open("a") as file:
        file.write(f"{value}\n")
    return value


def same(value: int) -> int:
    """Give the value back."""
    return value


def engine(folder: str) -> Engine:
    """Return the pipeline that both jobs run."""
    tasks = [Task(work, workers=WORKERS, args=(folder,)), Task(same, workers=WORKERS)]
    return Engine(tasks, domain="jobs", broker=SQLite(f"{folder}/queues.db"), visibility_timeout=5)


def family(pid: int) -> list[psutil.Process]:
    """Return a process's descendants."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kills(count: int) -> bool:
    """Map over ``count`` values while workers are killed."""
    killed = 0
    over = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        results = engine(folder).map(range(count))

        def killer() -> None:
            nonlocal killed
            supervisor = psutil.Process().children()[0]
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
        computed = sum(ran(folder).values())
    once = sum(number == 1 for number in found.values())
    good = once == count == len(found)
    print(
        f"kills: {count:,} values, {killed} workers killed, {seconds:.1f} s: {once:,} results came once, "
        f"{len(found) - once:,} more often, {count - len(found):,} never; {computed - count:,} calls were repeated"
    )
    return good


def ran(folder: str) -> Counter[str]:
    """Count how often each value was computed."""
    counts: Counter[str] = Counter()
    for path in Path(folder).glob("ran-*"):
        counts.update(path.read_text().split())
    return counts


def resume(count: int) -> bool:
    """Map over ``count`` values in a program that is killed with all its children half-way, and resume it."""
    with tempfile.TemporaryDirectory() as folder:
        handed = Path(folder) / "handed"
        began = time.monotonic()
        program = start(folder, count)
        assert program.stdout is not None
        with handed.open("w") as file:
            for first, line in enumerate(program.stdout, 1):
                file.write(line)
                if first == count // 2:
                    everybody = [*family(program.pid), psutil.Process(program.pid)]
                    for process in everybody:
                        process.send_signal(signal.SIGKILL)
                    psutil.wait_procs(everybody[:-1])
        program.wait()
        before = handed.read_text().split()
        half = time.monotonic() - began
        program = start(folder, count)
        after = program.communicate()[0].split()
        seconds = time.monotonic() - began - half
        computed = ran(folder)
    values = {str(value) for value in range(count)}
    twice = len(set(before) & set(after))
    repeated = sum(number - 1 for number in computed.values())
    good = program.returncode == 0 and set(before) | set(after) == values == set(computed)
    good = good and len(set(after)) == len(after)
    print(
        f"resume: {count:,} values, SIGKILL of all after {len(before):,} results ({half:.1f} s), resumed for "
        f"{seconds:.1f} s: {count - len(values & (set(before) | set(after))):,} results never handed out, "
        f"{twice:,} handed out again, {repeated:,} calls repeated"
    )
    return good


def start(folder: str, count: int) -> subprocess.Popen[str]:
    """Start the program that maps and prints each result."""
    command = [sys.executable, "-m", "benchmarks.jobs", "program", folder, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def program(folder: str, count: int) -> None:
    """Map and print: what ``resume`` starts and kills."""
    for value in engine(folder).map(range(count), key=str, resume=True):
        print(value, flush=True)


def main(arguments: list[str]) -> int:
    """Run what is asked for, by default both."""
    if arguments[:1] == ["program"]:
        program(arguments[1], int(arguments[2]))
        return 0
    wanted = {"kills": 50_000, "resume": 100_000}
    numbers = iter([*arguments, ""])
    chosen: dict[str, int] = {}
    last = ""
    for argument in numbers:
        if argument.isdigit() and last:
            chosen[last] = int(argument)
        elif argument in wanted:
            last = argument
            chosen[last] = wanted[last]
        elif argument:
            print(__doc__)
            return 2
    results = [{"kills": kills, "resume": resume}[name](count) for name, count in (chosen or wanted).items()]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
