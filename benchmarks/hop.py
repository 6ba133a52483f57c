"""Measure what one hop costs: its share of Pool's speed, requests and dollars per message, the engine's own CPU.

A backlog waits in a stage's queue; the stage runs a pure-Python function and sends each result on. Pool is
``multiprocessing.Pool.imap_unordered`` with as many processes and no queue, measured in turn with it. The clock runs
from the first call's start to the last call's end.

share      messages per second over Pool's, round by round
requests   receive, send, delete, and heartbeats apart, per message (SQS only)
dollars    of those requests, per million messages
CPU        of the engine's whole process tree less the function, less that of a run over a few messages (starting and
           stopping), per message, milliseconds; the function's is what its threads used
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks import queues
from benchmarks.harness import Report, Spread, bars, interleave, parse
from benchmarks.work import KINDS, calibrate
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.brokers.base import Broker

#: Dollars for a million requests beyond the free ones, on standard queues and on FIFO queues.
PRICE, FIFO_PRICE = 0.40, 0.50
PRICED = (
    f"standard queues (FIFO: ${FIFO_PRICE:.2f}), us-east-1, as factualminds.com listed it on 2026-06-13; "
    "today's price: https://aws.amazon.com/sqs/pricing/"
)
#: One call: monotonic start and end, and CPU seconds of the function.
_RECORD = struct.Struct("=ddd")
#: Messages of the run that only starts and stops.
_FEW = 20
_HEARTBEATS = "ChangeMessageVisibilityBatch"
_COUNTED = ("ReceiveMessage", "SendMessageBatch", "DeleteMessageBatch", _HEARTBEATS)
_numbers = itertools.count()
#: Seconds of CPU of each tally's last noting, in this process.
_noting: dict[int, float] = {}


@cache
def _file(path: str, _pid: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


@dataclass(frozen=True, slots=True)
class Call:
    """The function: burns ``units``, notes when and what it used, and stops the engine after the last call."""

    path: str
    units: int
    calls: int
    stop: int = 0

    def __call__(self, value: int) -> int:
        started, used = time.monotonic(), time.thread_time()
        KINDS["python"](self.units)
        ended, file = time.monotonic(), _file(self.path, os.getpid())
        # Noting it is the function's work, too; how long that took is known only at the next call.
        noted = time.thread_time()
        os.write(file, _RECORD.pack(started, ended, noted - used + _noting.get(file, 0.0)))
        if self.stop and os.fstat(file).st_size >= self.calls * _RECORD.size:
            os.kill(self.stop, signal.SIGTERM)
        _noting[file] = time.thread_time() - noted
        return value

    def told(self) -> tuple[float, float]:
        """Return calls per second, and the CPU seconds of all calls."""
        records = list(_RECORD.iter_unpack(Path(self.path).read_bytes()))
        if len(records) < self.calls:
            raise RuntimeError(f"{len(records)} of {self.calls} calls were made")
        wall = max(end for _, end, _ in records) - min(start for start, _, _ in records)
        return len(records) / wall, sum(used for _, _, used in records)


def _cpu() -> float:
    """CPU seconds of this process and of all it has waited for, with theirs."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


@dataclass(slots=True)
class Case:
    """One row: task length in milliseconds, workers, messages."""

    folder: Path
    units: int
    workers: int
    calls: int

    def call(self, calls: int, *, stop: bool) -> Call:
        return Call(str(self.folder / str(next(_numbers))), self.units, calls, os.getpid() if stop else 0)


def pool(case: Case) -> float:
    """Return messages per second of a Pool."""
    call = case.call(case.calls, stop=False)
    with multiprocessing.Pool(case.workers) as processes:
        for _ in processes.imap_unordered(call, range(case.calls)):
            pass
        processes.close()
        processes.join()
    return call.told()[0]


@dataclass(frozen=True, slots=True)
class Over:
    """A broker to run over; ``counts`` returns the requests so far by operation, and the server's own CPU seconds."""

    name: str
    fresh: Callable[[], Broker]
    counts: Callable[[], tuple[dict[str, int], float]]
    fifo: bool = False


def hop(case: Case, over: Over, calls: int) -> dict[str, float]:
    """Run an engine over a backlog; return messages per second, requests, CPU seconds less the function's."""
    call = case.call(calls, stop=True)
    work = Task(call, name="work", workers=case.workers)
    engine = Engine(
        [Task(queues.nothing), work, Task(queues.after)], domain="bench", broker=over.fresh(), fifo=over.fifo
    )
    queues.fill(engine, "work", range(calls))
    before, server = over.counts()
    used = _cpu()
    engine.run(only="work")
    used = _cpu() - used
    after, server_after = over.counts()
    rate, function = call.told()
    told = {name: after.get(name, 0) - before.get(name, 0) for name in _COUNTED}
    return {"rate": rate, "cpu": used - function, "server": server_after - server, **told}


@contextlib.contextmanager
def over_sqlite() -> Iterator[Over]:
    """Each run in a file of its own."""
    with tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-") as folder:
        yield Over("sqlite", lambda: SQLite(f"{folder}/{next(_numbers)}.db"), lambda: ({}, 0.0))


@contextlib.contextmanager
def over_sqs(latency: float, *, lean: bool, fifo: bool = False, certificate: str = "") -> Iterator[Over]:
    """Run over the stand-in; ``fifo``: on FIFO queues with a group per message; ``certificate``: over TLS."""
    with queues.sqs_standin(lean=lean, latency_ms=latency, certificate=certificate) as (server, fresh):

        def counts() -> tuple[dict[str, int], float]:
            ledger = server.ledger(messages=False)
            return {name: each["requests"] for name, each in ledger["requests"].items()}, ledger["cpu_seconds"]

        yield Over("fifo" if fifo else "sqs" if lean else "sqs by boto3", fresh, counts, fifo)


def measure(
    case: Case, overs: Sequence[Over], rounds: int
) -> tuple[dict[str, Spread], dict[str, list[dict[str, Any]]]]:
    """Measure Pool and each broker in turn; return the rates, and everything told."""
    told: dict[str, list[dict[str, Any]]] = {over.name: [] for over in overs}
    subjects: dict[str, Callable[[], float]] = {"pool": lambda: pool(case)}

    def subject(over: Over) -> float:
        idle = hop(case, over, _FEW)
        full = hop(case, over, case.calls)
        messages = case.calls - _FEW
        full["cpu"] = (full["cpu"] - idle["cpu"]) / messages * 1000
        full["server"] = (full["server"] - idle["server"]) / messages * 1000
        told[over.name].append(full)
        return full["rate"]

    for over in overs:
        subjects[over.name] = lambda over=over: subject(over)  # type: ignore[misc]
    return interleave(subjects, rounds), told


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", nargs="+", type=float, metavar="MS", help="task lengths (default: 1 10 100)")
    parser.add_argument("--workers", nargs="+", type=int, metavar="N", help="default: 2 1")
    parser.add_argument("--brokers", nargs="+", choices=("sqlite", "sqs", "fifo", "boto3"), default=["sqs", "sqlite"])
    parser.add_argument("--seconds", type=float, help="how long the function runs in all, per worker (default: 4)")
    parser.add_argument("--latency", type=float, default=queues.LATENCY_MS, help="of the stand-in, ms (default: 5)")
    parser.add_argument(
        "--certificate",
        metavar="FILE",
        default="",
        help="over TLS, with this key and certificate (as ``requests`` has)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each length with each number of workers."""
    options = parse(__doc__, argv, _options)
    report = Report("hop", options)
    lengths = options.lengths or ([1.0] if options.quick else [1.0, 10.0, 100.0])
    seconds = options.seconds or (0.1 if options.quick else 4.0)
    per_ms = calibrate("python")
    if options.certificate:
        os.environ["AWS_CA_BUNDLE"] = options.certificate
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-")))
        overs = [
            stack.enter_context(
                over_sqlite()
                if name == "sqlite"
                else over_sqs(
                    options.latency, lean=name != "boto3", fifo=name == "fifo", certificate=options.certificate
                )
            )
            for name in options.brokers
        ]
        speed: list[list[object]] = []
        bill: list[list[object]] = []
        shares: dict[str, list[Spread]] = {over.name: [] for over in overs}
        labels: list[str] = []
        for length, workers in itertools.product(lengths, options.workers or ([2] if options.quick else [2, 1])):
            calls = max(2 * _FEW, int(seconds * 1000 / length) * workers)
            case = Case(folder, max(1, round(per_ms * length)), workers, calls)
            rates, told = measure(case, overs, options.rounds)
            labels.append(f"{length:g} ms\nx{workers}")
            for over in overs:
                key = f"{over.name}, {length:g} ms, {workers} workers"
                cpu = Spread(tuple(each["cpu"] for each in told[over.name]))
                share = rates[over.name].over(rates["pool"])
                server = Spread(tuple(each["server"] for each in told[over.name]))
                shares[over.name].append(share)
                report.keep(f"{key}: share", share)
                report.keep(f"{key}: cpu", cpu)
                row: list[object] = [f"{length:g}", workers, over.name, calls, rates["pool"].text(0)]
                speed.append([*row, rates[over.name].text(0), share.text(), cpu.text(3), server.text(3)])
                if over.name != "sqlite":
                    bill.append([f"{length:g}", workers, over.name, *_bill(told[over.name], calls)])
        report.table(
            "Speed, and CPU per message",
            [
                "ms",
                "workers",
                "broker",
                "messages",
                "Pool/s",
                "engine/s",
                "share",
                "engine CPU, ms",
                "stand-in CPU, ms",
            ],
            speed,
        )
        if bill:
            report.table(
                "Requests per message, medians",
                ["ms", "workers", "broker", "receive", "send", "delete", "together", "heartbeats", "$ per million"],
                bill,
            )
            report.note(f"At ${PRICE:.2f} per million requests: {PRICED}. Heartbeats are in the dollars.")
        report.note(f"The stand-in takes {options.latency:g} ms per request and shares the CPUs with what is measured.")
    report.finish(partial(_draw, labels, shares))


def _draw(labels: list[str], shares: dict[str, list[Spread]], figure: Any) -> None:
    axes = figure.subplots()
    bars(axes, labels, shares)
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_ylabel("share of Pool's speed")


def _bill(told: list[dict[str, Any]], calls: int) -> list[str]:
    each = {name: Spread(tuple(one[name] / calls for one in told)).median for name in _COUNTED}
    together = sum(each.values()) - each[_HEARTBEATS]
    numbers = [*(each[name] for name in _COUNTED[:3]), together, each[_HEARTBEATS]]
    return [*(f"{number:.3f}" for number in numbers), f"{sum(each.values()) * PRICE:.3f}"]


if __name__ == "__main__":
    main()
