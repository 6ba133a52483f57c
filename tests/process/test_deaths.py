"""Workers, keeper and supervisor killed in every way: nothing lost, nothing doubled, nobody left."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from sqspipes_mp import BootError, Engine, RemoteError, RestartLimit, SQLite, Task
from tests.gates import (
    Background,
    Gate,
    Log,
    alive,
    charges,
    children,
    dead,
    direct_children,
    ended,
    engine_at,
    eventually,
    feed,
    file_of,
    kill,
    program,
    query,
    values,
    waiting,
)


def source():
    yield from ()


def sink(value):
    return value


def exit_0():
    os._exit(0)


def exit_3():
    os._exit(3)


def sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


def segfault():
    ctypes.string_at(0)


DEATHS = pytest.mark.parametrize("die", [exit_0, exit_3, sigkill, segfault], ids=lambda die: die.__name__)


def dies_once_at_5(value, log: Log, die: Callable[[], None]):
    log.note(value, os.getpid())
    if value == 5 and [number for number, _ in log.lines()].count(5) == 1:
        die()
    return value * 10


def stages(db: Path, work: Task, count: int, **settings: Any) -> Engine:
    # Some of these tests run the engine in a thread; what a fork does is what they are about.
    settings.setdefault("start_method", "fork")
    # What was being received at a death comes back when its lease ends.
    settings.setdefault("visibility_timeout", 2)
    engine = engine_at(db, [source, work, sink], **settings)
    feed(engine, "work", list(range(count)))
    return engine


@DEATHS
def test_a_workers_death_loses_and_doubles_nothing(db: Path, log: Log, die: Callable[[], None]) -> None:
    engine = stages(db, Task(dies_once_at_5, name="work", args=(log, die)), 30)
    summary = engine.run(only="work", until="drained", idle=0.0)
    assert sorted(values(engine, "sink")) == [10 * number for number in range(30)]
    # What was done but not yet sent away was done again; what was only held was not even begun.
    runs = Counter(number for number, _ in log.lines())
    assert runs[5] == 2
    assert set(runs.values()) <= {1, 2}
    assert (summary["work"].failed, summary["work"].retried, summary["work"].dead) == (1, 1, 0)
    assert len({pid for _, pid in log.lines()}) == 2


def always_dies_at_2(value, log: Log, die: Callable[[], None]):
    if value == 2:
        log.note(os.getpid())
        die()
    return value


@DEATHS
def test_a_message_that_kills_its_worker_is_dead_lettered_and_innocents_are_not_charged(
    db: Path, log: Log, die: Callable[[], None]
) -> None:
    engine = stages(db, Task(always_dies_at_2, name="work", args=(log, die), max_attempts=2), 20)
    summary = engine.run(only="work", until="drained", idle=0.0)
    assert sorted(values(engine, "sink")) == [number for number in range(20) if number != 2]
    [(body, failure)] = dead(engine, "work")
    assert '"value": 2' in body
    assert (failure.error, failure.stage, failure.attempts) == ("WorkerLost", "work", 2)
    assert failure.pid == log.lines()[-1]
    assert failure.source == "t-source"
    assert failure.host == socket.gethostname()
    if die is sigkill:
        assert failure.signal.startswith("SIGKILL")
    if die is segfault:
        assert failure.signal == "SIGSEGV"
        assert "segfault" in failure.stack
    if die is exit_3:
        assert "exit status 3" in failure.text
    assert (summary["work"].dead, len(log.lines())) == (1, 2)
    assert charges(engine).count(0) == 19


def held_at_0(value, log: Log, gate: Gate):
    log.note(value, os.getpid())
    if value == 0:
        gate.wait()
    return value


def test_what_a_killed_worker_held_comes_back_uncharged(
    db: Path, log: Log, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is charged waits as long as it may: it comes after the others.
    monkeypatch.setattr("random.uniform", lambda least, most: most)
    engine = stages(db, Task(held_at_0, name="work", args=(log, gate), prefetch=5), 8, visibility_timeout=8)
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        [(_, worker)] = log.wait_for(1)
        eventually(lambda: waiting(engine, "work")[1] > 1)
        kill(worker)
        # One was running and is charged; the others go on in the next worker while it waits.
        log.wait_for(8)
        gate.open()
    assert run.summary.reason == "drained"
    assert sorted(values(engine, "sink")) == list(range(8))
    assert (run.summary["work"].failed, run.summary["work"].retried) == (1, 1)


@pytest.mark.parametrize("kind", ["sqs", "sqlite"])
def test_what_a_killed_worker_held_comes_back_long_before_its_leases_end(
    request: pytest.FixtureRequest, db: Path, log: Log, gate: Gate, kind: str
) -> None:
    broker = request.getfixturevalue("sqs") if kind == "sqs" else SQLite(db)
    task = Task(held_at_0, name="work", args=(log, gate), prefetch=5, max_attempts=1)
    engine = Engine([source, task, sink], domain="t", broker=broker, visibility_timeout=60, start_method="fork")
    feed(engine, "work", [0])
    with Background(engine, only="work"):
        [(_, worker)] = log.wait_for(1)
        feed(engine, "work", range(1, 6))
        eventually(lambda: waiting(engine, "work") == (0, 6, 0), "all are held")
        killed = time.monotonic()
        kill(worker)
        begun = log.wait_for(6)
        # The shortest lease is 15 s; this is a restart's backoff of 0.5 s, and what a busy machine adds.
        assert time.monotonic() - killed < 12
        engine.stop()
    assert sorted(value for value, _ in begun) == list(range(6))


def test_killed_while_draining_its_message_comes_back(db: Path, log: Log, gate: Gate) -> None:
    engine = stages(db, Task(held_at_0, name="work", args=(log, gate)), 1)
    with Background(engine, only="work") as run:
        [(_, worker)] = log.wait_for(1)
        engine.stop()
        kill(worker)
    assert run.summary.reason == "stopped"
    # Charging and giving back are one step.
    assert charges(engine) == [1]


def dies_beside():
    """An ``init`` whose thread kills the worker once it is ready and idle."""

    def die():
        eventually(lambda: [thread for thread in threading.enumerate() if thread.name == "intake"])
        os._exit(9)

    threading.Thread(target=die, daemon=True).start()


def test_many_deaths_without_progress_are_a_restart_limit(db: Path) -> None:
    engine = stages(db, Task(sink, name="work", workers=10, init=dies_beside), 0)
    with pytest.raises(RestartLimit, match=r"stage 'work': 10 workers died .* exit status 9") as caught:
        engine.run(only="work")
    assert (caught.value.stage, caught.value.deaths) == ("work", 10)


# --- boot ---


class CannotBoot(Exception):
    pass


def init_raises():
    raise CannotBoot("no model")


def init_exits():
    sys.exit("no model")


def init_dies():
    os._exit(7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("init", "kind", "text"),
    [
        (init_raises, CannotBoot, "no model"),
        (init_exits, RemoteError, "SystemExit: no model"),
        (init_dies, BootError, "exit status 7"),
    ],
    ids=["raises", "sys.exit", "os._exit"],
)
def test_an_init_that_fails_ends_the_engine_with_its_own_error(
    db: Path, init: Callable[[], None], kind: type[BaseException], text: str
) -> None:
    # Five workers: five failures in a row at once, not after backing off.
    engine = stages(db, Task(sink, name="work", workers=5, init=init), 3)
    with pytest.raises(kind, match=text) as caught:
        engine.run(only="work")
    if isinstance(caught.value, BootError):
        # It was forked: no import and no guard can be the cause.
        assert str(caught.value).endswith("Look at what runs in setup and in init, and at the memory limit")
    else:
        names = []
        tb = caught.value.__traceback__
        while tb is not None:
            names.append(tb.tb_frame.f_code.co_name)
            tb = tb.tb_next
        assert init.__name__ in names
    assert waiting(engine, "work") == (3, 0, 0)


def setup_raises():
    raise CannotBoot("no logging")


def test_a_setup_that_fails_is_one_clear_error(db: Path) -> None:
    engine = stages(db, Task(sink, name="work"), 0, setup=setup_raises)
    with pytest.raises(CannotBoot, match="no logging"):
        engine.run(only="work")


def boots_at_the_third_try(log: Log):
    log.note(1)
    if len(log.lines()) < 3:
        raise CannotBoot(str(len(log.lines())))


class BuiltAtTheThirdTry:
    def __init__(self, log):
        boots_at_the_third_try(log)

    def __call__(self, value):
        return value


def test_a_boot_that_succeeds_in_the_end_is_no_error(db: Path, log: Log) -> None:
    engine = stages(db, Task(BuiltAtTheThirdTry, name="work", init_args=(log,)), 3)
    engine.run(only="work", until="drained", idle=0.0)
    assert sorted(values(engine, "sink")) == [0, 1, 2]


# --- the keeper ---


def hidden_until(engine: Engine) -> int:
    """Return the end of the latest lease in the file, ms of its own clock."""
    return query(file_of(engine), "SELECT max(visible_at) FROM messages")[0]


def wait_for_extensions(engine: Engine, count: int) -> None:
    for _ in range(count):
        before = hidden_until(engine)
        eventually(lambda before=before: hidden_until(engine) > before, "the lease is extended")  # type: ignore[misc]


@pytest.mark.slow
def test_a_message_that_runs_longer_than_its_lease_is_delivered_once(db: Path, log: Log, gate: Gate) -> None:
    engine = stages(db, Task(held_at_0, name="work", workers=2, args=(log, gate)), 1, visibility_timeout=4)
    with Background(engine, only="work", until="drained", idle=0.0):
        log.wait_for(1)
        # Each is by a half of it at least, so with the first lease they make three.
        wait_for_extensions(engine, 4)
        gate.open()
    assert len(log.lines()) == 1
    assert values(engine, "sink") == [0]


def note_pid(log: Log):
    log.note(os.getpid())


@pytest.mark.slow
def test_a_killed_keeper_is_replaced_and_no_lease_is_lost(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    workers = Log(str(tmp_path / "workers"))
    # The second worker would take the message, were its lease to end.
    work = Task(held_at_0, name="work", workers=2, args=(log, gate), init=partial(note_pid, workers))
    engine = stages(db, work, 1, visibility_timeout=5)
    with Background(engine, only="work", until="drained", idle=0.0):
        log.wait_for(1)
        for _ in range(2):
            [keeper] = set(direct_children()) - set(workers.wait_for(2))
            kill(keeper)
            eventually(lambda keeper=keeper: not alive(keeper))  # type: ignore[misc]
            wait_for_extensions(engine, 1)
        gate.open()
    assert len(log.lines()) == 1
    assert values(engine, "sink") == [0]


@pytest.mark.slow
def test_a_keeper_killed_while_draining_is_replaced(db: Path, log: Log, gate: Gate) -> None:
    engine = stages(db, Task(held_at_0, name="work", args=(log, gate)), 1, visibility_timeout=2)
    with Background(engine, only="work") as run:
        [(_, worker)] = log.wait_for(1)
        [keeper] = [pid for pid in direct_children() if pid != worker]
        engine.stop()
        kill(keeper)
        eventually(lambda: not alive(keeper))
        wait_for_extensions(engine, 2)
        gate.open()
    assert run.summary.reason == "stopped"
    assert len(log.lines()) == 1
    assert values(engine, "sink") == [0]


@pytest.mark.slow
def test_a_stopped_keeper_is_replaced(db: Path, log: Log, gate: Gate) -> None:
    engine = stages(db, Task(held_at_0, name="work", args=(log, gate)), 1, visibility_timeout=4)
    with Background(engine, only="work", until="drained", idle=0.0):
        [(_, worker)] = log.wait_for(1)
        [keeper] = [pid for pid in direct_children() if pid != worker]
        kill(keeper, signal.SIGSTOP)
        eventually(lambda: not alive(keeper))
        wait_for_extensions(engine, 2)
        gate.open()
    assert len(log.lines()) == 1


@pytest.mark.slow
def test_a_stopped_worker_whose_lease_is_kept_goes_on(db: Path, log: Log, gate: Gate) -> None:
    engine = stages(db, Task(held_at_0, name="work", args=(log, gate)), 1, visibility_timeout=2)
    with Background(engine, only="work", until="drained", idle=0.0):
        [(_, worker)] = log.wait_for(1)
        kill(worker, signal.SIGSTOP)
        wait_for_extensions(engine, 3)
        gate.open()
        kill(worker, signal.SIGCONT)
    assert len(log.lines()) == 1
    assert values(engine, "sink") == [0]


# --- the supervisor ---

SUPERVISED = """
import sys
from tests.process.test_deaths import *
db, log, gate, how = sys.argv[1:]
work = Task(held_at_0, name="work", workers=3, args=(Log(log), Gate(gate)))
engine = engine_at(db, [source, work, sink], start_method=how, visibility_timeout=2)
if __name__ == "__main__":
    engine.run(only="work")
"""


@pytest.mark.parametrize("how", ["fork", "forkserver", "spawn"])
def test_a_killed_supervisor_leaves_no_process(tmp_path: Path, db: Path, log: Log, gate: Gate, how: str) -> None:
    engine = stages(db, Task(held_at_0, name="work", args=(log, gate)), 4)
    with program(tmp_path, SUPERVISED, db, log.path, gate.path, how) as process:
        log.wait_for(4)
        below = eventually(lambda: len(found := psutil.Process(process.pid).children(recursive=True)) >= 4 and found)
        killed = time.monotonic()
        process.kill()
        eventually(lambda: not any(alive(child.pid) for child in below))
        assert time.monotonic() - killed < 20
    assert 0 in values(engine, "work")


def test_the_messages_of_a_killed_program_come_back_when_their_leases_end(
    tmp_path: Path, db: Path, log: Log, gate: Gate
) -> None:
    engine = stages(db, Task(held_at_0, name="work", args=(log, gate)), 4, visibility_timeout=2)
    with program(tmp_path, SUPERVISED, db, log.path, gate.path, "fork") as process:
        log.wait_for(4)
        process.kill()
        ended(process)
    gate.open()
    with Background(engine, only="work", until="drained", idle=0.0):
        pass
    assert sorted(values(engine, "sink")) == [0, 1, 2, 3]


def test_nobody_is_left_after_all_this() -> None:
    assert children() == []
