"""Compare one hop with Celery, Dramatiq and sqspipes over the same stand-in for SQS, in turn with Pool.

A backlog waits in a queue of the peer; its worker program, started by the peer's own command, receives each message,
runs a pure-Python function, sends the result to a queue behind it, and deletes the message. Pool is
``multiprocessing.Pool.imap_unordered`` with as many processes and no queue. The clock runs from the first call's start
to the last call's end, and the peer waits for messages already when it starts. A peer runs with its default settings,
except as its line says, with new queues and a new program each time. What is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import queues
from benchmarks.against.run import KINDS, Peer, PeerFailed, Ran, by_kind, run_peer
from benchmarks.harness import Report, Spread, bars, interleave, parse
from benchmarks.hop import Case, Over, hop, over_sqs, pool
from benchmarks.work import calibrate

POOL, OURS = "Pool (no queue)", "sqspipes_mp"
#: By the names that ``--peers`` takes.
PEERS = {
    "celery": Peer(
        needs=("celery", "kombu", "pycurl", "boto3"),
        install="celery[sqs]",
        fill="benchmarks.against.celery_peer",
        work="celery -A benchmarks.against.celery_peer worker --pool=prefork --concurrency={workers} --queues=hop"
        " --loglevel=ERROR --without-gossip --without-mingle --without-heartbeat",
        about="prefork, {workers} processes, no results, no remote control, no pause between polls (kombu's default is"
        " 1 s); deletes a message before it is run",
        ready=(1, 1),
    ),
    "dramatiq": Peer(
        needs=("dramatiq", "dramatiq-sqs"),
        install="dramatiq-sqs",
        fill="benchmarks.against.dramatiq_peer",
        work="dramatiq benchmarks.against.dramatiq_peer --processes {workers} --queues hop",
        about="{workers} processes of 8 threads; deletes a message after it was run",
        ready=(0, 1),
    ),
    "sqspipes": Peer(
        needs=("sqspipes",),
        install="sqspipes==0.3.3",
        fill="benchmarks.against.sqspipes_peer",
        work="benchmarks.against.sqspipes_peer {workers}",
        about="1 process of {workers} threads, standard queues; deletes a message before it is run",
        queue="bench-source",
        after="bench-hop",
    ),
}


def version(name: str) -> str | None:
    """Return a distribution's version, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions(peer: Peer) -> str:
    """Write which versions are measured, for example "celery 5.7.0, kombu 5.7.0"."""
    return ", ".join(f"{name} {version(name)}" for name in peer.needs)


def run_ours(case: Case, over: Over) -> Ran:
    """Run this package's engine, as ``hop`` does."""
    told = hop(case, over, case.calls)
    counts = {name: int(told[name]) for names in KINDS.values() for name in names if name in told}
    return Ran(told["rate"], by_kind(counts), told["server"])


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all; none: only ours")
    parser.add_argument("--lengths", nargs="+", type=float, metavar="MS", help="task lengths (default: 10 100)")
    parser.add_argument("--workers", nargs="+", type=int, default=[2], metavar="N", help="default: 2")
    parser.add_argument("--seconds", type=float, help="how long the function runs in all, per worker (default: 2)")
    parser.add_argument("--latency", type=float, default=queues.LATENCY_MS, help="of the stand-in, ms (default: 5)")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each length with each number of workers, and print one table."""
    options = parse(__doc__, argv, _options)
    report = Report("peers", options)
    left: dict[str, Peer] = {}
    for name in options.peers:
        peer = PEERS[name]
        missing = [need for need in peer.needs if version(need) is None]
        if missing:
            report.note(f"{name}: left out, {', '.join(missing)} not installed: pip install '{peer.install}'")
        else:
            left[name] = peer
            report.note(f"{versions(peer)}: {peer.about.format(workers='N')}")
    lengths = options.lengths or ([1.0] if options.quick else [10.0, 100.0])
    seconds = options.seconds or (0.02 if options.quick else 2.0)
    per_ms = calibrate("python")
    rows: list[list[object]] = []
    drawn: dict[str, dict[str, Spread]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-")))
        over = stack.enter_context(over_sqs(options.latency, lean=True))
        server, _ = stack.enter_context(queues.sqs_standin(latency_ms=options.latency))
        for length, workers in itertools.product(lengths, options.workers):
            calls = max(10, int(seconds * 1000 / length)) * workers
            case = Case(folder, max(1, round(per_ms * length)), workers, calls)
            rates, told = measure(case, over, left, server, options, report)
            drawn[f"{length:g} ms\nx{workers}"] = shares = {
                name: rate.over(rates[POOL]) for name, rate in rates.items() if name == POOL or name in told
            }
            for name, share in shares.items():
                report.keep(f"{name}, {length:g} ms, {workers} workers: share", share)
                rows.append([
                    f"{length:g}", workers, calls, name, rates[name].text(0), share.text(),
                    *_bill(told.get(name, []), calls),
                ])  # fmt: skip
    report.table(
        "One hop over the stand-in for SQS: speed, and medians per message of requests and of the stand-in's CPU",
        ["ms", "workers", "messages", "what", "calls/s", "share of Pool", *KINDS, "together", "stand-in CPU, ms"],
        rows,
    )
    report.note(f"The stand-in takes {options.latency:g} ms per request and shares the CPUs with what is measured.")
    report.finish(partial(_draw, drawn))


def measure(
    case: Case, over: Over, peers: dict[str, Peer], server: Any, options: argparse.Namespace, report: Report
) -> tuple[dict[str, Spread], dict[str, list[Ran]]]:
    """Measure Pool, the engine and each peer in turn; return rates, and what each told. A peer that fails is left out.

    It is taken out of ``peers``, too, with a line that says why.
    """
    told: dict[str, list[Ran]] = {OURS: [], **{name: [] for name in peers}}

    def ours() -> float:
        told[OURS].append(run_ours(case, over))
        return told[OURS][-1].rate

    def subject(name: str) -> float:
        if name not in peers:
            return math.nan
        try:
            ran = run_peer(peers[name], case, server, options.latency)
        except PeerFailed as error:
            report.note(f"{name}: left out, {error} (measured with {versions(PEERS[name])})")
            del peers[name], told[name]
            return math.nan
        told[name].append(ran)
        return ran.rate

    subjects: dict[str, Callable[[], float]] = {POOL: partial(pool, case), OURS: ours}
    subjects |= {name: partial(subject, name) for name in peers}
    return interleave(subjects, options.rounds), told


def _bill(told: list[Ran], calls: int) -> list[str]:
    if not told:
        return ["-"] * (len(KINDS) + 2)
    each = [Spread(tuple(ran.requests[kind] / calls for ran in told)).median for kind in KINDS]
    together = Spread(tuple(sum(ran.requests.values()) / calls for ran in told)).median
    server = Spread(tuple(ran.server / calls * 1000 for ran in told)).median
    return [f"{number:.2f}" for number in (*each, together, server)]


def _draw(drawn: dict[str, dict[str, Spread]], figure: Any) -> None:
    axes = figure.subplots()
    names = [name for name in (OURS, *PEERS) if all(name in shares for shares in drawn.values())]
    bars(axes, list(drawn), {name: [shares[name] for shares in drawn.values()] for name in names})
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_ylabel("share of Pool's speed")


if __name__ == "__main__":
    main()
