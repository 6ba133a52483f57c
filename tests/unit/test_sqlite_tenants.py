"""Tenants of a standard queue take turns, in the file as on SQS's fair queues: no order, no blocking."""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sqspipes_mp.brokers.base import Completion, DeadLetter, Output, Received
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from tests.unit.sqlite_bench import look, opened, take


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queues.db"


@pytest.fixture
def connection(path: Path) -> Iterator[SQLiteConnection]:
    with opened(path) as connection:
        yield connection


def put(connection: SQLiteConnection, tenant: str | None, *bodies: str, queue: str = "in", delay: float = 0.0) -> None:
    outputs = [Output(queue, body, f"{queue}/{tenant}/{body}", tenant, delay) for body in bodies]
    connection.complete([Completion(None, tuple(outputs))])


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def taken(connection: SQLiteConnection, most: int = 10) -> list[Received]:
    return connection.receive(["in"], most, 0.0, 60.0)


def turns(connection: SQLiteConnection, most: int = 10) -> Counter[str | None]:
    return Counter(received.group for received in taken(connection, most))


def test_each_receive_takes_an_equal_share_from_each_tenant(connection: SQLiteConnection) -> None:
    put(connection, "big", *numbers(100))
    assert turns(connection) == {"big": 10}
    put(connection, "small", *numbers(7))
    put(connection, "one", "1")
    # A share that its tenant cannot use goes to the others.
    assert turns(connection) == {"big": 6, "small": 3, "one": 1}
    assert turns(connection) == {"big": 6, "small": 4}
    assert turns(connection) == {"big": 10}


def test_the_tenant_served_longest_ago_is_next_and_a_new_one_joins_at_the_end(connection: SQLiteConnection) -> None:
    for tenant in "abc":
        put(connection, tenant, *numbers(5))
    order: list[str | None] = []
    for round_ in range(4):
        for _ in range(3 + (round_ > 0)):
            (received,) = taken(connection, 1)
            order.append(received.group)
        if not round_:
            put(connection, "new", *numbers(5))
    rounds = order[:3], order[3:7], order[7:11], order[11:15]
    assert set(rounds[0]) == {"a", "b", "c"}
    assert rounds[1][:3] == rounds[0]
    assert rounds[1] == rounds[2] == rounds[3]
    assert rounds[1][3] == "new"


def test_messages_without_a_tenant_are_one_tenant_of_their_own(connection: SQLiteConnection) -> None:
    # Those sent before the first tenant as well.
    put(connection, None, *numbers(50))
    put(connection, "a", *numbers(50))
    put(connection, None, "later")
    assert turns(connection) == {None: 5, "a": 5}
    assert connection.depth("in").visible == 91


def test_a_tenant_blocks_nobody_and_comes_again_when_released(connection: SQLiteConnection) -> None:
    put(connection, "a", "1", "2")
    first, second = taken(connection, 1)[0], taken(connection, 1)[0]
    assert (first.group, second.group) == ("a", "a")
    assert taken(connection) == []
    assert connection.extend([second.handle], 0.0) == []
    (again,) = taken(connection)
    assert (again.body, again.receives, again.group) == (second.body, 2, "a")
    assert connection.complete([Completion(first.handle), Completion(again.handle)]) == []
    assert connection.depth("in").empty


def test_a_delayed_message_takes_no_turn(connection: SQLiteConnection) -> None:
    put(connection, "late", *numbers(30), delay=3600.0)
    put(connection, "a", *numbers(3))
    assert turns(connection) == {"a": 3}
    assert connection.depth("in").delayed == 30


def test_no_row_of_a_tenant_is_left_without_messages(connection: SQLiteConnection, path: Path) -> None:
    for tenant in numbers(20):
        put(connection, tenant, "1")
    while batch := taken(connection):
        connection.complete([Completion(received.handle) for received in batch])
    assert look(path, "SELECT count(*) FROM groups") == [(0,)]


def test_the_tenant_goes_with_a_dead_letter(connection: SQLiteConnection) -> None:
    put(connection, "a", "1")
    (received,) = taken(connection)
    letter = DeadLetter(received.handle, "dead", received.body, "hop", '{"error": "x"}', received.group)
    assert connection.dead_letter([letter]) == []
    (found,) = take(connection, "dead")
    assert (found.group, found.failure) == ("a", '{"error": "x"}')


def test_others_learn_that_a_queue_has_tenants(connection: SQLiteConnection, path: Path) -> None:
    with opened(path) as other:
        put(other, None, "before")
        put(connection, "a", "1")
        # Its list of queues is an old one.
        put(other, None, "after")
        assert turns(other) == {"a": 1, None: 2}
        connection.purge(["in"])
        put(other, "b", "2")
        assert turns(connection) == {"b": 1}


def test_a_receive_reads_no_row_of_other_messages(connection: SQLiteConnection, path: Path) -> None:
    put(connection, "a", "1")
    db = sqlite3.connect(path)
    for text in (
        "SELECT min(visible_at) FROM messages WHERE grp = -1 AND grp < 0",
        "SELECT seq FROM messages WHERE grp = -1 AND grp < 0 AND visible_at < 5 ORDER BY visible_at, receives LIMIT 3",
    ):
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {text}")]
        assert len(plan) == 1, plan
        assert "INDEX tenant (grp=?" in plan[0], plan
    db.close()


def test_a_receive_takes_no_longer_with_many_tenants_or_many_messages(tmp_path: Path) -> None:
    def steps(count: int, tenants: int) -> int:
        """Count the instructions of SQLite's machine, in hundreds, that ten receives take."""
        with opened(tmp_path / f"{count}-{tenants}.db") as connection:
            outputs = [Output("in", "x", str(number), f"t{number % tenants}") for number in range(count)]
            connection.feed(outputs, keyed=False)
            told: list[int] = []
            connection._file.read(lambda session: session.db.set_progress_handler(lambda: told.append(1), 100))
            for _ in range(10):
                assert len(taken(connection)) == 10
            return len(told)

    few = steps(100, 10)
    assert steps(2000, 2000) < 1.5 * few
    assert steps(2000, 10) < 1.5 * few
