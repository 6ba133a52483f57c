import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sqspipes_mp.brokers.base import Completion, Handle, Output, QueueSpec
from sqspipes_mp.brokers.sqlite import SQLite
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from tests.unit.sqlite_bench import bodies, later, look, opened, send, take


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queues.db"


@pytest.fixture
def connection(path: Path) -> Iterator[SQLiteConnection]:
    with opened(path) as connection:
        yield connection


def stream(connection: SQLiteConnection, handle: Handle, *hops: str, last: bool = False) -> list[Handle]:
    outputs = tuple(Output("out", hop, hop) for hop in hops)
    return connection.complete([Completion(handle, outputs, last=last)])


def test_a_group_comes_in_order_and_as_one(connection: SQLiteConnection) -> None:
    send(connection, "in.fifo", *"abcde", group="g")
    assert bodies(connection, "in.fifo", 3) == ["a", "b", "c"]
    assert bodies(connection, "in.fifo") == []


def test_a_group_goes_on_when_nothing_of_it_is_in_flight(connection: SQLiteConnection) -> None:
    send(connection, "in.fifo", *"abcd", group="g")
    a, b = take(connection, "in.fifo", 2)
    connection.complete([Completion(a.handle)])
    assert bodies(connection, "in.fifo") == []
    connection.extend([b.handle], 0)
    assert bodies(connection, "in.fifo") == ["b", "c", "d"]


def test_nothing_is_completed_before_a_lost_one_of_its_group(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in.fifo", *"abc", group="g")
        send(connection, "in.fifo", "z", group="other")
        a, b, c, z = take(connection, "in.fifo")
        connection.extend([b.handle], 0)
    later(path, 1)
    with opened(path) as connection:
        done = [Completion(each.handle, (Output("out", each.body, each.body),)) for each in (a, b, c, z)]
        assert connection.complete(done) == [b.handle, c.handle]
        assert sorted(bodies(connection, "out")) == ["a", "z"]
        # It is still ours, so it can go back at once.
        assert connection.extend([c.handle], 0) == []
        assert bodies(connection, "in.fifo") == ["b", "c"]


def test_what_another_has_completed_holds_up_nothing(connection: SQLiteConnection) -> None:
    send(connection, "in.fifo", *"ab", group="g")
    a, b = take(connection, "in.fifo", 2)
    connection.complete([Completion(a.handle)])
    assert connection.complete([Completion(a.handle), Completion(b.handle)]) == [a.handle]
    assert bodies(connection, "in.fifo") == []


def test_backoff_at_the_head_blocks_the_group_only(connection: SQLiteConnection) -> None:
    send(connection, "in.fifo", *"ab", group="g")
    (head,) = take(connection, "in.fifo", 1)
    connection.extend([head.handle], 30, attempts=1)
    send(connection, "in.fifo", "c", group="other")
    assert bodies(connection, "in.fifo") == ["c"]


def test_the_longest_visibility_of_a_group_counts(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in.fifo", *"abc", group="g")
        a, b = take(connection, "in.fifo", 2)
        connection.extend([a.handle], 10)
        connection.extend([b.handle], 100)
    later(path, 50)
    with opened(path) as connection:
        assert bodies(connection, "in.fifo") == []
    later(path, 51)
    with opened(path) as connection:
        assert bodies(connection, "in.fifo") == ["a", "b", "c"]


def test_a_delayed_message_holds_back_those_behind_it(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in.fifo", "a", group="g")
        send(connection, "in.fifo", "b", group="g", delay=50)
        send(connection, "in.fifo", "c", group="g")
        (a,) = take(connection, "in.fifo")
        assert a.body == "a"
        connection.complete([Completion(a.handle)])
        assert bodies(connection, "in.fifo") == []
    later(path, 51)
    with opened(path) as connection:
        assert bodies(connection, "in.fifo") == ["b", "c"]


def test_many_groups_fill_one_receive(connection: SQLiteConnection) -> None:
    for name in "abcd":
        send(connection, "in.fifo", f"{name}1", f"{name}2", group=name)
    found = bodies(connection, "in.fifo", 6)
    assert found == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert bodies(connection, "in.fifo") == ["d1", "d2"]


def test_groups_leave_nothing_behind(connection: SQLiteConnection, path: Path) -> None:
    send(connection, "in.fifo", *"abc", group="g")
    send(connection, "in.fifo", "d")
    messages = take(connection, "in.fifo")
    outputs = (Output("out.fifo", "x", "x", "g"),)
    connection.complete([Completion(message.handle, outputs) for message in messages])
    assert look(path, "SELECT count(*) FROM groups") == [(1,)]
    connection.purge(["out.fifo"])
    assert look(path, "SELECT (SELECT count(*) FROM groups), (SELECT count(*) FROM messages)") == [(0, 0)]


@pytest.mark.parametrize(("again", "days"), [(True, 14.0), (False, 300 / 86_400)], ids=["again", "once"])
def test_a_repeated_send_without_input_is_dropped(path: Path, again: bool, days: float) -> None:
    with opened(path) as connection:
        send(connection, "in", "a", again=again)
        send(connection, "in", "a", "b", again=again)
        connection.complete([Completion(message.handle) for message in take(connection, "in")])
    later(path, 0.95 * days * 86_400)
    with opened(path) as connection:
        send(connection, "in", "a", again=again)
        assert connection.depth("in").empty
    later(path, 0.1 * days * 86_400)
    with opened(path) as connection:
        send(connection, "in", "a", again=again)
        assert bodies(connection, "in") == ["a"]


def test_one_hop_may_go_to_two_queues(connection: SQLiteConnection) -> None:
    send(connection, "in", "a")
    send(connection, "out", "a")
    assert bodies(connection, "in") + bodies(connection, "out") == ["a", "a"]


def test_a_plain_hop_keeps_no_key(connection: SQLiteConnection, path: Path) -> None:
    send(connection, "in", "a", "b")
    known = look(path, "SELECT count(*) FROM keys")
    a, b = take(connection, "in")
    connection.complete([Completion(a.handle, (Output("out", "x", "same"),))])
    connection.complete([Completion(b.handle, (Output("out", "y", "same"),))])
    assert look(path, "SELECT count(*) FROM keys") == known
    assert sorted(bodies(connection, "out")) == ["x", "y"]


def test_fifo_drops_a_repeated_hop_for_5_minutes(path: Path) -> None:
    def pass_on(hop: str) -> list[str]:
        with opened(path) as connection:
            send(connection, "in", hop)
            (message,) = take(connection, "in")
            connection.complete([Completion(message.handle, (Output("out.fifo", "x", "same", "g"),))])
            found = take(connection, "out.fifo")
            connection.complete([Completion(message.handle) for message in found])
            return [message.body for message in found]

    assert pass_on("a") == ["x"]
    later(path, 240)
    assert pass_on("b") == []
    later(path, 61)
    assert pass_on("c") == ["x"]


def test_a_stream_goes_on_where_it_stopped(connection: SQLiteConnection) -> None:
    send(connection, "in", "parent")
    (first,) = take(connection, "in")
    stream(connection, first.handle, "1", "2")
    connection.extend([first.handle], 0)
    (second,) = take(connection, "in")
    assert stream(connection, first.handle, "9") == [first.handle]
    stream(connection, second.handle, "1", "2", "3")
    stream(connection, second.handle, "3", "4", last=True)
    assert bodies(connection, "out") == ["1", "2", "3", "4"]
    assert connection.depth("in").empty


def test_a_streams_keys_live_with_its_input_and_5_minutes_more(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in", "parent")
        (parent,) = take(connection, "in", visibility=86_400 * 10)
        stream(connection, parent.handle, "1")
    later(path, 86_400)
    with opened(path) as connection:
        stream(connection, parent.handle, "1", "2")
        assert bodies(connection, "out") == ["1", "2"]
        stream(connection, parent.handle, last=True)
        send(connection, "out", "1")
        assert bodies(connection, "out") == []
    later(path, 301)
    with opened(path) as connection:
        connection.purge(["in"])
        send(connection, "out", "1", "2")
        assert len(bodies(connection, "out")) == 4
        send(connection, "in", "sweeps")
        assert look(path, "SELECT count(*) FROM streams") == [(0,)]


def test_completions_of_one_stream_fit_into_one_call(connection: SQLiteConnection) -> None:
    send(connection, "in", "parent")
    (parent,) = take(connection, "in")
    parts = [
        Completion(parent.handle, (Output("out", "1", "1"),), last=False),
        Completion(parent.handle, (Output("out", "2", "2"),)),
        Completion(parent.handle, (Output("out", "late", "late"),)),
    ]
    assert connection.complete(parts) == [parent.handle]
    assert bodies(connection, "out") == ["1", "2"]


def test_expired_keys_are_swept_as_new_ones_come(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in", *(f"old-{n}" for n in range(100)))
    later(path, 15 * 86_400)
    with opened(path) as connection:
        for n in range(5):
            send(connection, "in", *(f"new-{n}-{m}" for m in range(10)))
    assert look(path, "SELECT count(*) FROM keys WHERE hop LIKE 'old-%'") == [(0,)]


@pytest.mark.parametrize("failed", [False, True], ids=["never received", "failed once"])
def test_the_retention_of_a_delayed_message_begins_when_it_is_due(path: Path, failed: bool) -> None:
    days = 86_400.0
    with opened(path) as connection:
        send(connection, "in", "late", delay=14 * days)
    later(path, 14 * days)
    with opened(path) as connection:
        if failed:
            (message,) = take(connection, "in")
            assert abs(message.sent_at - (time.time() - 14 * days)) < 60
            connection.extend([message.handle], 0, attempts=1)
        connection._tidy_at = 0.0
        send(connection, "out", "other")
        assert connection.depth("in").visible == 1
    later(path, 14 * days)
    with opened(path) as connection:
        connection._tidy_at = 0.0
        send(connection, "out", "another")
        assert connection.depth("in").visible == 0


def test_delayed_messages_do_not_keep_later_ones_beyond_their_retention(path: Path) -> None:
    days = 86_400.0
    with opened(path) as connection:
        send(connection, "in", *(f"delayed-{n}" for n in range(150)), delay=30 * days)
        send(connection, "out", "old")
    later(path, 15 * days)
    with opened(path) as connection:
        connection._tidy_at = 0.0
        send(connection, "dead", "other")
        assert connection.depth("out").empty
        assert connection.depth("in").delayed == 150


def test_messages_past_their_retention_are_dropped(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in", "old")
        send(connection, "in.fifo", "old", group="g")
    later(path, 15 * 86_400)
    with opened(path) as connection:
        send(connection, "in", "new")
        connection._tidy_at = 0.0
        send(connection, "in", "newer")
        assert sorted(bodies(connection, "in")) == ["new", "newer"]
        assert connection.depth("in.fifo").empty
    assert look(path, "SELECT count(*) FROM groups") == [(0,)]


def test_another_boot_goes_on_where_the_last_one_stopped(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in", "held", "due")
        held, due = sorted(take(connection, "in"), key=lambda message: message.body != "held")
        connection.extend([held.handle], 3600)
        connection.extend([due.handle], 0)
    # As found after a boot: a clock of its own is made, from the wall clock.
    look(path, "UPDATE clocks SET boot = 'an earlier one'")
    with opened(path) as connection:
        assert bodies(connection, "in") == ["due"]
        assert connection.depth("in").in_flight == 2
    assert look(path, "SELECT count(*) FROM clocks") == [(2,)]


def test_a_boot_with_a_wrong_wall_clock_does_not_go_back(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in", "a")
    look(path, "UPDATE clocks SET boot = 'an earlier one', last = last + 1000000")
    with opened(path) as connection:
        assert bodies(connection, "in") == ["a"]
    ((ahead,),) = look(path, "SELECT max(shift) - min(shift) FROM clocks")
    assert isinstance(ahead, int)
    assert 990_000 < ahead < 1_010_000


@pytest.mark.parametrize("hours", [6, -6], ids=["forwards", "backwards"])
def test_a_wall_clock_that_jumps_moves_no_lease(path: Path, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    with contextlib.closing(SQLite(str(path)).open()) as connection:
        connection.ensure([QueueSpec(name="in", fifo=False, visibility=30)], create=True)
        connection.complete([Completion(None, (Output("in", "held", "1"),))])
        (held,) = connection.receive(["in"], 1, 0, 30)
        connection.complete([Completion(None, (Output("in", "late", "2", delay=60), Output("in", "now", "3")))])
        wall, wall_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: wall() + hours * 3600)
        monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + hours * 3_600_000_000_000)
        # Also to a process that opens the file after the jump.
        with contextlib.closing(SQLite(str(path)).open()) as other:
            assert [message.body for message in other.receive(["in"], 10, 0, 30)] == ["now"]
            assert other.extend([held.handle], 0) == []
            assert [message.body for message in other.receive(["in"], 10, 0, 30)] == ["held"]


def test_a_wall_clock_that_is_set_forward_brings_due_messages_forward(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = time.time() + 3600
    body = json.dumps({"meta": {"not_before": due}, "value": 1})
    with opened(path) as connection:
        send(connection, "in", body, delay=3600)
        send(connection, "in", "no JSON", delay=3600)
        connection.tend()
        assert connection.depth("in").delayed == 2
        wall = time.time_ns
        monkeypatch.setattr("sqspipes_mp.brokers.sqlite.connection.time.time_ns", lambda: wall() + 3_700_000_000_000)
        connection.tend()
        (message,) = take(connection, "in")
        assert message.body == body
        assert connection.depth("in").delayed == 1
