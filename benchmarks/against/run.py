"""One run of a peer: its queue filled, its workers started, the backlog handed to them all at once, what came of it."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import boto3

from benchmarks.against.setup import AFTER, HOP, KEY, REGION, Setup
from benchmarks.hop import Case

#: Each kind of request, and the operations it is made of.
KINDS = {
    "receive": ("ReceiveMessage",),
    "send": ("SendMessage", "SendMessageBatch"),
    "delete": ("DeleteMessage", "DeleteMessageBatch"),
    "leases": ("ChangeMessageVisibility", "ChangeMessageVisibilityBatch"),
}
#: Seconds for which the backlog is hidden while a peer starts; the stand-in's clock is moved on by it, and a bit.
_HIDDEN = 900
#: Seconds without any progress after which a peer has failed.
_PATIENCE = 60.0
#: Bytes of each call in the calls' file.
_RECORD = struct.calcsize("=ddd")
_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer: what it needs, and how its programs are called.

    ``needs``: distributions, the first one is the peer's. ``install``: what pip is told. ``fill``, ``work``: arguments
    of ``python -m``, the latter with ``{workers}``. ``queue``, ``after``: the measured stage's, and the one behind it.
    ``ready``: how many times it tells that it is ready: once for all, and for each worker.
    """

    needs: tuple[str, ...]
    install: str
    fill: str
    work: str
    about: str
    queue: str = HOP
    after: str = AFTER
    ready: tuple[int, int] = (1, 0)


class PeerFailed(Exception):
    """A peer's program ended, or did not do its work in time; with the last it said."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one run of a subject told: calls per second, requests by kind, the stand-in's CPU seconds."""

    rate: float
    requests: dict[str, int]
    server: float


def by_kind(counts: dict[str, int]) -> dict[str, int]:
    """Sum requests, counted by operation, up by their kind."""
    return {kind: sum(counts.get(name, 0) for name in names) for kind, names in KINDS.items()}


def run_peer(peer: Peer, case: Case, server: Any, latency: float) -> Ran:
    """Fill the peer's queue, start its workers, let them have the backlog all at once, and end them."""
    call = case.call(case.calls, stop=False)
    setup = Setup(server.url, call.path, f"{call.path}-ready", case.units, case.calls)
    server.reset()
    server.faults(latency_ms=0)
    try:
        with program(peer.fill, setup) as filling:
            filling.wait_for(lambda: filling.process.poll() == 0, "filling its queue")
        _hide(peer, case.calls, server.url)
    finally:
        server.faults(latency_ms=latency)
    with program(peer.work.format(workers=case.workers), setup) as working:
        marks = peer.ready[0] + peer.ready[1] * case.workers
        working.wait_for(lambda: _size(setup.ready) >= marks, "getting ready")
        before = server.ledger(messages=False)
        server.advance(_HIDDEN + 1)
        called = partial(_size, call.path)
        working.wait_for(lambda: called() >= case.calls * _RECORD, "running all messages", called)
        working.wait_for(partial(_done, peer, case.calls, server), "sending on and deleting all messages")
        after = server.ledger(messages=False)
    requests = by_kind({name: each["requests"] for name, each in after["requests"].items()})
    for kind, count in by_kind({name: each["requests"] for name, each in before["requests"].items()}).items():
        requests[kind] -= count
    return Ran(call.told()[0], requests, after["cpu_seconds"] - before["cpu_seconds"])


@dataclass(frozen=True, slots=True)
class Program:
    """A program of a peer, and the file of what it says."""

    process: subprocess.Popen[bytes]
    output: Path

    def wait_for(
        self, condition: Callable[[], bool], doing: str, progress: Callable[[], object] = lambda: None
    ) -> None:
        """Return when the condition holds. Raises ``PeerFailed`` if the program ends, or nothing goes on for long."""
        pause, reached, deadline = threading.Event().wait, progress(), time.monotonic() + _PATIENCE
        while True:
            ended = self.process.poll()
            # In this order: what it did before it ended counts.
            if condition():
                return
            if ended is not None:
                raise PeerFailed(f"it ended with exit code {ended} while {doing}{self._last_words()}")
            if (now := progress()) != reached:
                reached, deadline = now, time.monotonic() + _PATIENCE
            elif time.monotonic() > deadline:
                raise PeerFailed(f"nothing went on for {_PATIENCE:g} s while {doing}{self._last_words()}")
            pause(0.02)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.output.read_text(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1][:200]}" if lines else ""


@contextlib.contextmanager
def program(arguments: str, setup: Setup) -> Iterator[Program]:
    """Start ``python -m`` with these arguments in a process group of its own; end it, and all it has started."""
    output = Path(f"{setup.path}-output")
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments.split()],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=_ROOT, env=setup.environment(),
            start_new_session=True,
        )  # fmt: skip
    try:
        yield Program(process, output)
    finally:
        if process.poll() is None:
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except FileNotFoundError:
        return 0


def _hide(peer: Peer, messages: int, url: str) -> None:
    """Receive the whole backlog, so that it is hidden until the stand-in's clock is moved on."""
    sqs = boto3.client(
        "sqs", endpoint_url=url, region_name=REGION, aws_access_key_id=KEY, aws_secret_access_key=KEY
    )  # fmt: skip
    with contextlib.closing(sqs):
        queue = sqs.get_queue_url(QueueName=peer.queue)["QueueUrl"]
        hidden = 0
        while found := sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, VisibilityTimeout=_HIDDEN):
            if "Messages" not in found:
                break
            hidden += len(found["Messages"])
    if hidden != messages:
        raise PeerFailed(f"it sent {hidden} of {messages} messages while filling its queue")


def _done(peer: Peer, messages: int, server: Any) -> bool:
    counts = server.ledger(messages=False)["queues"]
    waiting, sent = counts[peer.queue], counts.get(peer.after, {"visible": 0})
    return bool(waiting["visible"] + waiting["in_flight"] == 0 and sent["visible"] >= messages)
