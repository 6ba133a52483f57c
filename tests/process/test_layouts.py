"""Layout 2 of the SQLite file: a file of 0.1.0 is brought up to it as it is, messages in flight included."""

import contextlib
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import ConfigError, Engine, Reject, SQLite, Task
from sqspipes_mp.brokers.base import Completion, Handle, Output
from sqspipes_mp.brokers.sqlite import schema
from sqspipes_mp.brokers.sqlite.session import prepare
from tests.gates import query

DUMP = Path(__file__).with_name("layout_1.sql")
#: Milliseconds of the file's clock at which the dump was made.
MADE_AT = 1_795_961_714_100
#: The tables of 0.1.0 that hold messages and what is known of them.
TABLES = ("messages", "groups", "keys", "streams", "garbage", "meta")


def double(value):
    if value == 7:
        raise Reject("seven")
    return value * 2


def tell(value):
    return value


def pipeline(db: Path, domain: str, **more: Any) -> Engine:
    return Engine([Task(double, input=True), tell], domain=domain, broker=SQLite(db), on_error="reject", **more)


@pytest.fixture
def old(db: Path) -> Path:
    """Return a file as 0.1.0 has left it just now."""
    with contextlib.closing(sqlite3.connect(db)) as file:
        file.execute("PRAGMA journal_mode = WAL")
        file.executescript(DUMP.read_text())
        passed = time.time_ns() // 1_000_000 - MADE_AT
        for table, times in {
            "messages": ("visible_at", "sent_at", "first_sent_at"), "groups": ("ready_at",), "clocks": ("last",),
        }.items():  # fmt: skip
            file.execute(f"UPDATE {table} SET {', '.join(f'{each} = {each} + {passed}' for each in times)}")  # noqa: S608
        file.commit()
    return db


def rows(db: Path) -> dict[str, list[Any]]:
    return {table: query(db, f"SELECT * FROM {table}") for table in TABLES}  # noqa: S608


def test_a_file_of_0_1_0_keeps_its_messages_and_leases(old: Path) -> None:
    before = rows(old)
    with contextlib.closing(SQLite(old).open()) as connection:
        assert connection.depth("old--input").in_flight == 3
        assert rows(old) == before
        assert query(old, "PRAGMA user_version") == [2]
        # 0.1 compares these two, and says that the file has layout 2 and it reads 1.
        assert query(old, "PRAGMA application_id") == [0x73717370]
        # The leases of 0.1's workers hold: what they have nobody else gets.
        others = connection.receive(["old--input"], 10, 0, 60)
        assert [received.handle.receipt for received in others] == ["12-1", "13-1", "14-1"]
        assert connection.receive(["oldf--input.fifo"], 10, 0, 60) == []
        # And what they have done is done.
        token = query(old, "SELECT token FROM meta")[0]
        done = Completion(Handle("old--input", "9-1", f"{token}-9"), (Output("old-double", "{}", "h"),))
        assert connection.complete([done]) == []
        assert connection.depth("old--input").in_flight == 5
        assert connection.keys("old--input")[0] == 10


def test_a_map_of_0_1_0_is_continued(old: Path) -> None:
    with contextlib.closing(SQLite(old).open()) as connection:
        token = query(old, "SELECT token FROM meta")[0]
        connection.extend([Handle("old--input", f"{seq}-1", f"{token}-{seq}") for seq in (9, 10, 11)], 0)
    with contextlib.closing(sqlite3.connect(old)) as db, db:
        # Delayed messages without a key.
        db.execute("DELETE FROM messages WHERE seq IN (15, 16)")
    engine = pipeline(old, "old")
    with engine.map(range(12), key=str, resume=True, return_exceptions=True, with_input=True) as results:
        assert sorted((value, str(result)[:8]) for value, result in results) == sorted(
            (value, "seven" if value == 7 else str(value * 2)) for value in range(4, 12)
        )
    assert len(pipeline(old, "dead").dead_letters()) == 1


def test_a_file_is_brought_up_once_by_processes_that_come_together(old: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(old, isolation_level=None)) as one,
        contextlib.closing(sqlite3.connect(old, isolation_level=None)) as other,
    ):
        first: list[str] = []

        def overtake(statement: str) -> None:
            if "BEGIN IMMEDIATE" in statement and not first:
                first.append(statement)
                prepare(other, str(old))

        one.set_trace_callback(overtake)
        prepare(one, str(old))
        assert first
        assert query(old, "PRAGMA user_version") == [2]


def test_a_step_that_fails_leaves_the_old_layout(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = query(old, "SELECT sql FROM sqlite_master ORDER BY 1")
    monkeypatch.setattr(schema, "FROM_1", (*schema.FROM_1[:-1], "no SQL"))
    with contextlib.closing(sqlite3.connect(old, isolation_level=None)) as file:
        with pytest.raises(sqlite3.OperationalError):
            prepare(file, str(old))
        assert not file.in_transaction
    assert query(old, "SELECT sql FROM sqlite_master ORDER BY 1") == before
    assert query(old, "PRAGMA user_version") == [1]


def test_a_newer_layout_is_refused(old: Path) -> None:
    with contextlib.closing(sqlite3.connect(old)) as file:
        file.execute("PRAGMA user_version = 3")
    with pytest.raises(ConfigError, match="layout 3, this version of sqspipes_mp reads up to 2"):
        SQLite(old).check()
