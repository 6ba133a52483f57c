"""The brokers the contract suite runs against: SQLite, moto's SQS, our own stand-in, and any other endpoint that
speaks SQS.

``SQSPIPES_TEST_ENDPOINTS="http://127.0.0.1:9324 ..."`` adds endpoints (emulators; with dummy credentials only).
"""

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp.brokers.base import Broker, Completion, Connection, Output, QueueSpec, Received
from sqspipes_mp.brokers.sqlite import SQLite
from sqspipes_mp.brokers.sqs import SQS
from standin import standin
from standin.brokers import sqs_at
from tests.moto_server import moto_server

OTHERS = os.environ.get("SQSPIPES_TEST_ENDPOINTS", "").split()

#: What a broker cannot do or cannot know, each with the reason; a test that needs it is skipped there.
CANNOT: dict[str, dict[str, str]] = {
    "sqlite": {"on_sent": "sends and deletes in one transaction"},
    "moto": {
        "stale": "moto accepts every receipt a message ever had (so may SQS on standard queues)",
        "dedup after delete": "moto forgets a deduplication id with its message (SQS keeps it for 5 minutes)",
        "charges": "SQS counts receives only",
    },
    "standin": {
        "stale delete": "SQS accepts, and ignores, an old receipt on a standard queue",
        "stale before sending": "SQS sends first, and learns of a stale receipt when it deletes",
        "charges": "SQS counts receives only",
    },
}


@dataclass
class Bench:
    """A broker, one open connection to it, and queues of its own that vanish afterwards."""

    name: str
    broker: Broker
    connection: Connection
    made: list[str] = field(default_factory=list)

    def queue(self, *, fifo: bool = False, visibility: float = 30, dead: bool = False) -> str:
        """Create a queue of a unique name; with ``dead`` its dead-letter queue too, named by ``dead_of``."""
        suffix = ".fifo" if fifo else ""
        name = f"t-{uuid.uuid4().hex[:16]}{suffix}"
        spec = QueueSpec(name=name, fifo=fifo, visibility=visibility, dead=dead_of(name) if dead else None)
        specs = [spec]
        if dead:
            specs.append(QueueSpec(name=dead_of(name), fifo=fifo, visibility=visibility))
        self.made += [each.name for each in specs]
        self.connection.ensure(specs, create=True)
        return name

    def send(self, queue: str, *bodies: str, group: str | None = None, delay: float = 0) -> None:
        """Send bodies, each with a hop of its own."""
        outputs = tuple(Output(queue, body, uuid.uuid4().hex, group=group, delay=delay) for body in bodies)
        self.connection.complete([Completion(None, outputs)])

    def receive(self, *queues: str, count: int = 1, visibility: float = 30) -> list[Received]:
        """Receive exactly ``count`` messages, in as many polls as it takes."""
        found: list[Received] = []
        for _ in range(40):
            found += self.connection.receive(queues, min(10, count - len(found)), 1, visibility)
            if len(found) >= count:
                return found
        raise AssertionError(f"only {len(found)} of {count} messages came")

    def empty(self, *queues: str) -> bool:
        """Tell whether nothing can be received right now."""
        return not self.connection.receive(queues, 1, 0, 30)

    def finish(self, messages: Sequence[Received]) -> list[object]:
        """Delete messages; return the stale handles."""
        return list(self.connection.complete([Completion(message.handle) for message in messages]))

    def needs(self, ability: str) -> None:
        """Skip the test where the broker has not got ``ability``."""
        reason = CANNOT.get(self.name, {}).get(ability)
        if reason:
            pytest.skip(f"{self.name}: {reason}")

    def can(self, ability: str) -> bool:
        """Tell whether the broker has ``ability``."""
        return ability not in CANNOT.get(self.name, {})


def dead_of(queue: str) -> str:
    """Name a queue's dead-letter queue."""
    return queue.removesuffix(".fifo") + "--dead" + (".fifo" if queue.endswith(".fifo") else "")


@pytest.fixture(scope="session")
def moto_server_url() -> Iterator[str]:
    SQS().warm()
    with moto_server() as url:
        yield url


@pytest.fixture(scope="session", autouse=True)
def standin_url() -> Iterator[str]:
    # For the whole session, so that no test finds it left behind.
    SQS().warm()
    with standin() as server:
        yield server.url


@pytest.fixture(params=["moto", "standin"])
def moto_url(request: pytest.FixtureRequest) -> str:
    """URL of an SQS: moto's, or the stand-in's."""
    return str(request.getfixturevalue(f"{'moto_server' if request.param == 'moto' else 'standin'}_url"))


@contextlib.contextmanager
def opened(name: str, broker: Broker) -> Iterator[Bench]:
    """Open a bench, and clean up after it."""
    connection = broker.open()
    bench = Bench(name, broker, connection)
    try:
        yield bench
        connection.delete(bench.made)
    finally:
        connection.close()


@pytest.fixture
def moto(moto_url: str) -> Iterator[Bench]:
    with opened("moto", sqs_at(moto_url)) as bench:
        yield bench


def is_lean(connection: Any) -> bool:
    """Tell whether hot calls of a connection to SQS go without boto3."""
    return connection._calls._lean is not None


@pytest.fixture(params=["sqlite", "moto", "standin", "standin by boto3", *OTHERS])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    match request.param:
        case "sqlite":
            broker: Broker = SQLite(str(tmp_path / "queues.db"))
        case "moto":
            broker = sqs_at(request.getfixturevalue("moto_server_url"))
        case "standin" | "standin by boto3":
            broker = sqs_at(request.getfixturevalue("standin_url"), lean=request.param == "standin")
        case url:
            broker = sqs_at(url)
    with opened(request.param.removesuffix(" by boto3"), broker) as bench:
        if isinstance(broker, SQS):
            assert is_lean(bench.connection) is broker.lean
        yield bench
        if isinstance(broker, SQS):
            assert is_lean(bench.connection) is broker.lean, "fell back"


@pytest.fixture(params=[False, True], ids=["standard", "fifo"])
def fifo(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)
