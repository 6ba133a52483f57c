"""The statistics count each call and message once, by its end, also where workers die."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, Engine, Reject, Task
from sqspipes_mp.ipc.running.state import state
from sqspipes_mp.ipc.statistics import Statistics
from sqspipes_mp.supervisor import loop
from standin import StandIn
from tests.gates import Background, Log, drain, engine_at, feed


def source() -> Iterator[object]:
    yield from ()


def sink(value: object) -> object:
    return value


def ends(value: object) -> object:
    match value:
        case "raise":
            raise ValueError(value)
        case "reject":
            raise Reject
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "late":
            while True:
                pass
        case "drop":
            return None
    return value


@pytest.fixture
def last_state(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keep the state at each run's end."""
    kept: list[dict[str, Any]] = []
    run = loop.Supervisor.run

    def watched(supervisor: loop.Supervisor) -> object:
        try:
            return run(supervisor)
        finally:
            statistics = Statistics(memoryview(supervisor._board._looks_map))
            kept.append(state(statistics))
            statistics.close()

    monkeypatch.setattr(loop.Supervisor, "run", watched)
    return kept


def test_each_call_and_message_is_counted_once_by_its_end(db: Path, last_state: list[dict[str, Any]]) -> None:
    engine = engine_at(db, [source, Task(ends, name="work", max_attempts=2), sink], on_error="retry")
    feed(engine, "work", ["a", "b", "drop", "raise", "reject"])
    summary = drain(engine, "work")
    (seen,) = last_state
    (stage,) = seen["stages"]
    assert stage["failures"] == {"exception": 2, "rejected": 1, "crash": 0, "timeout": 0, "memory": 0}
    assert (stage["failed"], stage["done"], stage["retried"]) == (3, 3, 1)
    assert (stage["dead_lettered"], stage["dropped"]) == (2, 1)
    assert (summary["work"].done, summary["work"].dead) == (3, 2)
    assert stage["queue_wait"]["p95"] is not None
    assert seen["broker"]["requests"]["receive"] >= 2
    assert seen["broker"]["errors"] == []
    assert seen["engine"]["why"] == "the run is ending"


def test_calls_that_die_with_their_worker_are_counted_by_the_keeper(db: Path, last_state: list[dict[str, Any]]) -> None:
    task = Task(ends, name="work", max_attempts=1, timeout=1)
    engine = engine_at(db, [source, task, sink], on_error="retry")
    feed(engine, "work", ["die", "late", "a"])
    drain(engine, "work")
    ((stage,),) = (seen["stages"] for seen in last_state)
    assert stage["failures"] == {"exception": 0, "rejected": 0, "crash": 1, "timeout": 1, "memory": 0}
    assert (stage["failed"], stage["done"], stage["dead_lettered"]) == (2, 1, 2)
    assert stage["restarts"] == {"crash": 1, "timeout": 1, "memory": 0, "max_tasks": 0, "boot": 0}
    # Of workers that were killed, too.
    assert stage["cpu_seconds"] > 0


def noted(value: object, log: Log) -> object:
    log.note(value)
    return value


def test_requests_and_their_errors_are_counted_on_sqs(
    sqs: SQS, server: StandIn, log: Log, last_state: list[dict[str, Any]]
) -> None:
    engine = Engine([source, Task(noted, name="work", args=(log,)), sink], domain="t", broker=sqs)
    feed(engine, "work", list(range(25)))
    server.plan("ReceiveMessage", "throttle", times=2)
    with Background(engine, only="work"):
        log.wait_for(25)
        engine.stop()
    (seen,) = last_state
    requests = seen["broker"]["requests"]
    assert (requests["receive"] >= 5, requests["send"] >= 3, requests["delete"] >= 3) == (True, True, True)
    (error,) = seen["broker"]["errors"]
    assert (error["operation"], error["kind"]) == ("receive", "throttled")
    assert seen["stages"][0]["last_receive"] is not None
