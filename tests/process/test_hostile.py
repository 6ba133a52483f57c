"""Functions that do to their worker what they should not: the engine copes, or ends with a clear error."""

import ctypes
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import Task
from sqspipes_mp.brokers.sqlite import deliveries as sqlite_deliveries
from tests.gates import Background, Log, alive, dead, drain, engine_at, eventually, feed, send, values, waiting
from tests.process.test_deaths import wait_for_extensions


def source():
    yield from ()


def sink(value):
    return value


def naughty(value, act: Callable[[Log], None], log: Log):
    if value == 1:
        act(log)
    return value


def installs_handlers(log: Log):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def ignores_everything(log: Log):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def changes_directory(log: Log):
    os.chdir("/")


def prints_binary(log: Log):
    os.write(1, bytes(range(256)) * 100)
    os.write(2, bytes(range(256)) * 100)


def closes_standard_streams(log: Log):
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def starts_a_daemon_thread(log: Log):
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def sets_a_default_timeout(log: Log):
    socket.setdefaulttimeout(0.01)


def starts_a_session(log: Log):
    # A process group's leader may not; its child may.
    if os.fork() == 0:
        os.setsid()
        os._exit(0)
    os.wait()


def reaps_everything(log: Log):
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        log.note("no children of mine")


def takes_umask_and_nice(log: Log):
    os.umask(0o777)
    os.nice(5)


def sets_the_wakeup(log: Log):
    _reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


def clears_the_environment(log: Log):
    os.environ.clear()


def sets_the_recursion_limit(log: Log):
    sys.setrecursionlimit(150)


def raises_in_del(log: Log):
    class Odd:
        def __del__(self):
            raise SystemExit(3)

    Odd()
    kept: Any = Odd()
    kept.itself = kept


def runs_a_program(log: Log):
    assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, check=True).stdout == b"1\n"


def forks_and_leaves_by_exit(log: Log):
    if os.fork() == 0:
        os._exit(0)


@pytest.mark.parametrize(
    "act",
    [
        installs_handlers,
        ignores_everything,
        changes_directory,
        prints_binary,
        closes_standard_streams,
        starts_a_daemon_thread,
        sets_a_default_timeout,
        starts_a_session,
        reaps_everything,
        takes_umask_and_nice,
        sets_the_wakeup,
        clears_the_environment,
        sets_the_recursion_limit,
        raises_in_del,
        runs_a_program,
        forks_and_leaves_by_exit,
    ],
    ids=lambda act: act.__name__,
)
def test_the_worker_goes_on_and_ends_cleanly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Log, act: Callable[[Log], None]
) -> None:
    # A relative path: the working directory is the function's to change.
    monkeypatch.chdir(tmp_path)
    engine = engine_at("queues.db", [source, Task(naughty, name="work", args=(act, log)), sink])
    feed(engine, "work", list(range(20)))
    summary = drain(engine, "work")
    assert summary.reason == "drained"
    assert sorted(values(engine, "sink")) == list(range(20))
    assert (summary["work"].failed, summary["work"].done) == (0, 20)


def closes_everything(log: Log):
    os.closerange(3, 65_536)


def test_closing_every_descriptor_costs_the_worker_and_counts_as_the_messages_failure(db: Path, log: Log) -> None:
    work = Task(naughty, name="work", args=(closes_everything, log), max_attempts=2)
    engine = engine_at(db, [source, work, sink], visibility_timeout=2)
    feed(engine, "work", list(range(10)))
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == [number for number in range(10) if number != 1]
    assert [failure.attempts for _, failure in dead(engine, "work")] == [2]


def starts_a_thread_that_stays(log: Log):
    log.note(os.getpid())
    threading.Thread(target=threading.Event().wait).start()


@pytest.mark.slow
def test_a_thread_that_never_ends_does_not_keep_its_worker(db: Path, log: Log) -> None:
    engine = engine_at(db, [source, Task(naughty, name="work", args=(starts_a_thread_that_stays, log)), sink])
    feed(engine, "work", [1, 2])
    summary = drain(engine, "work")
    assert summary.reason == "drained"
    assert sorted(values(engine, "sink")) == [1, 2]
    assert not alive(log.lines()[0])


def leaves_a_child(log: Log):
    pid = os.fork()
    if pid == 0:
        threading.Event().wait()
    log.note(pid)


def leaves_a_child_and_dies(log: Log):
    if len(log.lines()) == 0:
        leaves_a_child(log)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("act", [leaves_a_child, leaves_a_child_and_dies], ids=lambda act: act.__name__)
def test_a_workers_children_go_with_it(db: Path, log: Log, act: Callable[[Log], None]) -> None:
    engine = engine_at(db, [source, Task(naughty, name="work", args=(act, log)), sink], visibility_timeout=2)
    feed(engine, "work", [1, 2])
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == [1, 2]
    [child] = log.lines()
    eventually(lambda: not alive(child))


def dies_with_a_child_alive(log: Log):
    if len(log.lines()) == 0:
        heard, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.write(told, b"!")
            threading.Event().wait()
        # Out of the worker's group, with which it would be killed.
        os.read(heard, 1)
        log.note(pid)
        os._exit(1)


def test_a_death_is_noticed_though_a_grandchild_holds_every_pipe(
    db: Path, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_at(
        db, [source, Task(naughty, name="work", args=(dies_with_a_child_alive, log)), sink], visibility_timeout=2
    )
    feed(engine, "work", [1, 2])
    try:
        drain(engine, "work")
        assert sorted(values(engine, "sink")) == [1, 2]
        # Waiting for the pipe would have lost the exit status.
        assert "was lost: exit status" in caplog.text
    finally:
        # It left the worker's group, so it is nobody's but ours.
        os.kill(log.lines()[0], signal.SIGKILL)


@pytest.mark.slow
def test_a_lease_is_kept_while_c_code_holds_the_gil(tmp_path: Path, db: Path, log: Log) -> None:
    stop = tmp_path / "stop"
    work = Task(spins, name="work", workers=2, args=(log, str(stop)))
    engine = engine_at(db, [source, work, sink], visibility_timeout=4, start_method="fork")
    feed(engine, "work", [1])
    with Background(engine, only="work", until="drained", idle=0.0):
        log.wait_for(1)
        wait_for_extensions(engine, 3)
        stop.touch()
    assert len(log.lines()) == 1
    assert values(engine, "sink") == [1]


def spins(value, log: Log, stop: str):
    log.note(value)
    wait = ctypes.PyDLL(None).usleep
    while not Path(stop).exists():
        wait(500_000)
    return value


def raises_in_a_thread(log: Log):
    thread = threading.Thread(target=lambda: 1 // 0)
    thread.start()
    thread.join()


def test_an_exception_in_a_thread_of_the_functions_is_not_its_own(db: Path, log: Log) -> None:
    engine = engine_at(db, [source, Task(naughty, name="work", args=(raises_in_a_thread, log)), sink])
    feed(engine, "work", [1])
    drain(engine, "work")
    assert values(engine, "sink") == [1]


def uses_multiprocessing(log: Log):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        log.note(pool.map(abs, [-1, -2]))


def test_a_function_may_use_multiprocessing(db: Path, log: Log) -> None:
    engine = engine_at(db, [source, Task(naughty, name="work", args=(uses_multiprocessing, log)), sink])
    feed(engine, "work", [1, 2])
    drain(engine, "work")
    assert log.lines() == [[1, 2]]
    assert sorted(values(engine, "sink")) == [1, 2]


def ends_a_child_with_sigterm(log: Log):
    child = multiprocessing.get_context("fork").Process(target=threading.Event().wait)
    child.start()
    child.terminate()
    child.join()
    log.note([child.exitcode, sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))])


@pytest.mark.parametrize("iterate", [False, True], ids=["run", "iterate"])
def test_what_a_function_forks_hears_sigterm(db: Path, log: Log, iterate: bool) -> None:
    work = Task(naughty, name="work", args=(ends_a_child_with_sigterm, log), timeout=20, max_attempts=1)
    engine = engine_at(db, [source, work, sink])
    feed(engine, "work", [1])
    ran = drain(engine, "work", iterate=iterate)
    assert not iterate or list(ran) == [1]
    assert log.lines() == [[-signal.SIGTERM, []]]


def out_of_memory_at_1(value: int, log: Log):
    log.note(os.getpid())
    if value == 1:
        raise MemoryError
    return value


def test_a_memory_error_replaces_the_worker(db: Path, log: Log) -> None:
    work = Task(out_of_memory_at_1, name="work", args=(log,), on_error="reject")
    engine = engine_at(db, [source, work, sink])
    feed(engine, "work", [1, 2, 3])
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == [2, 3]
    # The one that ran out was the first, and had nothing else.
    assert len(set(log.lines()[1:])) == 1
    assert log.lines()[0] not in log.lines()[1:]
    assert waiting(engine, "work") == (0, 0, 0)


def add_pid(value: object):
    return [value, os.getpid()]


def test_without_memory_to_receive_workers_are_replaced_after_a_pause(
    db: Path, log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sqspipes_mp.supervisor.restart.LONGEST_BACKOFF", 0.01)
    take = sqlite_deliveries.take_messages

    def take_with_little_memory(*args):
        taken = take(*args)
        if taken[0]:
            log.note(os.getpid())
            if len(log.lines()) <= 2:
                raise MemoryError
        return taken

    monkeypatch.setattr(sqlite_deliveries, "take_messages", take_with_little_memory)
    work = Task(add_pid, name="work", max_attempts=1)
    engine = engine_at(db, [source, work, sink], start_method="fork")
    feed(engine, "work", [7])
    summary = drain(engine, "work")
    *short, last = log.lines()
    # Where it is received at last it is done, and none of it was an attempt of its.
    assert values(engine, "sink") == [[7, last]]
    assert summary["work"].dead == 0
    assert len({*short, last}) == 3
    assert caplog.text.count("work[0] has no memory for its messages") == 2


def length_and_pid(value: list[object], log: Log):
    if not value:
        # Enough to receive the large body, not to decode it.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**24, resource.RLIM_INFINITY))
    log.note(len(value), os.getpid())
    return len(value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_body_that_there_is_no_memory_for_is_done_by_the_next_worker(db: Path, log: Log) -> None:
    work = Task(length_and_pid, name="work", args=(log,))
    # Forked, it would have what this process has freed, and could decode.
    engine = engine_at(db, [source, work, sink], start_method="spawn")
    feed(engine, "work", [[]])
    with Background(engine, only="work") as run:
        log.wait_for(1)
        send(engine, "work", '{"value": [' + "[]," * 1_999_999 + "[]]}")
        eventually(lambda: len(log.lines()) > 1 or run.error)
        engine.stop()
    (_, first), (length, second) = log.lines()
    assert length == 2_000_000
    assert first != second
    assert values(engine, "sink") == [0, length]
    assert dead(engine, "work") == []
