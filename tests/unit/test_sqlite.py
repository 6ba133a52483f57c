import logging
import os
import pickle
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp.brokers.base import Completion, DeadLetter, Handle, Output, QueueSpec
from sqspipes_mp.brokers.sqlite import SQLite
from sqspipes_mp.brokers.sqlite import schema as sqlite_schema
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from sqspipes_mp.errors import BrokerError, ConfigError, QueueMissing
from tests.unit.sqlite_bench import SPECS, bodies, look, opened, send, take


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queues.db"


@pytest.fixture
def connection(path: Path) -> Iterator[SQLiteConnection]:
    with opened(path) as connection:
        yield connection


def statements() -> list[str]:
    return sorted(text for name, text in vars(sqlite_schema).items() if name.isupper() and isinstance(text, str))


@pytest.mark.parametrize("statement", statements())
def test_no_statement_scans_what_can_be_long(connection: SQLiteConnection, path: Path, statement: str) -> None:
    db = sqlite3.connect(path)
    holes = statement.count("?")
    plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", [1] * holes)]
    db.close()
    scans = [step for step in plan if step.startswith("SCAN") and "CONSTANT" not in step]
    assert [step for step in scans if step.split()[1] in {"messages", "groups", "keys", "ends"}] == []
    assert not any("TEMP B-TREE" in step for step in plan)


def test_constructing_touches_nothing(path: Path) -> None:
    broker = SQLite(path)
    assert broker.path == str(path)
    assert not path.exists()
    broker.check()
    assert not path.exists()


def test_relative_path_is_resolved_at_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    broker = SQLite("queues.db")
    broker.check()
    monkeypatch.chdir("/")
    with_copy = pickle.loads(pickle.dumps(broker))
    connection = with_copy.open()
    connection.ensure(SPECS, create=True)
    connection.close()
    assert (tmp_path / "queues.db").exists()


def test_temporary_file_goes_with_the_pickle_and_with_cleanup() -> None:
    broker = SQLite()
    assert broker.temporary
    broker.check()
    copy = pickle.loads(pickle.dumps(broker))
    assert copy.file == broker.file is not None
    folder = Path(broker.file).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    with_messages = copy.open()
    with_messages.ensure(SPECS, create=True)
    names = {f"queues.db{end}" for end in ("", "-bell", "-shm", "-wal")}
    assert {each.name for each in folder.iterdir()} == {"owner.lock", *names}
    with_messages.close()
    broker.cleanup()
    assert not folder.exists()


def test_cleanup_keeps_a_file_of_the_users_own(connection: SQLiteConnection, path: Path) -> None:
    broker = SQLite(path)
    broker.check()
    broker.cleanup()
    assert path.exists()


@pytest.mark.parametrize("value", [7, b"queues.db", "", "a\0b", ":memory:", True])
def test_what_is_no_path_is_refused_at_once(value: Any) -> None:
    with pytest.raises(ConfigError, match="path"):
        SQLite(value)


def test_bad_places_are_refused_at_check(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but long enough to be taken for one" * 30)
    os.mkfifo(tmp_path / "pipe")
    others = sqlite3.connect(tmp_path / "others.db")
    others.execute("CREATE TABLE messages (a)")
    others.close()
    for name, reason in {
        "": "not a folder",
        "missing/queues.db": "existing folder",
        "text/queues.db": "existing folder",
        "x" * 300: "too long",
        "text": "SQLite database",
        "pipe": "regular file",
        "others.db": "another program",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            SQLite(tmp_path / name).check()


def test_another_layout_is_refused(path: Path) -> None:
    with opened(path):
        pass
    look(path, "PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="layout 99"):
        SQLite(path).open()


def test_damaged_file_says_what_to_do(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in", *(f"{n}" * 50 for n in range(200)))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    connection = SQLite(path).open()
    with pytest.raises(BrokerError, match=r"damaged.*recover"):
        take(connection, "in")
    connection.close()


def test_removed_file_is_noticed(connection: SQLiteConnection, path: Path) -> None:
    for each in path.parent.iterdir():
        each.unlink()
    with pytest.raises(BrokerError, match="removed while in use"):
        send(connection, "in", "a")
    with pytest.raises(BrokerError, match="removed while in use"):
        take(connection, "in")


def test_a_full_disk_is_waited_out(connection: SQLiteConnection, request: pytest.FixtureRequest) -> None:
    complained = threading.Event()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "the disk is full" in record.getMessage():
                complained.set()

    log, heard = logging.getLogger("sqspipes_mp.brokers.sqlite"), Heard()
    log.addHandler(heard)
    request.addfinalizer(lambda: log.removeHandler(heard))
    # SQLite's own page limit fails like a disk: SQLITE_FULL, transaction undone.
    connection._file.read(lambda session: session.db.execute("PRAGMA max_page_count = 1").fetchall())
    sender = threading.Thread(target=send, args=(connection, "in", "x" * 100_000))
    sender.start()
    assert complained.wait(60)
    connection._file.read(lambda session: session.db.execute("PRAGMA max_page_count = 100000").fetchall())
    sender.join(60)
    assert not sender.is_alive()
    assert connection.depth("in").visible == 1


def test_another_programs_lock_is_waited_out(connection: SQLiteConnection, path: Path) -> None:
    begun = threading.Event()
    connection._file.read(lambda session: session.db.set_trace_callback(lambda _: begun.set()))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    sender = threading.Thread(target=send, args=(connection, "in", "a"))
    sender.start()
    assert begun.wait(60)
    assert look(path, "SELECT count(*) FROM messages") == [(0,)]
    other.execute("COMMIT")
    other.close()
    sender.join(60)
    assert connection.depth("in").visible == 1


def test_other_type_is_refused(connection: SQLiteConnection) -> None:
    with pytest.raises(BrokerError, match="standard queue"):
        connection.ensure([QueueSpec(name="in", fifo=True, visibility=60)], create=True)


def test_deleted_meanwhile_is_missing(connection: SQLiteConnection, path: Path) -> None:
    send(connection, "in", "a")
    (message,) = take(connection, "in")
    with opened(path) as other:
        other.delete(["out", "in"])
    with pytest.raises(QueueMissing, match="'out'"):
        send(connection, "out", "b")
    with pytest.raises(QueueMissing, match="'in'"):
        take(connection, "in")
    assert connection.complete([Completion(message.handle)]) == [message.handle]


def test_purge_forgets_hops_and_receipts_but_not_numbers(connection: SQLiteConnection, path: Path) -> None:
    send(connection, "in", "a", "b")
    (message,) = take(connection, "in", 1)
    connection.purge(["in"])
    assert connection.extend([message.handle], 60) == [message.handle]
    send(connection, "in", "a")
    (again,) = take(connection, "in")
    assert again.body == "a"
    assert again.handle.message_id != message.handle.message_id
    assert look(path, "SELECT count(*) FROM messages") == [(1,)]


@pytest.mark.parametrize("receipt", ["", "7", "1-0", "x-1", "1-x", "-1-1", "99-1"])
def test_a_receipt_never_given_is_stale(connection: SQLiteConnection, receipt: str) -> None:
    send(connection, "in", "a")
    handle = Handle("in", receipt, "id")
    assert connection.complete([Completion(handle, (Output("out", "b", "b"),))]) == [handle]
    assert connection.depth("out").empty
    assert connection.depth("in").visible == 1


def test_an_expired_receipt_counts_until_redelivery(connection: SQLiteConnection) -> None:
    send(connection, "in", "a", "b")
    first, second = take(connection, "in", visibility=0.0)
    assert connection.complete([Completion(first.handle, (Output("out", "a", "a"),))]) == []
    (redelivered,) = take(connection, "in")
    assert redelivered.receives == 2
    assert connection.complete([Completion(second.handle, (Output("out", "b", "b"),))]) == [second.handle]
    assert bodies(connection, "out") == ["a"]


def test_the_thousandth_delivery_is_the_last(connection: SQLiteConnection, path: Path) -> None:
    send(connection, "in", "poison")
    send(connection, "in.fifo", "poison", "next", group="g")
    look(path, "UPDATE messages SET receives = 999 WHERE body = 'poison'")
    for queue, dead in (("in", "dead"), ("in.fifo", "dead.fifo")):
        message = take(connection, queue, 1, visibility=0.0)[0]
        assert message.receives == 1000
        assert "poison" not in bodies(connection, queue)
        assert bodies(connection, dead) == ["poison"]
        assert connection.complete([Completion(message.handle)]) == [message.handle]
    assert bodies(connection, "in.fifo") == []


def test_dead_letter_keeps_what_is_shown(connection: SQLiteConnection, path: Path) -> None:
    send(connection, "in", "hop")
    (message,) = take(connection, "in", visibility=0.0)
    connection.extend([message.handle], 60, attempts=1)
    letter = DeadLetter(message.handle, "dead", "body", "hop", failure='{"error": 1}')
    assert connection.dead_letter([letter, letter]) == [message.handle]
    kept = look(path, "SELECT origin, source, failure, charges FROM messages")
    assert kept == [("hop", "in", '{"error": 1}', 1)]
    (dead,) = take(connection, "dead")
    assert (dead.body, dead.charges, dead.failure) == ("body", 1, '{"error": 1}')
    assert message.failure is None
    assert abs(dead.sent_at - message.sent_at) < 5


def test_a_missing_queue_is_found_before_any_of_many_parts_is_fed(connection: SQLiteConnection) -> None:
    outputs = [Output("in", "x" * 1_000_000, f"hop-{n}") for n in range(3)]
    with pytest.raises(QueueMissing):
        connection.feed([*outputs, Output("nowhere", "x", "hop")], keyed=False)
    assert connection.depth("in").empty


def test_a_large_body_is_written_once(connection: SQLiteConnection, path: Path) -> None:
    send(connection, "in", "x" * 1_000_000)
    look(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    (message,) = take(connection, "in")
    connection.extend([message.handle], 60)
    assert Path(f"{path}-wal").stat().st_size < 100_000


def test_closed_has_no_descriptors_left(path: Path) -> None:
    with opened(path):
        pass
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        with opened(path) as connection:
            send(connection, "in", "a")
            assert connection.receive(["out"], 1, 0.01, 60) == []
            waiting = threading.Thread(target=connection.receive, args=(["out"], 1, 60, 60))
            waiting.start()
        waiting.join(60)
        assert not waiting.is_alive()
    assert sorted(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize(("temporary", "synced"), [(False, True), (True, False)])
def test_only_what_has_no_input_is_synced(
    path: Path, temporary: bool, synced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced_files: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced_files.append(os.fstat(fd).st_ino)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    broker = SQLite(None if temporary else path)
    connection = broker.open()
    connection.ensure(SPECS, create=True)
    send(connection, "in", "a")
    log = Path(f"{broker.file}-wal").stat().st_ino
    assert (log in synced_files) is synced
    synced_files.clear()
    connection.complete([Completion(each.handle, (Output("out", "a", "a"),)) for each in take(connection, "in")])
    assert synced_files == []
    connection.close()
    broker.cleanup()


def test_closed_says_so(path: Path) -> None:
    with opened(path) as connection:
        pass
    with pytest.raises(BrokerError, match="closed"):
        connection.depth("in")


@pytest.mark.parametrize("fifo", [False, True])
def test_no_program_costs_more_in_a_full_file(path: Path, fifo: bool) -> None:
    name, out = ("in.fifo", "out.fifo") if fifo else ("in", "out")

    def steps(connection: SQLiteConnection) -> list[int]:
        """Return how many hundreds of SQLite's instructions each call takes."""
        counts: list[int] = []

        def counted(job: Callable[[], Any]) -> Any:
            count = 0

            def step() -> None:
                nonlocal count
                count += 1

            connection._file.read(lambda session: session.db.set_progress_handler(step, 100))
            result = job()
            connection._file.read(lambda session: session.db.set_progress_handler(None, 0))
            counts.append(count)
            return result

        counted(lambda: send(connection, name, "x", group="g"))
        first, second, third, *_ = counted(lambda: connection.receive([name], 5, 0, 60))
        output = Output(out, "{}", "hop", "g")
        counted(lambda: connection.extend([first.handle], 60))
        counted(lambda: connection.complete([Completion(first.handle, (output,), last=False)]))
        counted(lambda: connection.complete([Completion(first.handle)]))
        counted(lambda: connection.dead_letter([DeadLetter(second.handle, "dead", "{}", "hop", None, "{}")]))
        counted(lambda: connection.complete([Completion(third.handle, (output,))]))
        counted(lambda: connection.feed([Output(name, "{}", "fed", "g")], keyed=True))
        return counts

    with opened(path) as connection:
        send(connection, name, *(f"few-{n}" for n in range(20)), group="g")
        few = steps(connection)
        for start in range(0, 4000, 100):
            group = "g" if start % 200 else None
            send(connection, name, *(f"many-{start + n}" for n in range(100)), group=group)
            send(connection, out, *(f"many-{start + n}" for n in range(100)), group=group)
        # What is in flight of the group stays a few messages, as a receive takes them.
        connection.purge(["dead"])
        look(path, "UPDATE messages SET visible_at = 0, receives = 0")
        look(path, "UPDATE groups SET ready_at = 0")
        many = steps(connection)
    assert [(a, b) for a, b in zip(few, many, strict=True) if b > 2 * a + 10] == []


def clock(connection: SQLiteConnection) -> int:
    return connection._file.read(lambda session: session.now())


def test_large_bodies_are_sent_in_several_transactions_and_a_stale_group_waits_in_all(
    connection: SQLiteConnection,
) -> None:
    large = "x" * 1_500_000
    send(connection, "in.fifo", "a", "b", group="g")
    send(connection, "in", "c", "d", "e")
    first, second = take(connection, "in.fifo")
    others = take(connection, "in")
    # Given back: what was received with it must not overtake it.
    connection.extend([first.handle], 0.0)
    # It is stale from the next millisecond of the file's clock on.
    given_back = clock(connection)
    while clock(connection) <= given_back:
        pass
    completions = [
        Completion(message.handle, (Output(f"out{'.fifo' * (message.group is not None)}", large, message.body, "g"),))
        for message in (first, second, *others)
    ]
    assert set(connection.complete(completions)) == {first.handle, second.handle}
    assert len(bodies(connection, "out")) == 3
    assert bodies(connection, "out.fifo") == []


def test_what_is_fed_in_several_transactions_is_told_by_its_place(connection: SQLiteConnection) -> None:
    outputs = [Output("in", "x" * 1_500_000, hop) for hop in ("a", "b", "c")]
    assert connection.feed(outputs[1:2], keyed=True) == []
    assert connection.feed(outputs, keyed=True) == [1]
    assert connection.depth("in").visible == 3
