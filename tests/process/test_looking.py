"""Looking at a running engine, and asking it: nobody who looks, or sends whatever, disturbs it."""

import contextlib
import json
import logging
import mmap
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sqspipes_mp import Task, current_message
from sqspipes_mp.brokers.base import Handle
from sqspipes_mp.ipc.running import fixed
from sqspipes_mp.ipc.running.asking import ask, ask_for_statistics, socket_path
from sqspipes_mp.ipc.running.folders import Engine as Found
from sqspipes_mp.ipc.running.folders import Unanswered, candidates, engines, open_folder
from sqspipes_mp.ipc.running.health import verdict
from sqspipes_mp.ipc.running.memory import Gone, Memory, open_memory
from sqspipes_mp.ipc.running.state import state
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import ForeignLayout, Statistics, lane_started
from sqspipes_mp.supervisor.registration import Registration
from tests.gates import Background, Gate, Log, engine_at, eventually, feed, kill, present, program, values

ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "registry"
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(folder))
    return folder


def source() -> Iterator[object]:
    yield from ()


def sink(value: object) -> object:
    return value


def held(value: object, gate: Gate, log: Log) -> object:
    current_message().progress(0.25, f"at {value}")
    log.note(value)
    gate.wait()
    return value


@contextlib.contextmanager
def looked_at(found: Found) -> Iterator[Statistics]:
    memory = open_memory(found)
    statistics = Statistics(memory.view)
    try:
        yield statistics
    finally:
        statistics.close()
        memory.close()


def the_one() -> Found:
    """Return the one engine that is registered."""
    found: list[Found] = []

    def look() -> bool:
        found[:] = engines()
        return len(found) == 1

    eventually(look, "one engine is registered")
    return found[0]


def connected(found: Found) -> socket.socket:
    with contextlib.ExitStack() as failed:
        sock = failed.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(60)
        folder = open_folder(found.folder)
        try:
            sock.connect(socket_path(folder, found.folder, found.run))
        finally:
            os.close(folder)
        failed.pop_all()
        return sock


def rubbish(random_: random.Random) -> bytes:
    return random_.choice(
        [
            b"",
            b"\n" * random_.randrange(1, 50),
            random_.randbytes(random_.randrange(1, 9000)),
            random_.randbytes(3000) + b"\n",
            b'{"do": "stop"',
            b'{"id": 1}\n',
            b'{"do": 5}\n[]\n7\nnull\n',
            b'{"do": "no such order", "id": {"a": []}}\n',
            b'{"do": "stack", "stage": ["work"], "worker": {}}\n',
            b'{"do": "stack", "stage": "work", "worker": 99}\n' * 20,
            b'{"do": "statistics"}\n' * 30,
            b"[" * 60_000 + b"\n",
            b'{"do": "' + b"x" * 200_000,
            b"9" * 5000 + b"\n",
        ]
    )


def test_nothing_that_a_client_sends_disturbs_a_run(db: Path, gate: Gate, log: Log) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    feed(engine, "work", list(range(30)))
    with Background(engine, only="work", until="drained", idle=0) as run:
        found = the_one()
        log.wait_for(1)
        random_ = random.Random(7)
        clients: list[socket.socket] = []
        for _ in range(120):
            with contextlib.suppress(OSError):
                sock = connected(found)
                sock.setblocking(False)
                clients.append(sock)
                sock.send(rubbish(random_))
            if random_.random() < 0.6 and clients:
                clients.pop(random_.randrange(len(clients))).close()
        gate.open()
    # Clients that were silent had every place until the run's end.
    for sock in clients:
        sock.close()
    assert sorted(map(str, values(engine, "sink"))) == sorted(map(str, range(30)))
    assert run.summary["work"].done == 30


def test_a_client_is_answered_beside_silent_ones_that_are_cut_off(
    db: Path, gate: Gate, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqspipes_mp.supervisor.control._SILENCE", 0.3)
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    feed(engine, "work", [1])
    with Background(engine, only="work", until="drained", idle=0) as run:
        found = the_one()
        silent = [connected(found) for _ in range(16)]
        silent[0].send(b'{"do": "st')
        for sock in silent:
            # The end of the connection, which the supervisor closes.
            assert sock.recv(10) == b""
            sock.close()
        with connected(found) as sock:
            sock.sendall(b'{"id": "a", "do": "stack", "stage": "none"}\n{"id": 2, "do": "fly"}\n')
            raw = b""
            while raw.count(b"\n") < 2:
                raw += sock.recv(4096)
        first, second = map(json.loads, raw.splitlines())
        assert (first["id"], second["id"]) == ("a", 2)
        assert "stage must be one of" in first["error"]
        assert "no such order" in second["error"]
        gate.open()
    assert run.summary["work"].done == 1


def test_the_state_tells_what_runs_and_where_it_is(db: Path, gate: Gate, log: Log) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    feed(engine, "work", ["x"])
    with contextlib.ExitStack() as looking:
        with Background(engine, only="work", until="drained", idle=0):
            log.wait_for(1)
            found = the_one()
            statistics = looking.enter_context(looked_at(found))
            eventually(lambda: state(statistics)["engine"]["ready"], "it is ready")
            seen = state(statistics)
            (stage,), (worker,) = seen["stages"], seen["workers"]
            (call,) = worker["calls"]
            assert (call["fraction"], call["text"]) == (0.25, "at x")
            assert call["id"]
            assert (stage["name"], stage["running"], stage["ready"], worker["state"]) == ("work", 1, 1, "busy")
            assert stage["queue_wait"]["p50"] is not None
            assert json.loads(json.dumps(seen)) == seen
            (told,) = ask(found, {"do": "stack", "stage": "work"})["stacks"]
            assert "in wait" in told["stack"]
            assert told["pid"] == worker["pid"]
            gate.open()
        # The memory outlives the engine for as long as it is mapped.
        after = state(statistics, since=seen)
        assert after["stages"][0]["done"] == 1
        assert after["workers"][0]["calls"] == []
    assert engines() == []
    with pytest.raises(Gone):
        open_memory(found)
    with pytest.raises(Unanswered):
        ask(found, {"do": "stop"})


def test_stop_by_order_drains_and_a_second_one_kills_nothing(db: Path, gate: Gate, log: Log) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    feed(engine, "work", [1, 2, 3])
    with Background(engine, only="work") as run:
        log.wait_for(1)
        found = the_one()
        for _ in range(2):
            assert "this engine" in ask(found, {"do": "stop"})["reach"]
        gate.open()
    assert run.summary.reason == "stopped"
    # What was begun was finished, and the rest is back in its queue.
    assert run.summary["work"].done == len(log.lines())
    assert sorted(values(engine, "sink") + values(engine, "work")) == [1, 2, 3]


def test_who_looks_cannot_write(db: Path, gate: Gate, log: Log) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    with Background(engine, only="work"):
        found = the_one()
        fd = ask_for_statistics(found)
        try:
            with pytest.raises(PermissionError):
                mmap.mmap(fd, os.fstat(fd).st_size)
            with pytest.raises(OSError, match=r"argument|permitted"):
                os.ftruncate(fd, 0)
            Memory(fd, found.run).close()
        finally:
            os.close(fd)
        engine.stop()


def test_no_reader_maps_leases_charges_or_credentials() -> None:
    board = Scoreboard.create(1, 1)
    board.wallet.write("the secret of the wallet")
    region = board.region(0)
    region.assign(0)
    handle = Handle("q", "the receipt handle", "m1")
    region.write(0, 0, handle, None, receives=1, charges=0, received_at=1.0, deadline=2.0, sent_at=3.0)
    with mmap.mmap(board.statistics_fd, 0, prot=mmap.PROT_READ) as seen:
        assert seen.find(b"sqspipes") == 0
        for secret in (b"the secret of the wallet", b"the receipt handle", b"m1"):
            assert seen.find(secret) < 0
    assert os.fstat(board.statistics_fd).st_ino != os.fstat(board.fileno()).st_ino
    with pytest.raises(PermissionError):
        os.ftruncate(board.statistics_fd, 100)
    board.close()


def test_a_reader_meets_no_torn_call_while_a_lane_is_reused() -> None:
    board = Scoreboard.create(1, 1)
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            board.begins(0, 0, number, f"{number:064d}", number)
            board.progressed(0, 0, 0.5, f"{number} " * 9)
            board.put(0, lane_started(0), 0)

    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            write()
        os._exit(0)
    try:
        with mmap.mmap(board.statistics_fd, 0, prot=mmap.PROT_READ) as seen:
            statistics = Statistics(memoryview(seen))
            met = 0
            until = time.monotonic() + 60
            while met < 300 and time.monotonic() < until:
                for call in statistics.calls(0):
                    met += 1
                    assert int(call.hop) == call.started
                    assert f"{call.started} " * 9 == call.text or not call.text
            statistics.close()
        assert met == 300
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        board.close()


def test_a_foreign_layout_is_told_and_its_health_is_read_all_the_same() -> None:
    board = Scoreboard.create(1, 1)
    board._words[fixed.LAYOUT] = 99
    board._words[fixed.SUPERVISOR_BEAT] = time.monotonic_ns()
    board._words[fixed.READINESS] = fixed.READY
    memory = Memory(board.statistics_fd, board.run_id)
    with pytest.raises(ForeignLayout, match="layout 99"):
        Statistics(memory.view)
    assert verdict(memory.fixed_words(), time.monotonic_ns()).ready
    memory.close()
    with pytest.raises(Gone):
        Memory(board.statistics_fd, "0" * 32)
    with pytest.raises(Gone):
        Memory(board.fileno(), board.run_id)
    board.close()


LOOKER = """
import threading
from sqspipes_mp.ipc.running.folders import engines
print("looks", flush=True)
while True:
    engines()
    threading.Event().wait(0.001)
"""


def test_readers_that_tidy_up_take_no_living_run_away(registry: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            looker = stack.enter_context(subprocess.Popen([sys.executable, "-c", LOOKER], stdout=subprocess.PIPE))
            stack.callback(looker.kill)
            assert present(looker.stdout).readline() == b"looks\n"
        for number in range(150):
            run = f"{number:032x}"
            entered = present(Registration.enter(run, json.dumps({"run": run, "began": 1})))
            entered.publish()
            assert [engine.run for engine in engines()] == [run]
            if number % 2:
                entered.leave()
                assert engines() == []
            else:
                # As by a kill: its lock goes, and its files are for others to remove.
                entered.close()
                eventually(lambda: not list(registry.iterdir()), "its files are gone")


def test_the_registrys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"sqspipes_mp-{os.geteuid()}"
    monkeypatch.delenv("SQSPIPES_RUN_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/session")
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert candidates() == ["/session/sqspipes_mp", f"/run/{own}", f"/elsewhere/{own}", f"/dev/shm/{own}"]  # noqa: S108
    monkeypatch.setenv("SQSPIPES_RUN_DIR", "/mine")
    assert candidates() == ["/mine"]
    monkeypatch.setenv("SQSPIPES_RUN_DIR", "off")
    assert candidates() == []


@pytest.mark.parametrize("what", ["link", "file", "socket", "writable", "foreign"])
def test_an_unsafe_folder_is_refused_with_one_line_and_the_run_goes_on(
    what: str, registry: Path, tmp_path: Path, db: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if what == "link":
        (tmp_path / "other").mkdir(mode=0o700)
        registry.symlink_to(tmp_path / "other")
    elif what == "file":
        registry.write_text("")
    elif what == "socket":
        os.mknod(registry, stat.S_IFSOCK | 0o600)
    else:
        registry.mkdir(mode=0o700)
        if what == "writable":
            registry.chmod(0o777)
        elif not ROOT:
            pytest.skip("only root can make a folder another user's")
        else:
            os.chown(registry, 12345, 12345)
    with caplog.at_level(logging.WARNING, "sqspipes_mp.supervisor"):
        engine = engine_at(db, [source, sink])
        assert engine.run(until="drained", idle=0).reason == "drained"
    assert [record.getMessage() for record in caplog.records if "not registered" in record.getMessage()]
    assert len(caplog.records) == 1
    assert engines() == []


@pytest.mark.skipif(not ROOT, reason="a second user to try as is root's to choose")
def test_another_user_can_neither_read_nor_steer(db: Path, gate: Gate, log: Log, registry: Path) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    program_ = f"""
import os, socket, sys
os.setgroups([]); os.setgid(12345); os.setuid(12345)
pid, fd = sys.argv[1:3]
failed = 0
for attempt in (
    lambda: os.listdir({str(registry)!r}),
    lambda: os.open(f"/proc/{{pid}}/fd/{{fd}}", os.O_RDONLY),
    lambda: socket.socket(socket.AF_UNIX).connect(sys.argv[3]),
    lambda: open(sys.argv[3].replace(".sock", ".json")),
):
    try:
        attempt()
    except OSError:
        failed += 1
print(failed)
"""
    with Background(engine, only="work"):
        found = the_one()
        pid, fd = found.number("pid"), found.number("statistics")
        sock = str(registry / f"{found.run}.sock")
        done = subprocess.run(
            [sys.executable, "-c", program_, str(pid), str(fd), sock], capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "4", done.stderr
        assert (registry.stat().st_mode & 0o777, Path(sock).stat().st_mode & 0o777) == (0o700, 0o600)
        engine.stop()


PROGRAM = """
import sys
from sqspipes_mp import Engine, SQLite, Task
from tests.gates import Gate, Log
from tests.process.test_looking import held
task = Task(held, input=True, args=(Gate(sys.argv[2]), Log(sys.argv[3])))
engine = Engine([task], broker=SQLite(sys.argv[1]), domain="d")
engine.put("x")
engine.run()
"""


def test_a_client_of_a_killed_supervisor_sees_its_end_and_its_files_go(
    tmp_path: Path, db: Path, gate: Gate, log: Log, registry: Path
) -> None:
    with program(tmp_path, PROGRAM, db, gate.path, log.path) as process:
        log.wait_for(1)
        found = the_one()
        with connected(found) as sock:
            sock.sendall(b'{"id": 1, "do": "statistics"}\n')
            assert b"ok" in sock.recv(4096)
            memory = open_memory(found)
            kill(process.pid)
            process.wait()
            # A worker that kept a copy would keep the connection, and the lock.
            assert sock.recv(4096) == b""
        assert engines() == []
        assert list(registry.iterdir()) == []
        assert verdict(memory.fixed_words(), time.monotonic_ns() + 31_000_000_000).live is False
        memory.close()
        gate.open()


def _words(**fields: int) -> list[int]:
    words = [0] * fixed.WORDS
    for name, value in fields.items():
        words[getattr(fixed, name)] = value
    return words


def test_the_verdict_knows_beats_and_readiness_alone() -> None:
    second = 1_000_000_000
    now = 1000 * second
    beat = now - 6 * second
    ready = _words(SUPERVISOR_BEAT=beat, KEEPER_BEAT=beat, KEEPER_LIMIT=30 * second, READINESS=fixed.READY)
    assert verdict(ready, now).ready
    silent = verdict(ready, now + 31 * second, ["a"])
    assert (silent.live, silent.ready) == (False, False)
    assert "supervisor" in silent.why
    stalled = _words(SUPERVISOR_BEAT=now, KEEPER_BEAT=now - 40 * second, KEEPER_LIMIT=30 * second, READINESS=1)
    assert "keeper" in verdict(stalled, now).why
    booting = _words(SUPERVISOR_BEAT=now, KEEPER_BEAT=now - 999 * second)
    assert (verdict(booting, now).live, verdict(booting, now).ready) == (True, False)
    away = _words(SUPERVISOR_BEAT=now, READINESS=1 << 8 | fixed.NO_CONTACT)
    assert verdict(away, now, ["a", "b"]).why == "no word from the broker for 60 s in stage b"
    assert verdict(away, now, ["a"]).live


def test_a_squatted_folder_is_told_and_the_next_one_serves(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SQSPIPES_RUN_DIR")
    (tmp_path / "squatted").mkdir()
    (tmp_path / "squatted").chmod(0o777)
    places = [str(tmp_path / "none" / "there"), str(tmp_path / "squatted"), str(tmp_path / "own")]
    monkeypatch.setattr("sqspipes_mp.supervisor.registration.candidates", lambda: places)
    with caplog.at_level(logging.WARNING, "sqspipes_mp.supervisor"):
        assert engine_at(db, [source, sink]).run(until="drained", idle=0).reason == "drained"
    (line,) = (record.getMessage() for record in caplog.records)
    assert "squatted is refused: others may write to it; this run is registered in" in line
    assert list((tmp_path / "own").iterdir()) == []
