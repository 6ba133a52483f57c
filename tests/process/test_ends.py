"""Nothing that a person calls hangs without a word, and every run comes to its end."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import (
    SQS,
    BrokerBusy,
    BrokerUnreachable,
    ConfigError,
    Engine,
    MapIncomplete,
    PutError,
    SQLite,
    StartFailed,
    SupervisorLost,
    Task,
)
from sqspipes_mp.brokers.sqlite import file as sqlite_file
from sqspipes_mp.brokers.sqs import calls
from sqspipes_mp.engine import plan_run
from sqspipes_mp.host import descriptors
from sqspipes_mp.keeper.queue_counts import DrainWatch
from sqspipes_mp.supervisor.run import new_board
from standin import standin
from standin.brokers import sqs_at
from tests.gates import TIMEOUT, Background, Gate, Log, drain, ended, engine_at, eventually, program, values, waiting


class Place:
    """A port of this machine's where nothing answers, until ``open`` passes its connections on to a server."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        # Bound, so that nobody else gets the port; connections are refused as long as it does not listen.
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def open(self, url: str) -> None:
        self._socket.listen()
        self._begin(self._accept, int(url.rpartition(":")[2]))

    def close(self) -> None:
        for end in [self._socket, *self._ends]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in [self._socket, *self._ends]:
            end.close()

    def _accept(self, port: int) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(("127.0.0.1", port))
                self._ends += [client, server]
                self._begin(self._pass_on, client, server)
                self._begin(self._pass_on, server, client)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def _begin(self, target: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()


@pytest.fixture
def place() -> Iterator[Place]:
    SQS().warm()
    place = Place()
    yield place
    place.close()


def echo(value: Any) -> Any:
    return value


# --- a queue service that is not there ---


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.put(1),
        lambda engine: engine.stats(),
        lambda engine: engine.dead_letters(),
        lambda engine: engine.purge(),
        lambda engine: engine.delete(),
        lambda engine: engine.map([1]),
        lambda engine: engine.run(),
    ],
    ids=["put", "stats", "dead_letters", "purge", "delete", "map", "run"],
)
def test_every_call_ends_with_the_same_words_where_no_queue_service_is(
    place: Place, call: Callable[[Engine], object]
) -> None:
    engine = Engine([Task(echo, input=True)], domain="t", broker=sqs_at(place.url))
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1.*Nothing usable answers .*--wait-for-broker"):
        call(engine)


def test_put_many_that_was_under_way_is_patient_and_tells_so_then_tells_what_was_sent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calls, "ATTENDED", 0.5)
    monkeypatch.setattr(calls, "TOLD_EVERY", 0.02)
    SQS().warm()
    with standin() as server:
        engine = Engine([Task(echo, input=True)], domain="t", broker=sqs_at(server.url))

        def until_the_service_is_gone() -> Iterator[int]:
            yield from range(1_000)
            os.kill(server.pid, signal.SIGKILL)
            yield from range(1_000, 10_000)

        with pytest.raises(PutError) as caught:
            engine.put_many(until_the_service_is_gone())
    assert caught.value.sent >= 100
    assert isinstance(caught.value.__cause__, BrokerUnreachable)
    told = [line for line in caplog.messages if line.endswith("; trying again")]
    assert len(told) >= 2
    assert all(line.startswith("SendMessageBatch on queue t") and server.url in line for line in told)


def test_a_start_waits_for_a_queue_service_that_starts_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine([Task(echo, input=True)], domain="t", broker=sqs_at(place.url), start_method="fork")
    monkeypatch.setenv("SQSPIPES_WAIT_FOR_BROKER", "nan")
    with pytest.raises(ConfigError, match="SQSPIPES_WAIT_FOR_BROKER"):
        engine.run()
    monkeypatch.setenv("SQSPIPES_WAIT_FOR_BROKER", str(TIMEOUT))
    with standin() as server:

        def start() -> None:
            eventually(lambda: "waiting for the queue service" in caplog.text, "the wait is told")
            place.open(server.url)

        thread = threading.Thread(target=start)
        thread.start()
        try:
            # A map's survey waits in this process, a run's keeper in its own.
            results = engine.map([1])
        finally:
            thread.join()
        assert list(results) == [1]


LOCKS = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_lock_of_others_is_told_with_its_holder_and_not_waited_for_for_ever(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_at(db, [Task(echo, input=True)])
    monkeypatch.setattr(sqlite_file, "_PATIENCE", 0.1)
    monkeypatch.setattr(sqlite_file, "ATTENDED", 0.6)
    engine.put(1)
    (tmp_path / "locks.py").write_text(LOCKS)
    holder = subprocess.Popen(
        [sys.executable, str(tmp_path / "locks.py"), str(db)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(BrokerBusy, match="another process holds it"):
            engine.put(2)
        holder.kill()
    if sys.platform.startswith("linux"):
        assert f"pid {holder.pid} ({sys.executable}"[:40] in caplog.text
        assert ", stopped)" in caplog.text
    assert values(engine, "echo") == [1]


# --- feeding ---

FULL = """
import resource, signal
from sqspipes_mp import Engine, Task
def fed():
    # It stands for a full disk: this process, whose children are there already, can write no file beyond it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, -1))
    while True:
        yield "x" * 20000
def work(value):
    pass
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if __name__ == "__main__":
    for _ in Engine([Task(work, input=True)], broker="sqlite:///full.db", shutdown_grace=0).map(fed()):
        pass
"""


def test_sigterm_breaks_off_a_map_that_cannot_feed(tmp_path: Path) -> None:
    with program(tmp_path, FULL) as process:
        assert process.stderr is not None
        assert "retrying until it passes" in process.stderr.readline()
        process.terminate()
        code, _, errors = ended(process)
    assert code == 1
    assert "MapIncomplete" in errors
    assert "it was stopped (SIGTERM)" in errors


def stuck(gate: Gate, log: Log) -> Any:
    def work(value: Any) -> Any:
        log.note(value)
        gate.wait()
        return value

    return work


def test_the_end_of_the_supervisor_breaks_off_a_map_that_cannot_feed(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_at(db, [Task(echo, input=True)])
    results: Any = None

    def fed() -> Iterator[int]:
        # From here on the file takes nothing from this process.
        monkeypatch.setattr(sqlite_file.File, "_write", refuse)
        os.kill(results._child.pid, signal.SIGKILL)
        yield 1

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "no space")

    results = engine.map(fed())
    with pytest.raises(SupervisorLost):
        list(results)


# --- interrupted loops ---


class Interrupted(Exception):
    """What a host's alarm raises."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("method", ["map", "iterate"])
def test_what_leaves_next_drains_though_somebody_keeps_the_error(
    db: Path, log: Log, gate: Gate, method: str, kind: type[BaseException]
) -> None:
    engine = engine_at(db, [Task(stuck(gate, log), name="work", input=True)], shutdown_grace=0)
    engine.purge()
    if method == "iterate":
        engine.put(1)
    results = engine.map([1]) if method == "map" else engine.run(iterate=True)

    def alarm(*_: object) -> None:
        raise kind

    def ring() -> None:
        eventually(log.lines, "the first one runs")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    old = signal.signal(signal.SIGALRM, alarm)
    thread = threading.Thread(target=ring)
    thread.start()
    try:
        # Its traceback keeps the iterator, as sys.last_value does in a notebook.
        with pytest.raises(kind) as kept:
            next(results)
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, old)
    assert kept.value.__traceback__ is not None
    assert not results.open
    # A map's end would look like a whole one.
    if (method, kind) == ("map", KeyboardInterrupt):
        with pytest.raises(MapIncomplete, match="results of 1 value"):
            next(results)
    else:
        assert list(results) == []
    gate.open()
    assert drain(engine, "work")["work"].done == 1


# --- daemons ---

DAEMON = """
import os, sys, threading, time
from sqspipes_mp import Engine, Task
def work(n):
    open("began", "w").close()
    while not os.path.exists("end"):
        time.sleep(0.01)
    return n
e = Engine([Task(work, input=True)], broker="sqlite:///d.db")
def loop():
    if sys.argv[1] == "run":
        e.run()
    else:
        for _ in e.map([1, 2]):
            pass
if __name__ == "__main__":
    if sys.argv[1] == "run":
        e.put(1)
    threading.Thread(target=loop, daemon=True).start()
    while not os.path.exists("began"):
        time.sleep(0.01)
    threading.Timer(0.3, lambda: open("end", "w").close()).start()
    print("main ends")
"""


@pytest.mark.parametrize("how", ["run", "map"])
def test_a_run_in_a_daemon_thread_drains_at_the_program_s_end(tmp_path: Path, how: str) -> None:
    with program(tmp_path, DAEMON, how) as process:
        code, output, errors = ended(process)
    assert (code, output) == (0, "main ends\n")
    assert "was lost" not in errors
    engine = engine_at(tmp_path / "d.db", [Task(echo, input=True)])
    if how == "run":
        assert waiting(engine, "echo")[1] == 0


def in_a_daemonic_process(db: Path, told: Any) -> None:
    engine = engine_at(db, [Task(echo, input=True)])
    told.put(
        (multiprocessing.current_process().daemon, list(engine.map([2])), multiprocessing.current_process().daemon)
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_engine_works_inside_a_daemonic_process(db: Path, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    told = context.SimpleQueue()
    process = context.Process(target=in_a_daemonic_process, args=(db, told), daemon=True)
    process.start()
    try:
        assert told.get() == (True, [2], True)
    finally:
        process.join()
        process.close()
        told.close()


# --- limits ---

LEAKS = """
import os, resource, sys
from sqspipes_mp import Engine, Task
kept = []
def leak(n):
    try:
        while True:
            kept.append(os.dup(0))
    except OSError:
        if sys.argv[1] == "raise" and n == 0 and not os.path.exists("raised"):
            os.mkdir("raised")
            raise
        return n
def last(n):
    return None
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
    e = Engine([Task(leak, input=True), Task(last)], broker="sqlite:///leak.db", on_error="retry")
    e.put_many(range(3))
    print(e.run(until="drained", idle=0)["last"].done)
"""


@pytest.mark.parametrize("how", ["return", "raise"])
def test_a_worker_without_descriptors_is_replaced(tmp_path: Path, how: str) -> None:
    with program(tmp_path, LEAKS, how) as process:
        code, output, errors = ended(process)
    assert (code, output) == (0, "3\n"), errors
    # Where the function swallows the error, the worker goes on as long as its connection needs none.
    assert how == "return" or "is replaced: it had no file descriptor left" in errors


def test_a_run_that_needs_too_many_descriptors_is_refused_with_the_figure(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_at(db, [Task(echo, input=True, workers=300)])
    monkeypatch.setattr(descriptors, "left", lambda: (10, 1024))
    for call in (engine.run, lambda: engine.map([1])):
        with pytest.raises(ConfigError, match=r"at most 198 .*1024 open files.* got 300\. Raise the limit to 1534"):
            call()


class Refusing:
    """A ``setup`` whose first worker can start no thread (root has no limit of them)."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __call__(self) -> None:
        start = threading.Thread.start

        def refusing(thread: threading.Thread) -> None:
            if thread.name == "intake" and not self.flag.exists():
                self.flag.touch()
                raise RuntimeError("can't start new thread")
            start(thread)

        threading.Thread.start = refusing  # type: ignore[method-assign, assignment]


def test_a_worker_that_can_start_no_thread_is_started_again(
    db: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_at(db, [Task(echo, input=True)], setup=Refusing(tmp_path / "refused"), start_method="fork")
    engine.put(1)
    assert drain(engine, "echo")["echo"].done == 1
    assert "echo[0] could not be started: can't start new thread; trying again" in caplog.text


# --- starts ---

GONE = """
import os, sys, tempfile
from sqspipes_mp import Engine, Task
def sq(n):
    return n * n
if __name__ == "__main__":
    print("in the buffer")
    reads, writes = os.pipe()
    os.dup2(writes, 1)
    os.close(reads)
    e = Engine([Task(sq, input=True, max_tasks_per_worker=2)], broker="sqlite:///gone.db", start_method=sys.argv[1])
    e.put_many(range(5))
    print(e.run(until="drained", idle=0)["sq"].done, list(e.map([1])), file=sys.stderr)
    os._exit(0)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_broken_stdout_stops_no_start(tmp_path: Path, method: str) -> None:
    with program(tmp_path, GONE, method) as process:
        code, _, errors = ended(process)
    assert (code, errors) == (0, "5 [1]\n")


def test_an_error_of_a_start_that_does_not_pass_ends_the_run_at_once(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_at(db, [Task(echo, input=True)], start_method="fork")
    engine.purge()

    def fork() -> int:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "fork", fork)
    began = time.monotonic()
    for call in (engine.run, lambda: engine.map([1])):
        with pytest.raises(StartFailed, match=r"could not be started: \[Errno 1\] not here"):
            call()
    assert time.monotonic() - began < TIMEOUT


FOLDERS = """
import os, sys
from sqspipes_mp import Engine, Task
def sq(n):
    return n
if __name__ == "__main__":
    e = Engine([Task(sq, input=True)], broker="sqlite:///" + os.path.abspath("f.db"), start_method="forkserver")
    e.purge()
    if sys.argv[1] == "gone":
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
    else:
        os.environ["TMPDIR"] = sys.argv[1]
        os.mkdir(sys.argv[1])
    for call in (e.run, lambda: e.map([1])):
        try:
            call()
        except Exception as error:
            print(type(error).__name__, str(error)[:40])
"""


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("gone", "the working directory must be there for "),
        ("l" * 100, "the temporary folder must be short enoug"),
    ],
    ids=["cwd", "long"],
)
def test_a_folder_without_which_nothing_starts_is_one_config_error(tmp_path: Path, folder: str, words: str) -> None:
    argument = folder if folder == "gone" else str(tmp_path / folder)
    with program(tmp_path, FOLDERS, argument) as process:
        _, output, errors = ended(process)
    assert output == f"ConfigError {words}\n" * 2, errors


# --- ends ---


def numbers() -> Iterator[int]:
    yield from range(3)


def test_a_run_whose_generator_source_and_all_tasks_are_here_ends_by_itself(
    db: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engine = engine_at(db, [numbers, echo])
    summary = engine.run()
    assert (summary.reason, summary["echo"].done) == ("drained", 3)
    assert "ends once the queues are drained: all tasks run here, and the source is a generator" in caplog.text


@pytest.mark.parametrize(
    ("tasks", "options", "words"),
    [
        ([numbers, echo], {"until": "stopped"}, 'until="stopped"'),
        ([numbers, echo], {"only": "echo"}, "the source 'numbers' runs elsewhere"),
        ([Task(echo, input=True)], {}, "others may send to 'echo' at any time"),
    ],
)
def test_every_other_run_goes_on_until_it_is_stopped_and_says_why(
    db: Path, caplog: pytest.LogCaptureFixture, tasks: list[Any], options: dict[str, Any], words: str
) -> None:
    caplog.set_level("INFO")
    engine = engine_at(db, tasks)
    with Background(engine, **options) as run:
        eventually(lambda: words in caplog.text, "the start tells")
        eventually(lambda: "echo" in [stage.name for stage in engine._parts.runs.stages()], "it runs")
        engine.stop()
    assert run.summary.reason == "stopped"


def test_idle_is_a_second_where_nobody_else_feeds(db: Path) -> None:
    assert plan_run(engine_at(db, [Task(echo, input=True)]), until="drained").idle == 1.0
    assert plan_run(engine_at(db, [numbers, echo]), "echo", until="drained").idle == 60.0


def test_an_idle_that_the_queue_service_makes_longer_is_told(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    broker = sqs_at(place.url)
    plan = plan_run(Engine([Task(echo, input=True)], domain="t", broker=broker), until="drained", idle=0)
    with closing(new_board(plan)) as board, closing(broker.open()) as connection:
        DrainWatch(plan, board, connection, lambda: None)
    assert "idle=0 s is 0.1 s here" in caplog.text


# --- the file ---


def test_the_file_and_those_beside_it_are_their_owner_s_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        for mode in (0o600, 0o660):
            folder = tmp_path / oct(mode)
            folder.mkdir()
            engine = Engine([Task(echo, input=True)], domain="t", broker=SQLite(folder / "q.db", mode=mode))
            assert list(engine.map([1])) == [1]
            engine.put(1)
            assert {each.stat().st_mode & 0o777 for each in folder.iterdir()} == {mode}
            assert {"q.db", "q.db-t.lock", "q.db-wal"} <= {each.name for each in folder.iterdir()}
            engine.close()
        (tmp_path / "q.db").touch()
        (tmp_path / "q.db").chmod(0o644)
        engine = engine_at(tmp_path / "q.db", [Task(echo, input=True)])
        engine.put(1)
        engine.close()
        assert (tmp_path / "q.db").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(old)


TEMPORARY = """
import os, sys
from sqspipes_mp import Engine, Task
e = Engine([Task(print, name="p", input=True)], broker="sqlite://", domain="t")
e.put(1)
print(e.broker.file, flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_killed_owner_goes_with_the_next_start(tmp_path: Path) -> None:
    with program(tmp_path, TEMPORARY) as first:
        assert first.stdout is not None
        folder = Path(first.stdout.readline().strip()).parent
        other = SQLite()
        other.check()
        assert folder.exists()
        other.cleanup()
        first.kill()
        first.wait()
        assert folder.exists()
        other = SQLite()
        other.check()
        assert not folder.exists()
        other.cleanup()
