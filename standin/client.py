"""The start of the stand-in, and its control, for tests and benchmarks."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from standin.options import command_line

#: The folder that ``standin`` is imported from.
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class StandIn:
    """A running stand-in; picklable, so that other processes can use it, too."""

    #: Endpoint for boto3.
    url: str
    #: Its process id.
    pid: int
    #: Address of its control: host and port, always without TLS.
    control: str

    def ledger(self, queue: str | None = None, *, messages: bool = True) -> dict[str, Any]:
        """Return the ledger of one queue or of all: counts, faults and, with ``messages``, each message's record.

        Its keys: ``Control._ledger`` and ``Message.record``.
        """
        return self._ask("ledger", {"messages": int(messages)} | ({} if queue is None else {"queue": queue}))

    def messages(self, queue: str) -> list[dict[str, Any]]:
        """Return the records of one queue's messages, deleted ones first."""
        found: list[dict[str, Any]] = self.ledger(queue)["queues"][queue]["messages"]
        return found

    def faults(self, **changes: object) -> dict[str, Any]:
        """Change faults from now on (fields of ``options.Faults``); return all of them."""
        return self._ask("faults", changes)

    def plan(self, operation: str, fault: str, *, times: int = 1, entries: Sequence[int] = ()) -> None:
        """Have exactly the next ``times`` requests of an operation fail.

        ``fault``: one of ``faults.KINDS``; ``entries``: positions of the entries that fail in a "partial" one.
        """
        self._ask("plan", {"operation": operation, "fault": fault, "times": times, "entries": list(entries)})

    def reset(self) -> None:
        """Forget queues, messages, counts and plans."""
        self._ask("reset", {})

    def advance(self, seconds: float) -> None:
        """Move the clock forward: visibility, delays, deduplication and windows. Long polls wait in real time."""
        self._ask("clock", {"advance": seconds})

    def keys(self, *, key: str | None = None, expire: Sequence[str] = (), renew: Sequence[str] = ()) -> None:
        """Accept only the access key ``key`` ("": any); let access keys expire, or be accepted again."""
        asked: dict[str, Any] = {"expire": list(expire), "renew": list(renew)}
        self._ask("keys", asked if key is None else asked | {"key": key})

    def pause(self) -> None:
        """Keep requests without an answer from now on."""
        self._ask("pause", {})

    def resume(self) -> None:
        """Answer the kept requests, and go on."""
        self._ask("resume", {})

    def _ask(self, what: str, asked: dict[str, Any]) -> dict[str, Any]:
        connection = HTTPConnection(self.control, timeout=30)
        try:
            connection.request("POST", f"/-/{what}", json.dumps(asked))
            reply = connection.getresponse()
            told: dict[str, Any] = json.loads(reply.read())
        finally:
            connection.close()
        if reply.status != 200:
            raise ValueError(told["error"])
        return told


@contextlib.contextmanager
def standin(**options: object) -> Iterator[StandIn]:
    """Start a stand-in with options (see ``options``), yield it, stop it."""
    server = subprocess.Popen(
        [sys.executable, "-m", "standin", *command_line(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        plain, *secured = server.stdout.readline().split() or [""]
        if not plain:
            raise RuntimeError(f"the stand-in did not start (exit code {server.wait(40)})")
        url = f"https://127.0.0.1:{secured[0]}" if secured else f"http://127.0.0.1:{plain}"
        yield StandIn(url, server.pid, f"127.0.0.1:{plain}")
    finally:
        server.stdin.close()
        server.terminate()
        server.wait(40)
        server.stdout.close()
