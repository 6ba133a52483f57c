import contextlib
import multiprocessing
import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp.brokers.base import Completion, Depth, Output
from sqspipes_mp.brokers.sqlite import SQLite
from sqspipes_mp.brokers.sqlite.bell import Bell
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from sqspipes_mp.brokers.sqlite.session import Session, layout_of, prepare
from sqspipes_mp.brokers.sqlite.wake import Rhythm, Waiter
from sqspipes_mp.errors import ConfigError
from tests.gates import eventually, listens
from tests.unit.sqlite_bench import DEADLOCK, bodies, look, opened, send, take

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queues.db"


@contextlib.contextmanager
def child(work: Callable[..., None], *args: object) -> Iterator[tuple[Pipe, int]]:
    """Run work(pipe, *args) in a forked process; give the other end of its pipe and its pid."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=work, args=(there, *args))
    process.start()
    there.close()
    assert process.pid is not None
    try:
        yield here, process.pid
    finally:
        here.close()
        process.join(DEADLOCK)
        process.kill()
        process.join()
        process.close()


def hear(pipe: Pipe) -> Any:
    assert pipe.poll(DEADLOCK)
    return pipe.recv()


def pass_on(pipe: Pipe, path: Path) -> None:
    connection = SQLite(path).open()
    received = []
    while found := connection.receive(["in"], 10, 0, 600):
        received += [message.handle.message_id for message in found]
        done = [Completion(each.handle, (Output("out", each.body, each.body),)) for each in found]
        assert connection.complete(done) == []
    connection.close()
    pipe.send(received)


def test_four_processes_handle_each_message_once(path: Path) -> None:
    with opened(path) as connection:
        for start in range(0, 2000, 100):
            send(connection, "in", *(str(n) for n in range(start, start + 100)))
        with contextlib.ExitStack() as stack:
            pipes = [stack.enter_context(child(pass_on, path))[0] for _ in range(4)]
            received = [hear(pipe) for pipe in pipes]
        ids = [each for some in received if isinstance(some, list) for each in some]
        assert len(ids) == len(set(ids)) == 2000
        assert connection.depth("in").empty
        assert connection.depth("out").visible == 2000
    assert look(path, "SELECT count(DISTINCT body) FROM messages") == [(2000,)]


def stop_in_a_transaction(pipe: Pipe, path: Path) -> None:
    connection = SQLite(path).open()
    assert len(take(connection, "in", 1)) == 1

    def job(session: Session) -> None:
        session.db.execute("BEGIN IMMEDIATE")
        session.db.execute("DELETE FROM messages")
        pipe.send("in the transaction")
        pipe.recv()

    connection._file.write(job)


def test_killed_inside_a_transaction_leaves_the_others_going(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in", "a", "b")
        with child(stop_in_a_transaction, path) as (pipe, pid):
            assert hear(pipe) == "in the transaction"
            sender = threading.Thread(target=send, args=(connection, "in", "c"))
            sender.start()
            os.kill(pid, signal.SIGKILL)
            sender.join(DEADLOCK)
            assert not sender.is_alive()
        assert connection.depth("in") == Depth(visible=2, in_flight=1, delayed=0)
    assert look(path, "PRAGMA integrity_check") == [("ok",)]


def hammer(pipe: Pipe, path: Path) -> None:
    connection = SQLite(path).open()
    for n in range(1_000_000):
        send(connection, "in.fifo", f"{os.getpid()}-{n}", group=str(n % 3))
        for message in connection.receive(["in.fifo"], 10, 0, 0.0):
            connection.complete([Completion(message.handle, (Output("out", message.body, message.body),))])


def test_killed_anywhere_loses_and_doubles_nothing(path: Path) -> None:
    with opened(path) as connection:
        for round_ in range(6):
            with child(hammer, path) as (_, pid):
                for _ in range(1 + 7 * round_):
                    assert len(connection.receive(["out"], 1, DEADLOCK, 600)) == 1
                os.kill(pid, signal.SIGKILL)
    assert look(path, "PRAGMA integrity_check") == [("ok",)]
    assert look(path, "SELECT count(*) - count(DISTINCT body) FROM messages") == [(0,)]
    # There is a key for each message sent; it is still in its queue, or went on to the next one.
    assert look(path, "SELECT count(*) FROM keys") == look(path, "SELECT count(*) FROM messages")
    left = "SELECT count(*) FROM groups WHERE id NOT IN (SELECT grp FROM messages WHERE grp IS NOT NULL)"
    assert look(path, left) == [(0,)]


def wait_for_one(pipe: Pipe, path: Path) -> None:
    connection = SQLite(path).open()
    pipe.send("waiting")
    (message,) = connection.receive(["dead", "in"], 1, DEADLOCK, 60)
    pipe.send((message.body, time.monotonic()))


def test_a_commit_of_another_process_wakes(path: Path) -> None:
    with opened(path) as connection:
        connection.depth("in")
        with child(wait_for_one, path) as (pipe, pid):
            assert hear(pipe) == "waiting"
            eventually(lambda: listens(pid), "it waits for the bell")
            sent_at = time.monotonic()
            send(connection, "in", "a")
            body, woken_at = hear(pipe)
    assert body == "a"
    assert woken_at - sent_at < DEADLOCK / 2


@pytest.mark.parametrize("release", ["extend", "delete", "timer"])
def test_what_becomes_receivable_wakes(path: Path, release: str) -> None:
    with opened(path) as connection, opened(path) as waiter:
        send(connection, "in.fifo", "a", "b", group="g")
        (held,) = take(connection, "in.fifo", 1, 0.2 if release == "timer" else 600)
        found: list[str] = []
        waiting = threading.Thread(target=lambda: found.extend(m.body for m in waiter.receive(["in.fifo"], 2, 60, 60)))
        waiting.start()
        if release == "extend":
            connection.extend([held.handle], 0)
        elif release == "delete":
            connection.complete([Completion(held.handle)])
        waiting.join(DEADLOCK / 2)
        assert not waiting.is_alive()
        assert found == (["b"] if release == "delete" else ["a", "b"])


def test_an_idle_receive_uses_no_cpu(path: Path) -> None:
    with opened(path) as connection:
        spent: list[float] = []
        # What others' traffic costs the kernel may be charged to whoever runs just then.
        while len(spent) < 5 and (not spent or spent[-1] >= 0.01):
            used = time.thread_time()
            assert connection.receive(["in", "dead"], 10, 1.0, 60) == []
            spent.append(time.thread_time() - used)
        assert min(spent) < 0.01


def test_commits_for_others_cost_a_waiting_receive_little(path: Path) -> None:
    with opened(path) as connection, opened(path) as waiter:
        looks = 0

        def count(text: str) -> None:
            nonlocal looks
            looks += "min(visible_at)" in text

        waiter._file.read(lambda session: session.db.set_trace_callback(count))
        waiting = threading.Thread(target=waiter.receive, args=(["in"], 1, DEADLOCK, 60))
        waiting.start()
        began = time.monotonic()
        for number in range(300):
            send(connection, "out", f"{number}")
        took, seen = time.monotonic() - began, looks
        waiter.interrupt()
        waiting.join(DEADLOCK)
        assert not waiting.is_alive()
        # One look in 25 ms, and a few quick ones after each quiet time.
        assert seen < 20 + 50 * took


def test_pace_grows_while_nothing_comes_and_forgets_after_a_pause() -> None:
    pace = Rhythm(0.001, 0.025)
    gaps = []
    for _ in range(7):
        pace.fruitless(0.0)
        gaps.append(pace.gap)
    assert gaps == [0.001, 0.002, 0.004, 0.008, 0.016, 0.025, 0.025]
    pace.fruitless(10.0)
    assert pace.gap == 0.0


def test_without_a_bell_a_receive_still_wakes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> Bell:
        raise OSError("no futex")

    monkeypatch.setattr("sqspipes_mp.brokers.sqlite.wake.Bell", refuse)
    with opened(path) as connection, child(wait_for_one, path) as (pipe, _):
        assert hear(pipe) == "waiting"
        send(connection, "in", "a")
        body, _ = hear(pipe)
        assert body == "a"


def receive_here(pipe: Pipe, connection: SQLiteConnection) -> None:
    pipe.send(bodies(connection, "in", 1))
    send(connection, "out", "from the child")
    pipe.send(sorted(path.name for path in Path("/proc/self/fd").iterdir()))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_connection_goes_on_in_parent_and_child_after_a_fork(path: Path) -> None:
    with opened(path) as connection:
        send(connection, "in", "a", "b")
        waiting = threading.Thread(target=connection.receive, args=(["out"], 1, DEADLOCK, 60))
        waiting.start()
        with child(receive_here, connection) as (pipe, _):
            assert hear(pipe) == ["a"]
            waiting.join(DEADLOCK / 2)
            assert not waiting.is_alive()
        assert bodies(connection, "in") == ["b"]
    assert look(path, "PRAGMA integrity_check") == [("ok",)]


def check_as_nobody(pipe: Pipe, *paths: Path) -> None:
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    texts = []
    for path in paths:
        try:
            SQLite(path).check()
        except ConfigError as error:
            texts.append(str(error))
    pipe.send(texts)


def test_what_may_not_be_written_is_refused_at_check() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        with opened(folder / "queues.db"):
            pass
        (folder / "queues.db").chmod(0o444)
        folder.chmod(0o777)
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0o555)
        (folder / "hidden" / "below").mkdir(parents=True)
        (folder / "hidden").chmod(0o600)
        files = [folder / "queues.db", folder / "closed" / "queues.db", folder / "hidden" / "below" / "queues.db"]
        with child(check_as_nobody, *files) as (pipe, _):
            texts = hear(pipe)
    expected = ["read and write", "writable folder", "can reach"]
    assert [part in text for part, text in zip(expected, texts, strict=True)] == [True] * 3


def test_interrupt_is_for_good(path: Path) -> None:
    waiter = Waiter(str(path))
    waiter.interrupt()
    waiter.interrupt()
    with waiter.ear() as ear:
        begun = time.monotonic()
        ear.wait(DEADLOCK)
        ear.wait(DEADLOCK)
        assert time.monotonic() - begun < 10
    waiter.close()


def test_a_file_another_process_is_just_creating_is_no_strangers(tmp_path: Path) -> None:
    file = str(tmp_path / "queues.db")
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as late:
        begun: list[str] = []

        def create(statement: str) -> None:
            if "sqlite_master" in statement and not begun:
                begun.append(statement)
                # Refused for now, if the late one reads everything in one transaction.
                with (
                    contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as first,
                    contextlib.suppress(sqlite3.OperationalError),
                ):
                    prepare(first, file)

        late.set_trace_callback(create)
        prepare(late, file)
        assert begun
        assert layout_of(late, file)


def test_any_number_of_receivers_hears_the_bell(path: Path) -> None:
    with opened(path) as connection:
        connection.depth("in")
        waiters = [Waiter(str(path)) for _ in range(150)]
        for waiter in waiters:
            with waiter.ear() as ear:
                ear.listen()
                # The system allows a user 128 inotify instances: beyond them receivers would have to poll.
                assert waiter.bell is not None
                waiters[0].ring()
                # Rung since it listened: no wait.
                ear.wait(DEADLOCK)
        for waiter in waiters:
            waiter.close()
        # Whoever may write the database may ring.
        assert Path(f"{path}-bell").stat().st_mode == path.stat().st_mode


def test_no_commit_and_no_interrupt_falls_between_look_and_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A missed one would be found by the next look, some seconds later: here there is none.
    monkeypatch.setattr("sqspipes_mp.brokers.sqlite.connection._LONGEST_REST", DEADLOCK)
    with opened(path) as here, opened(path) as there:

        def echo() -> None:
            while found := there.receive(["in"], 1, 2 * DEADLOCK, 600):
                there.complete([Completion(found[0].handle, (Output("out", found[0].body, found[0].body),))])

        echoing = threading.Thread(target=echo)
        echoing.start()
        began = time.monotonic()
        for number in range(200):
            send(here, "in", f"{number}")
            (message,) = here.receive(["out"], 1, 2 * DEADLOCK, 600)
            here.complete([Completion(message.handle)])
        assert time.monotonic() - began < DEADLOCK
        there.interrupt()
        echoing.join(DEADLOCK)
        assert not echoing.is_alive()
        for _ in range(50):
            with contextlib.closing(SQLite(path).open()) as other:
                waiting = threading.Thread(target=other.receive, args=(["in"], 1, 2 * DEADLOCK, 60))
                waiting.start()
                other.interrupt()
                waiting.join(DEADLOCK)
                assert not waiting.is_alive()
