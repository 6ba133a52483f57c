"""Measure what being looked at costs: an engine probed and scraped over HTTP each second, and one left alone.

pairs     the engine's own CPU per message (supervisor, keeper, workers; not the HTTP process), and their ratio
scrapes   CPU of the HTTP process for one scrape, by the number of workers
"""

from __future__ import annotations

import http.client
import multiprocessing
import os
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import queues
from benchmarks.harness import Report, Spread, interleave, parse
from sqspipes_mp import Engine, SQLite, Task, TaskLike
from sqspipes_mp.supervisor.http_process import HttpProcess

_WORKERS = 2
#: Pairs of a full run, and messages of each run: some seconds on a machine without other work.
_PAIRS, _MESSAGES = 10, 200_000


def work(value: Any) -> Any:
    """Do next to nothing, so that the engine's own CPU is nearly all there is."""
    return value


def engine_at(file: str, workers: int) -> Engine:
    """Return an engine with a measured stage between two that do not run."""
    tasks: list[TaskLike] = [queues.nothing, Task(work, workers=workers), queues.after]
    return Engine(tasks, domain="bench", broker=SQLite(file))


def run(file: str, address: str | None, told: Any) -> None:
    """Run an engine until its queue is empty, and tell the CPU seconds of all its processes (a process of its own)."""
    engine = engine_at(file, _WORKERS)
    others: list[float] = []
    close = HttpProcess.close

    def note(process: HttpProcess) -> None:
        times = observer_of(os.getpid()).cpu_times()
        others.append(times.user + times.system)
        close(process)

    HttpProcess.close = note  # type: ignore[assignment,method-assign]
    before = _cpu()
    engine.run(only="work", until="drained", idle=0, progress=False, http=address)
    told.send(_cpu() - before - sum(others))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class Looking(threading.Thread):
    """Probes and scrapes each second, as Kubernetes and Prometheus do."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(1.0):
            with suppress(OSError, http.client.HTTPException):
                for path in ("/livez", "/readyz", "/metrics"):
                    get(self._address, path)

    def end(self) -> None:
        self._over.set()
        self.join()


def get(address: str, path: str) -> bytes:
    """Ask once, on a connection of its own."""
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def observer_of(pid: int) -> psutil.Process:
    """Return the HTTP process of an engine. Raises ``ValueError`` where it is not there."""
    for each in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            if "sqspipes_mp.observer" in " ".join(each.cmdline()):
                return each
    raise ValueError("there is no HTTP process")


def free_address() -> str:
    """Return an address that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


def measured(folder: str, count: int, *, looked_at: bool) -> float:
    """Return microseconds of the engine's CPU per message."""
    file = str(Path(folder) / f"{os.urandom(4).hex()}.db")
    queues.fill(engine_at(file, _WORKERS), "work", range(count))
    address = free_address() if looked_at else None
    spawn = multiprocessing.get_context("spawn")
    hears, tells = spawn.Pipe(duplex=False)
    process = spawn.Process(target=run, args=(file, address, tells))
    process.start()
    looking = None if address is None else Looking(address)
    if looking is not None:
        looking.start()
    used: float = hears.recv()
    process.join()
    if looking is not None:
        looking.end()
    return used / count * 1e6


@contextmanager
def waiting(folder: str, workers: int) -> Iterator[tuple[str, int]]:
    """Run an engine with idle workers meanwhile; yield its address and its pid."""
    address = free_address()
    file = str(Path(folder) / f"idle-{workers}.db")
    process = multiprocessing.get_context("spawn").Process(target=wait, args=(file, address, workers))
    process.start()
    assert process.pid is not None
    try:
        ready = False
        while not ready:
            time.sleep(0.2)
            with suppress(OSError):
                ready = b'"ok": true' in get(address, "/readyz")
        yield address, process.pid
    finally:
        process.terminate()
        process.join()


def wait(file: str, address: str, workers: int) -> None:
    """Run an engine that has nothing to do (a process of its own)."""
    engine_at(file, workers).run(only="work", progress=False, http=address)


def scrapes(folder: str, workers: int, count: int) -> tuple[float, int]:
    """Return milliseconds of CPU of one scrape, and its bytes."""
    with waiting(folder, workers) as (address, pid):
        observer = observer_of(pid)
        size = len(get(address, "/metrics"))
        before = observer.cpu_times()
        for _ in range(count):
            # Answers are used again for half a second.
            time.sleep(0.6)
            get(address, "/metrics")
        after = observer.cpu_times()
        return (after.user + after.system - before.user - before.system) / count * 1e3, size


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = parse(__doc__, argv)
    report = Report("looking", options)
    count = 2_000 if options.quick else _MESSAGES
    rounds = options.rounds if options.quick or options.rounds != 5 else _PAIRS
    with tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-") as folder:
        os.environ["SQSPIPES_RUN_DIR"] = str(Path(folder) / "registry")
        subjects = {
            "looked at each second": partial(measured, folder, count, looked_at=True),
            "not looked at": partial(measured, folder, count, looked_at=False),
        }
        spreads = interleave(subjects, rounds)
        for name, spread in spreads.items():
            report.keep(name, spread)
        looked, alone = spreads.values()
        rows = [[name, spread.text(1)] for name, spread in spreads.items()]
        rows.append(["ratio", looked.over(alone).text(3)])
        report.table(f"CPU of the engine, microseconds per message ({rounds} pairs)", ["engine", "median"], rows)
        cells = []
        for workers in (2,) if options.quick else (2, 64):
            milliseconds, size = scrapes(folder, workers, 2 if options.quick else 30)
            report.keep(f"scrape of {workers}", Spread((milliseconds,)))
            cells.append([workers, f"{milliseconds:.1f}", size])
        report.table("One scrape", ["workers", "CPU ms", "bytes"], cells)
    report.finish()


if __name__ == "__main__":
    main()
