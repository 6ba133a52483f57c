"""A FIFO message found lost when it is carried away: what this worker has of its group behind it goes back with it.

A worker's outbox on its own, with real queues: here it can be said which of a group's messages is lost, and when.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from sqspipes_mp import SQLite, Task
from sqspipes_mp.brokers.base import Broker, Completion, Connection, Output
from sqspipes_mp.brokers.sqs.connection import SqsConnection
from sqspipes_mp.ipc.birth import Assignment
from sqspipes_mp.ipc.leases import LEASES
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import DONE, SENT
from sqspipes_mp.messages.envelope import decode
from sqspipes_mp.pipeline.plan import RunPlan, Settings
from sqspipes_mp.pipeline.stages import build
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.fifo_order import GroupOrder
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.send.failures import Failures
from sqspipes_mp.worker.send.outbox import Outbox
from sqspipes_mp.worker.send.outgoing import Done
from standin import StandIn
from standin.brokers import sqs_at
from tests.gates import eventually, present


def source():
    yield from ()


def work(value):
    return value


def sink(value):
    pass


class Bench:
    """A worker of the stage "work" without intake and main thread: the test does what these would do."""

    def __init__(self, broker: Broker) -> None:
        self.pipeline = build([source, Task(work, name="work"), sink], domain="t", fifo=True, visibility=60.0)
        (self.source,), (self.target,) = (self.pipeline.stage(name).inputs for name in ("work", "sink"))
        plan = RunPlan(
            pipeline=self.pipeline,
            settings=Settings(),
            selected=(1,),
            workers={1: 1},
            args=MappingProxyType({}),
            inputs={1: (self.source,)},
        )
        self.connection: Connection = broker.open()
        self.connection.ensure(self.pipeline.queues, create=True)
        self.board = Scoreboard.create(3, 1)
        region = present(self.board.free_region())
        region.assign(0)
        unused: Any = None
        orders = Assignment(
            plan=plan, broker=broker, board=self.board, birth=unused, slot=0, seat=plan.seats[0], region=region.index
        )
        self.station = WorkerContext(orders, self.connection, unused)
        self.ready = Ready(self.station.demand)
        order = GroupOrder(self.station, self.ready)
        self.outbox = Outbox(self.station, self.ready, order, Failures(self.station, self.ready, order))

    def feed(self, *values: str) -> list[Delivery]:
        """Send values in one group and receive them, as the intake would."""
        bodies = [json.dumps({"meta": {"priority": 0}, "value": value}) for value in values]
        outputs = tuple(Output(self.source, body, value, "g") for body, value in zip(bodies, values, strict=True))
        self.connection.complete([Completion(None, outputs)])
        deliveries = []
        for received in self.connection.receive([self.source], 10, 1, 60.0):
            lease, failed, until = self.station.open_lease(received, time.monotonic(), 60.0)
            message = decode(received.body, received.handle.message_id)
            deliveries.append(Delivery(received, message, lease, failed + 1, until))
        return deliveries

    def finish(self, *deliveries: Delivery) -> None:
        """Have the outbox carry what became of messages, as one batch."""
        with self.outbox._changed:
            for each in deliveries:
                output = Output(self.target, each.received.body, f"of-{each.message.value}", "g")
                self.outbox.put(Done(Completion(each.received.handle, (output,)), each))

    def expire(self, delivery: Delivery) -> None:
        """Let a message's visibility end, and wait until its receipt has ended with it."""
        handle = delivery.received.handle
        eventually(lambda: self.connection.extend([handle], 0) == [handle], "the receipt is stale")

    def lose(self, delivery: Delivery) -> None:
        """Find a lease lost, as the keeper does."""
        lease = self.station.leases.read(delivery.lease)
        assert lease is not None
        self.station.leases.lose(lease)

    def there(self, queue: str) -> list[str]:
        """Receive what can be received."""
        return [json.loads(each.body)["value"] for each in self.connection.receive([queue], 10, 0, 60.0)]

    def close(self) -> None:
        self.station.release.set()
        self.outbox.close()
        self.connection.close()
        self.board.close()
        # The mapping goes with the last view of it.
        del self.board, self.station, self.outbox


@pytest.fixture(params=["sqlite", "sqs"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if request.param == "sqlite":
        broker: Broker = SQLite(tmp_path / "queues.db")
    else:
        server = request.getfixturevalue("server")
        server.reset()
        broker = sqs_at(server.url)
    with contextlib.closing(Bench(broker)) as bench:
        yield bench


def end(bench: Bench, running: Delivery) -> None:
    """Finish what runs, too, and see that every lease was closed once and nothing of ``running`` was sent."""
    bench.outbox.wait_carried()
    assert len(bench.ready) == 0
    bench.finish(running)
    bench.outbox.wait_carried()
    assert not bench.station.faulted.is_set()
    assert list(bench.station.leases.leases(())) == []
    assert sorted(bench.station._free) == list(range(LEASES))


def test_found_before_it_is_sent(bench: Bench) -> None:
    before, lost, behind, running, waiting = bench.feed(*"abcde")
    bench.ready.put([waiting])
    bench.expire(lost)
    bench.lose(lost)
    bench.finish(before, lost, behind)
    end(bench, running)
    assert bench.there(bench.target) == ["a"]
    assert bench.there(bench.source) == ["b", "c", "d", "e"]
    assert (bench.board.get(0, DONE), bench.board.get(0, SENT)) == (1, 1)


@pytest.mark.parametrize("bench", ["sqs"], indirect=True)
def test_found_between_two_tries(bench: Bench, server: StandIn) -> None:
    lost, behind, running, waiting = bench.feed(*"abcd")
    bench.ready.put([waiting])
    server.faults(throttle=1, only=["SendMessageBatch"])
    try:
        bench.finish(lost, behind)
        eventually(lambda: server.ledger(messages=False)["requests"]["SendMessageBatch"]["errors"], "a try has failed")
        bench.expire(lost)
        bench.lose(lost)
        eventually(lambda: bench.station.leases.read(lost.lease) is None, "nothing more of it is sent")
    finally:
        server.faults(throttle=0, only=[])
    end(bench, running)
    assert bench.there(bench.target) == []
    assert bench.there(bench.source) == ["a", "b", "c", "d"]


def test_found_when_it_is_deleted(bench: Bench) -> None:
    lost, behind, running, waiting = bench.feed(*"abcd")
    bench.ready.put([waiting])
    bench.expire(lost)
    bench.finish(lost, behind)
    end(bench, running)
    # SQS learns of it when both were sent, and deletes in one call; SQLite does all or nothing.
    sent = ["a", "b"] if isinstance(bench.station.connection, SqsConnection) else []
    assert bench.there(bench.target) == sent
    assert bench.there(bench.source) == [each for each in "abcd" if each not in sent[1:]]
