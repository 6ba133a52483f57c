"""SIGTERM, SIGINT, ``stop()`` and the grace they leave; what the caller's process looks like afterwards."""

import ctypes
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import Engine, Task
from tests.gates import (
    Gate,
    Log,
    alive,
    charges,
    children,
    direct_children,
    ended,
    engine_at,
    eventually,
    feed,
    program,
    values,
    waiting,
)


def source():
    yield from ()


def sink(value):
    return value


def gated(value, log: Log, gate: Gate):
    log.note("begin", value)
    if value == 0:
        gate.wait()
    log.note("end", value)
    return value


def pipeline(db: Path, log: Log, gate: Gate, **settings: Any) -> Engine:
    return engine_at(db, [source, Task(gated, name="work", args=(log, gate)), sink], **settings)


PROGRAM = """
import json, sys
from tests.process.test_shutdown import *
db, log, gate, settings = sys.argv[1:]
log = Log(log)
engine = pipeline(db, log, Gate(gate), **json.loads(settings))
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
log.note("start", 0)
try:
    summary = engine.run(only="work")
    print(summary.reason, summary["work"].done)
finally:
    now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        # One more may be on its way.
        signal.signal(number, signal.SIG_IGN)
    assert now == before
    assert signal.set_wakeup_fd(-1) == -1
    assert children() == []
"""


def ends(log: Log) -> list[int]:
    return [value for word, value in log.lines() if word == "end"]


def unexpected(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if not line.startswith("stopping (SIG")]


def begun(log: Log) -> bool:
    return ("begin", 0) in log.lines()


def test_sigterm_finishes_what_runs_and_gives_the_rest_back(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    engine = pipeline(db, log, gate)
    feed(engine, "work", range(20))
    with program(tmp_path, PROGRAM, db, log.path, gate.path, "{}") as process:
        eventually(lambda: begun(log))
        process.terminate()
        gate.open()
        code, output, errors = ended(process)
    assert (code, unexpected(errors)) == (0, [])
    done = ends(log)
    assert output == f"SIGTERM {len(done)}\n"
    assert 0 in done
    assert sorted(values(engine, "sink")) == sorted(done)
    assert sorted([*values(engine, "work"), *done]) == list(range(20))
    assert waiting(engine, "work") == (20 - len(done), 0, 0)
    assert set(charges(engine)) == {0}


def test_sigint_drains_and_raises_keyboard_interrupt(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    engine = pipeline(db, log, gate)
    feed(engine, "work", range(5))
    with program(tmp_path, PROGRAM, db, log.path, gate.path, "{}") as process:
        eventually(lambda: begun(log))
        process.send_signal(signal.SIGINT)
        gate.open()
        code, output, errors = ended(process)
    assert code == -signal.SIGINT
    assert output == ""
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert 0 in ends(log)
    assert waiting(engine, "work")[1:] == (0, 0)
    assert sorted([*values(engine, "work"), *values(engine, "sink")]) == list(range(5))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_second_signal_kills_what_still_runs(
    tmp_path: Path, db: Path, log: Log, gate: Gate, number: signal.Signals
) -> None:
    engine = pipeline(db, log, gate)
    feed(engine, "work", [0])
    with program(tmp_path, PROGRAM, db, log.path, gate.path, "{}") as process:
        eventually(lambda: begun(log))
        # The keeper has a second to give the message back.
        workers = direct_children(process.pid)[1:]
        process.send_signal(number)
        # Two at once may arrive as one: send until they are all gone.
        eventually(lambda: not any(map(alive, workers)) or process.send_signal(number))
        code, output, errors = ended(process)
    assert f"stopping ({number.name}): calls that run (1) have 25 s to end; a second signal kills them" in errors
    assert (code, output) == ((0, "SIGTERM 0\n") if number is signal.SIGTERM else (-signal.SIGINT, ""))
    assert not any(map(alive, workers))
    assert ends(log) == []
    # A keeper that is killed for being late leaves it to the end of its lease.
    eventually(lambda: waiting(engine, "work") == (1, 0, 0), "it is back")
    assert charges(engine) == [0]


def test_signals_sent_together_count_as_one(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    engine = pipeline(db, log, gate)
    feed(engine, "work", [0])
    patient = "from sqspipes_mp.supervisor import stop_requests\nstop_requests.SECOND_AFTER = 60.0\n" + PROGRAM
    with program(tmp_path, patient, db, log.path, gate.path, "{}") as process:
        eventually(lambda: begun(log))
        # As GNU timeout does, to the process and to its group; many, because two at once may arrive as one.
        for _ in range(50):
            process.terminate()
            os.sched_yield()
        gate.open()
        assert ended(process)[:2] == (0, "SIGTERM 1\n")
    assert ends(log) == [0]
    assert (waiting(engine, "work"), values(engine, "sink")) == ((0, 0, 0), [0])


def test_a_call_longer_than_the_grace_is_cut_and_not_charged(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    engine = pipeline(db, log, gate)
    feed(engine, "work", [0])
    with program(tmp_path, PROGRAM, db, log.path, gate.path, '{"shutdown_grace": 0.3}') as process:
        eventually(lambda: begun(log))
        process.terminate()
        assert ended(process)[:2] == (0, "SIGTERM 0\n")
    assert ends(log) == []
    assert waiting(engine, "work") == (1, 0, 0)
    assert charges(engine) == [0]


def test_a_signal_while_the_workers_boot_ends_cleanly(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    engine = pipeline(db, log, gate)
    feed(engine, "work", [1, 2])
    with program(tmp_path, PROGRAM, db, log.path, gate.path, "{}") as process:
        # The keeper is the first child.
        eventually(lambda: children(process.pid))
        process.terminate()
        code, _, errors = ended(process)
    assert (code, unexpected(errors)) == (0, [])
    assert sorted([*values(engine, "work"), *values(engine, "sink")]) == [1, 2]
    assert waiting(engine, "work")[1:] == (0, 0)


def test_an_idle_engine_stops_at_once(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    pipeline(db, log, gate)
    with program(tmp_path, PROGRAM, db, log.path, gate.path, "{}") as process:
        eventually(lambda: len(children(process.pid)) == 2)
        process.terminate()
        assert ended(process) == (0, "SIGTERM 0\n", "")


def test_signals_to_the_children_are_ignored(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    engine = pipeline(db, log, gate)
    feed(engine, "work", [0, 1, 2])
    with program(tmp_path, PROGRAM, db, log.path, gate.path, "{}") as process:
        eventually(lambda: begun(log))
        for child in children(process.pid):
            for number in (signal.SIGINT, signal.SIGTERM):
                child.send_signal(number)
        gate.open()
        eventually(lambda: sorted(ends(log)) == [0, 1, 2])
        assert process.poll() is None
        process.terminate()
        code, output, errors = ended(process)
    assert (code, output, unexpected(errors)) == (0, "SIGTERM 3\n", [])
    assert sorted(values(engine, "sink")) == [0, 1, 2]


def on_sigterm(number: int, frame: object) -> None:
    raise AssertionError("the caller's handler ran")


def test_stop_from_a_thread_drains(db: Path, log: Log, gate: Gate) -> None:
    # Forked in spite of the thread: it is what is being tested.
    engine = pipeline(db, log, gate, start_method="fork")
    feed(engine, "work", range(3))

    def stop() -> None:
        eventually(lambda: begun(log))
        engine.stop()
        gate.open()

    old = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        thread = threading.Thread(target=stop)
        thread.start()
        summary = engine.run(only="work")
        thread.join()
        assert signal.getsignal(signal.SIGTERM) is on_sigterm
    finally:
        signal.signal(signal.SIGTERM, old)
    assert summary.reason == "stopped"
    assert waiting(engine, "work")[1:] == (0, 0)
    assert sorted([*values(engine, "work"), *values(engine, "sink")]) == [0, 1, 2]


@pytest.mark.usefixtures("helpers_of_multiprocessing")
def test_off_the_main_thread_no_signal_handler_is_touched(db: Path, log: Log, gate: Gate) -> None:
    engine = pipeline(db, log, gate)
    feed(engine, "work", range(3))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(engine.run(only="work", until="drained", idle=0.0)))
    thread.start()
    eventually(lambda: begun(log))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    gate.open()
    thread.join()
    assert [summary.reason for summary in summaries] == ["drained"]
    assert sorted(values(engine, "sink")) == [0, 1, 2]


def test_two_engines_run_in_two_threads_at_once(tmp_path: Path, log: Log, gate: Gate) -> None:
    gate.open()
    engines = [pipeline(tmp_path / f"{n}.db", log, gate, start_method="fork") for n in range(2)]
    for engine in engines:
        feed(engine, "work", range(20))
    threads = [
        threading.Thread(target=engine.run, kwargs={"only": "work", "until": "drained", "idle": 0.0})
        for engine in engines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine in engines:
        assert sorted(values(engine, "sink")) == list(range(20))


def test_unpicklable_tasks_beside_another_thread_fork_with_a_warning(
    db: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    lock = threading.Lock()
    engine = engine_at(db, [source, Task(lambda value: (lock.locked(), value)[1], name="work"), sink])
    feed(engine, "work", [1, 2])
    other = threading.Thread(target=gate.wait, name="the other one")
    other.start()
    engine.run(only="work", until="drained", idle=0.0)
    gate.open()
    other.join()
    assert sorted(values(engine, "sink")) == [1, 2]
    [warning] = [record.getMessage() for record in caplog.records if "forking although" in record.getMessage()]
    assert "the other one" in warning
    assert "pickle" in warning


def test_stop_without_a_run_does_nothing(db: Path, log: Log, gate: Gate) -> None:
    engine = pipeline(db, log, gate)
    engine.stop()
    feed(engine, "work", [1])
    assert engine.run(only="work", until="drained", idle=0.0).reason == "drained"


def test_a_wakeup_descriptor_of_the_callers_comes_back(db: Path, log: Log, gate: Gate) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    try:
        engine = pipeline(db, log, gate)
        feed(engine, "work", [1])
        engine.run(only="work", until="drained", idle=0.0)
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


IMPORTED = """
import os, sys, threading
import psutil
before = sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("."))
from sqspipes_mp import Engine, Task

def source(): yield 1
def work(value): return value

engine = Engine([source, Task(work, workers="auto")])
assert engine.domain == "program"
assert (sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("."))) == before
assert psutil.Process().children() == [] and threading.active_count() == 1
print(sorted(name for name in sys.modules if name.split(".")[0] in {"boto3", "botocore"}))
print(type(engine.broker).__name__)
"""


def test_building_an_engine_touches_nothing(tmp_path: Path) -> None:
    names = {"AWS_PROFILE": "nobody", "AWS_REGION": "eu-west-1", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    old = dict(os.environ)
    os.environ.update(names)
    try:
        with program(tmp_path, IMPORTED) as process:
            code, output, errors = ended(process)
    finally:
        os.environ.clear()
        os.environ.update(old)
    assert (code, output.splitlines()) == (0, ["[]", "SQLite"]), errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program.py"]


def test_a_program_of_one_file_is_a_pipeline(tmp_path: Path) -> None:
    text = IMPORTED.split("engine =", maxsplit=1)[0] + 'print(Engine([source, work]).run(until="drained").reason)'
    with program(tmp_path, text) as process:
        code, output, _ = ended(process)
    assert (code, output) == (0, "drained\n")
    assert (tmp_path / "program.db").exists()


HOST = """
import sys
from tests.process.test_shutdown import *
db, log, gate, how = sys.argv[1:]
log = Log(log)
engine = pipeline(db, log, Gate(gate))
def stopping(number, frame):
    print("host", signal.Signals(number).name, ends(log) != [], flush=True)
def alarm(number, frame):
    raise TimeoutError("host")
signal.signal(signal.SIGTERM, stopping)
signal.signal(signal.SIGALRM, alarm)
signal.signal(signal.SIGINT, signal.SIG_IGN)
if how == "iterate":
    for _ in engine.run(only="work", iterate=True): pass
    print("over")
else:
    end = {"until": "drained", "idle": 0} if how == "drained" else {}
    print(engine.run(only="work", **end).reason)
assert signal.getsignal(signal.SIGTERM) is stopping
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""


@pytest.mark.parametrize(("how", "last"), [("run", "SIGTERM"), ("iterate", "over")])
def test_the_hosts_own_handler_of_sigterm_is_called_after_the_drain(
    tmp_path: Path, db: Path, log: Log, gate: Gate, how: str, last: str
) -> None:
    feed(pipeline(db, log, gate), "work", range(3))
    with program(tmp_path, HOST, db, log.path, gate.path, how) as process:
        eventually(lambda: begun(log))
        process.terminate()
        gate.open()
        code, output, errors = ended(process)
    assert code == 0, errors
    assert output.split("\n") == ["host SIGTERM True", last, ""]


def test_a_sigint_that_was_ignored_stays_ignored(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    feed(pipeline(db, log, gate), "work", range(3))
    with program(tmp_path, HOST, db, log.path, gate.path, "drained") as process:
        eventually(lambda: begun(log))
        process.send_signal(signal.SIGINT)
        gate.open()
        code, output, errors = ended(process)
    assert (code, output) == (0, "drained\n"), errors


def test_an_exception_of_a_handler_of_the_host_gives_back_what_is_held(
    tmp_path: Path, db: Path, log: Log, gate: Gate
) -> None:
    engine = pipeline(db, log, gate)
    feed(engine, "work", range(20))
    with program(tmp_path, HOST, db, log.path, gate.path, "run") as process:
        eventually(lambda: begun(log))
        process.send_signal(signal.SIGALRM)
        code, _, errors = ended(process)
    assert code == 1
    assert "TimeoutError: host" in errors
    assert waiting(engine, "work")[1:] == (0, 0)
    assert sorted([*values(engine, "work"), *ends(log)]) == list(range(20))
    assert set(charges(engine)) == {0}


def reads_in_c(_value: int) -> int:
    reads, writes = os.pipe()
    main = threading.get_native_id()

    def signalled() -> None:
        state = Path(f"/proc/self/task/{main}/stat")
        # Until the main thread waits in read(2).
        eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "S")
        os.kill(os.getpid(), signal.SIGTERM)
        os.write(writes, b"x")

    thread = threading.Thread(target=signalled)
    thread.start()
    got: int = ctypes.CDLL(None).read(reads, ctypes.create_string_buffer(1), 1)
    thread.join()
    return got


def test_a_signal_to_a_worker_does_not_cut_a_system_call_of_c_code(db: Path) -> None:
    engine = engine_at(db, [Task(reads_in_c, input=True)], start_method="fork")
    assert list(engine.map([1] * 5)) == [1] * 5
