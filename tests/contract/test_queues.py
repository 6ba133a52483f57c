"""What every broker promises about queues, connections and processes."""

import logging
import multiprocessing
import pickle
import threading
import time
import uuid
from multiprocessing.connection import Connection as Pipe

import pytest

from sqspipes_mp.brokers.base import Broker, Completion, QueueSpec
from sqspipes_mp.errors import QueueMissing
from tests.contract.conftest import Bench, dead_of


def test_ensure_twice_is_silent(bench: Bench, fifo: bool, caplog: pytest.LogCaptureFixture) -> None:
    queue = bench.queue(fifo=fifo, dead=True)
    specs = [
        QueueSpec(name=queue, fifo=fifo, visibility=30, dead=dead_of(queue)),
        QueueSpec(name=dead_of(queue), fifo=fifo, visibility=30),
    ]
    with caplog.at_level(logging.WARNING):
        bench.connection.ensure(specs, create=True)
        bench.connection.ensure(specs, create=False)
    assert caplog.messages == []


def test_missing_queue_is_named_when_not_to_be_created(bench: Bench) -> None:
    name = f"t-{uuid.uuid4().hex}"
    with pytest.raises(QueueMissing, match=name):
        bench.connection.ensure([QueueSpec(name=name, fifo=False, visibility=30)], create=False)


def test_queue_of_others_is_never_created(bench: Bench) -> None:
    name = f"t-{uuid.uuid4().hex}"
    with pytest.raises(QueueMissing, match=name):
        bench.connection.ensure([QueueSpec(name=name, fifo=False, visibility=30, owned=False)], create=True)


def test_other_visibility_is_a_warning(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    queue = bench.queue(visibility=30)
    with caplog.at_level(logging.WARNING):
        bench.connection.ensure([QueueSpec(name=queue, fifo=False, visibility=90)], create=True)
    assert len(caplog.messages) == 1
    assert queue in caplog.messages[0]
    assert "30" in caplog.messages[0]
    assert "90" in caplog.messages[0]


def test_unknown_queue_raises(bench: Bench) -> None:
    name = f"t-{uuid.uuid4().hex}"
    with pytest.raises(QueueMissing, match=name):
        bench.connection.depth(name)
    with pytest.raises(QueueMissing, match=name):
        bench.connection.receive([name], 1, 0, 30)


def test_deleted_queue_is_missing(bench: Bench, fifo: bool) -> None:
    queue = bench.queue(fifo=fifo)
    bench.connection.delete([queue])
    bench.connection.delete([queue])
    with pytest.raises(QueueMissing):
        bench.connection.depth(queue)


def test_an_address_is_the_queues_url_or_name(bench: Bench, fifo: bool) -> None:
    queue = bench.queue(fifo=fifo)
    assert bench.connection.address(queue).rpartition("/")[2] == queue
    bench.connection.delete([queue])
    with pytest.raises(QueueMissing):
        bench.connection.address(queue)


def test_purge_empties_exactly_these(bench: Bench) -> None:
    purged, kept = bench.queue(), bench.queue()
    bench.send(purged, "1", "2", "3")
    bench.send(kept, "kept")
    bench.receive(purged)
    bench.connection.purge(["never-made", purged])
    assert bench.connection.depth(purged).empty
    assert bench.connection.depth(kept).visible == 1


def test_interrupt_ends_a_waiting_receive(bench: Bench) -> None:
    queues = [bench.queue(), bench.queue()]
    found: list[object] = ["none yet"]
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        found[:] = bench.connection.receive(queues, 1, 60, 30)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert entered.wait(10)
    bench.connection.interrupt()
    waiting.join(20)
    assert not waiting.is_alive()
    assert found == []


def test_interrupted_connection_receives_no_more_but_still_completes(bench: Bench) -> None:
    queue = bench.queue()
    bench.send(queue, "1", "2")
    held = bench.receive(queue)
    bench.connection.interrupt()
    started = time.monotonic()
    assert bench.connection.receive([queue], 1, 20, 30) == []
    assert time.monotonic() - started < 15
    assert bench.finish(held) == []


def test_broker_pickles_and_describes_itself(bench: Bench) -> None:
    copy = pickle.loads(pickle.dumps(bench.broker))
    copy.check()
    assert copy.describe() == bench.broker.describe()
    assert "testing" not in repr(copy) + copy.describe()


def _work(broker: Broker, queue: str, pipe: Pipe) -> None:
    connection = broker.open()
    bodies = []
    while messages := connection.receive([queue], 4, 1, 30):
        bodies += [message.body for message in messages]
        connection.complete([Completion(message.handle) for message in messages])
    connection.close()
    pipe.send(bodies)


def test_forked_processes_share_the_queues(bench: Bench) -> None:
    queue = bench.queue()
    sent = [str(n) for n in range(40)]
    bench.send(queue, *sent)
    bench.broker.check()
    bench.broker.warm()
    context = multiprocessing.get_context("fork")
    pipes, workers = [], []
    for _ in range(3):
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(bench.broker, queue, there))
        worker.start()
        there.close()
        pipes.append(here)
        workers.append(worker)
    taken = []
    for pipe in pipes:
        assert pipe.poll(60)
        taken += pipe.recv()
        pipe.close()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
        worker.close()
    assert set(taken) == set(sent)
    if bench.name != "moto":
        # There two receives at one instant may both get a message, as at SQS.
        assert len(taken) == len(sent)
    assert bench.connection.depth(queue).empty
