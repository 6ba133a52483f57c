"""Priorities: the highest level first, bands of levels, and what decides on an output's level."""

from pathlib import Path

from sqspipes_mp import SQS, SQLite, Task, TaskClient, current_message
from standin import standin
from standin.brokers import sqs_at
from tests.gates import Background, Gate, Log

LEVELS = 16


def gen(*items):
    yield from items


def level(value):
    return value


def lowest(value):
    return 0


def noted(value, log: Log, gate: Gate | None = None):
    log.note(value)
    if gate is not None:
        gate.wait()
    return value


def told(value, log: Log):
    log.note(value, current_message().priority)


def client_on(broker: SQS | SQLite, *tasks: object, fifo: bool = True) -> TaskClient:
    client = TaskClient("prio", broker=broker, fifo=fifo)
    client.register_tasks([{"method": gen, "priorities": LEVELS}, *tasks])
    return client


def test_sixteen_levels_come_strictly_highest_first_in_sqlite(db: Path, log: Log) -> None:
    sixteen_levels(SQLite(db), log, fifo=True)


def test_sixteen_levels_come_strictly_highest_first_at_sqs(log: Log) -> None:
    with standin() as server:
        sixteen_levels(sqs_at(server.url), log, fifo=False)


def sixteen_levels(broker: SQS | SQLite, log: Log, fifo: bool) -> None:
    client = client_on(broker, Task(noted, prefetch=0, args=(log,)), fifo=fifo)
    sent = [*range(LEVELS), *range(LEVELS)[::-1], 99, -5]
    client.submit(tuple(sent), priority=level)
    with Background(client.engine, only="noted"):
        got = log.wait_for(len(sent))
        client.engine.stop()
    clamped = [min(LEVELS - 1, max(0, value)) for value in got]
    assert clamped == sorted(clamped, reverse=True)
    assert sorted(got) == sorted(sent)


def test_a_high_one_overtakes_what_was_there_before(db: Path, log: Log, gate: Gate) -> None:
    client = client_on(SQLite(db), Task(noted, prefetch=0, args=(log, gate)))
    client.submit((1, 2, 0), priority=level)
    with Background(client.engine, only="noted"):
        assert log.wait_for(1) == [2]
        client.submit((LEVELS - 1, 3), priority=level)
        gate.open()
        assert log.wait_for(5) == [2, LEVELS - 1, 3, 1, 0]
        client.engine.stop()


def test_machines_are_reserved_by_bands(db: Path, tmp_path: Path) -> None:
    logs = {"low": Log(str(tmp_path / "low")), "high": Log(str(tmp_path / "high"))}
    clients = {name: client_on(SQLite(db), Task(noted, args=(log,))) for name, log in logs.items()}
    clients["low"].submit((0, 3, 7, 8, 12, 15), priority=level)
    with (
        Background(clients["high"].engine, only="noted", min_priority=8),
        Background(clients["low"].engine, only="noted", max_priority=7),
    ):
        assert sorted(logs["high"].wait_for(3)) == [8, 12, 15]
        assert sorted(logs["low"].wait_for(3)) == [0, 3, 7]
        for client in clients.values():
            client.engine.stop()


def test_an_output_has_its_inputs_level_unless_a_callable_says_otherwise(db: Path, log: Log) -> None:
    client = client_on(SQLite(db), Task(noted, priorities=4, args=(log,)), Task(told, args=(log,)))
    for priority, expected in ((5, [(2, 2), (9, 3)]), (lowest, [(2, 0), (9, 0)])):
        client.submit((2, 9), priority=level)
        already = len(log.lines())
        # An int is for what a source sends: the level that came with a message goes on with its outputs.
        with Background(client.engine, only=["noted", "told"], priority=priority):
            log.wait_for(already + 4)
            client.engine.stop()
        assert sorted(line for line in log.lines()[already:] if isinstance(line, tuple)) == expected
