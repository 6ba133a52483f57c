"""A lease lost while its message runs: whoever has it now completes it, on FIFO once and in its turn, or goes on."""

from collections.abc import Callable
from typing import Any

import pytest

from sqspipes_mp import SQS, Continue, Engine, Task
from sqspipes_mp.ipc.leases import LeaseTable
from standin import StandIn
from tests.gates import Background, Gate, Log, eventually, feed

#: Longer than SQS remembers deduplication ids, which would hide a second copy.
PAST_THE_WINDOW = 301
VISIBILITY = 2


def source():
    yield from ()


def first_one_waits(value: int, log: Log, gate: Gate) -> int:
    first = not log.lines()
    log.note("ran")
    if first:
        gate.wait()
    return value


def sink(value: int) -> None:
    pass


def tell_lost(monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    """Have the keeper note each lease that it has found lost; it inherits this over the fork."""
    lose: Callable[..., None] = LeaseTable.lose

    def told(region: LeaseTable, lease: Any) -> None:
        lose(region, lease)
        log.note("lost")

    monkeypatch.setattr(LeaseTable, "lose", told)


def test_what_was_lost_while_it_ran_is_sent_once_by_whoever_has_it_now(
    sqs: SQS, server: StandIn, log: Log, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_lost(monkeypatch, log)
    work = Task(first_one_waits, name="work", args=(log, gate), workers=2)
    engine = Engine(
        [source, work, sink], domain="t", broker=sqs, fifo=True, start_method="fork", visibility_timeout=VISIBILITY
    )
    feed(engine, "work", [7])
    with Background(engine, only="work") as run:
        log.wait_for(1)
        server.advance(VISIBILITY + 1)
        # The other worker gets it, while the first one is still at it.
        eventually(lambda: server.messages("t-source.fifo")[0]["deleted"], "the second delivery was completed")
        assert len(server.messages("t-work.fifo")) == 1
        eventually(lambda: "lost" in log.lines(), "the keeper saw it")
        server.advance(PAST_THE_WINDOW)
        gate.open()
        engine.stop()
    assert sorted(log.lines()) == ["lost", "ran", "ran"]
    assert len(server.messages("t-work.fifo")) == 1
    assert run.summary["work"].done == 1


def first_one_goes_on(value: int, log: Log, gate: Gate) -> Any:
    first = not log.lines()
    log.note("ran")
    if first:
        gate.wait()
        return Continue("a second chain")
    return value


def test_what_was_lost_while_it_ran_does_not_go_on_on_standard_queues_either(
    sqs: SQS, server: StandIn, log: Log, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_lost(monkeypatch, log)
    work = Task(first_one_goes_on, name="work", args=(log, gate), workers=2)
    engine = Engine([source, work, sink], domain="t", broker=sqs, start_method="fork", visibility_timeout=VISIBILITY)
    feed(engine, "work", [7])
    with Background(engine, only="work") as run:
        log.wait_for(1)
        server.advance(VISIBILITY + 1)
        eventually(lambda: server.messages("t-source")[0]["deleted"], "the second delivery was completed")
        eventually(lambda: "lost" in log.lines(), "the keeper saw it")
        gate.open()
        engine.stop()
    assert sorted(log.lines()) == ["lost", "ran", "ran"]
    assert [len(server.messages(queue)) for queue in ("t-source", "t-work")] == [1, 1]
    assert run.summary["work"].done == 1
