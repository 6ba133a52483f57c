"""sqspipes 0.3.3 itself and this package on the same queues, stage by stage, in both directions.

The real package runs in a process of its own: by default under this interpreter, where the ``test`` extra put it; or
``SQSPIPES_TEST_PYTHON=/path/to/python`` names another that has it. It wants ``collections.Iterable``, which Python
lost in 3.10, so the program puts it back. Without the package these tests are skipped; the recorded bodies
(tests/unit/test_wire.py) are checked always. Two runs have every crossing on both kinds of queues; each takes the
few seconds that three programs need to start beside sqspipes, which polls without a pause.
"""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, Engine, Task, TaskClient, current_message
from sqspipes_mp.brokers.base import Completion, Output
from standin import StandIn, standin
from tests import gates
from tests.gates import Background, Log

_PYTHON = os.environ.get("SQSPIPES_TEST_PYTHON")

pytestmark = pytest.mark.skipif(
    _PYTHON is None and importlib.util.find_spec("sqspipes") is None,
    reason="the real sqspipes is not installed: pip install sqspipes==0.3.3, or set SQSPIPES_TEST_PYTHON",
)

COUNT = 40
LEVELS = 3

#: The three stages as sqspipes runs them; ``setup`` creates a stage's queues, as its run does.
OLD = """
import collections, collections.abc, sys, threading
if not hasattr(collections, "Iterable"):
    collections.Iterable = collections.abc.Iterable
from sqspipes import EmptyTaskOutput, TaskClient
stage, fifo, count, path = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), sys.argv[4]
numbers, lock = iter(range(count)), threading.Lock()

def gen():
    with lock:
        number = next(numbers, None)
    return EmptyTaskOutput() if number is None else number

def step(value):
    return [value, value * value]

def sink(value):
    with lock, open(path, "a") as log:
        log.write("[%d, %d]\\n" % tuple(value))

client = TaskClient("mixed", "testing", "testing", "us-west-2", fifo=fifo)
client.register_tasks([
    {"method": gen, "workers": 40, "priorities": 3, "interval": 0.01},
    {"method": step, "workers": 40, "priorities": 3},
    {"method": sink, "workers": 40},
])
for each in client.tasks:
    each.setup()
print("ready", flush=True)
client.run(stage, priority=lambda value: value % 3)
"""


def numbers():
    yield from range(COUNT)


def step(value, metas: Log):
    metas.note(dict(current_message().meta))
    return value, value * value


def sink(value, log: Log, metas: Log):
    metas.note(dict(current_message().meta))
    log.note(*value)


def level(value):
    return value % LEVELS


@pytest.fixture
def sqs(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    # sqspipes asks again at once when it gets nothing: an answer that takes its time keeps the CPU free.
    with standin(latency_ms=20) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture
def metas(tmp_path: Path) -> Log:
    return Log(str(tmp_path / "metas"))


@contextlib.contextmanager
def sqspipes(tmp_path: Path, fifo: bool, log: Log, *stages: str) -> Iterator[None]:
    """Run stages with the real package, a process each, until the block ends; all queues exist when it begins."""
    with contextlib.ExitStack() as stack:
        processes = []
        for stage in stages:
            folder = tmp_path / f"old-{stage}"
            folder.mkdir()
            program = gates.program(folder, OLD, stage, fifo, COUNT, log.path, python=_PYTHON or sys.executable)
            processes.append(stack.enter_context(program))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield


def ours(sqs: StandIn, fifo: bool, log: Log, metas: Log) -> TaskClient:
    # Not by the environment: a forkserver, once started, keeps the one it had.
    broker = SQS("us-west-2", endpoint_url=sqs.url, access_key="testing", secret_key="testing")
    client = TaskClient("mixed", fifo=fifo, broker=broker)
    client.register_tasks(
        [
            {"method": numbers, "name": "gen", "priorities": LEVELS},
            Task(step, workers=2, priorities=LEVELS, args=(metas,)),
            Task(sink, args=(log, metas)),
        ]
    )
    return client


def send(engine: Engine, stage: str, meta: dict[str, Any], value: object) -> None:
    """Put one envelope into a stage's output queue, as another sender would."""
    queue = engine.pipeline.stage(stage).outputs[int(meta["priority"])]
    with contextlib.closing(engine.broker.open()) as connection:
        body = json.dumps({"meta": meta, "value": value})
        group = "-" if engine.pipeline.fifo else None
        connection.complete([Completion(None, (Output(queue, body, "by-hand", group),))])


EXPECTED = [(n, n * n) for n in range(COUNT)]


def test_sqspipes_then_ours_then_sqspipes_on_fifo_queues(tmp_path: Path, sqs: StandIn, log: Log, metas: Log) -> None:
    client = ours(sqs, True, log, metas)
    with (
        sqspipes(tmp_path, True, log, "gen", "sink"),
        Background(client.engine, only="step"),
    ):
        log.wait_for(COUNT)
        client.engine.stop()
    assert sorted(log.lines()) == EXPECTED
    assert sorted(meta["priority"] for meta in metas.lines()) == sorted(level(n) for n in range(COUNT))
    assert all(stage.visible + stage.in_flight + stage.dead == 0 for stage in client.engine.stats().stages)


def test_ours_then_sqspipes_then_ours_on_standard_queues(tmp_path: Path, sqs: StandIn, log: Log, metas: Log) -> None:
    client = ours(sqs, False, log, metas)
    with (
        sqspipes(tmp_path, False, log, "step"),
        Background(client.engine, only=["gen", "sink"], priority=level),
    ):
        send(client.engine, "gen", {"priority": 1, "x-mine": {"a": [1]}, "other": None}, COUNT)
        log.wait_for(COUNT + 1)
        client.engine.stop()
    assert sorted(log.lines()) == [*EXPECTED, (COUNT, COUNT * COUNT)]
    # sqspipes hands metas on as they came: our ids have passed through it, and so has what neither knows.
    foreign, *own = sorted(metas.lines(), key=lambda meta: "hop" in meta)
    assert foreign == {"priority": 1, "x-mine": {"a": [1]}, "other": None}
    assert len({meta["id"] for meta in own}) == COUNT
    assert sorted(meta["priority"] for meta in own) == sorted(level(n) for n in range(COUNT))
    assert all(stage.visible + stage.in_flight + stage.dead == 0 for stage in client.engine.stats().stages)
