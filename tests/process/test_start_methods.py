"""The same promises where children are not forked: forkserver and spawn."""

import importlib.util
import json
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import ConfigError, Engine, SQLite, Task
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.supervisor import fresh
from sqspipes_mp.supervisor.fresh import unloadable
from tests.gates import ROOT, TIMEOUT, Gate, Log, drain, ended, engine_at, eventually, feed, program, values, waiting

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("helpers_of_multiprocessing")]

METHODS = pytest.mark.parametrize("method", ["forkserver", "spawn"])


def source():
    yield from range(20)


def sink(value):
    return value


class NeedsKeyword(Exception):
    def __init__(self, *, code):
        super().__init__(f"code {code}")
        self.code = code


def work(value, log: Log, act: str):
    log.note(value, os.getpid())
    if value == 5 and [number for number, _ in log.lines()].count(5) == 1:
        if act == "raise":
            raise NeedsKeyword(code=5)
        if act == "die":
            os._exit(3)
    return value


def pipeline(db: Path, log: Log, method: str, act: str = "", **settings: Any) -> Engine:
    tasks = [source, Task(work, workers=2, args=(log, act)), sink]
    return engine_at(db, tasks, start_method=method, **settings)


@METHODS
def test_a_pipeline_gives_every_value_once(db: Path, log: Log, method: str) -> None:
    summary = pipeline(db, log, method).run(until="drained")
    assert summary.reason == "drained"
    assert [stage.done for stage in summary.stages] == [20, 20, 20]
    assert sorted(value for value, _ in log.lines()) == list(range(20))


@METHODS
def test_iterating_gives_every_value_once(db: Path, log: Log, method: str) -> None:
    with pipeline(db, log, method).run(iterate=True, until="drained") as results:
        assert sorted(results) == list(range(20))


@METHODS
def test_an_exception_comes_back_as_itself(db: Path, log: Log, method: str) -> None:
    engine = pipeline(db, log, method, "raise")
    feed(engine, "work", [5])
    with pytest.raises(NeedsKeyword, match="code 5") as caught:
        engine.run(only="work")
    assert caught.value.code == 5
    assert waiting(engine, "work") == (1, 0, 0)


@METHODS
def test_a_workers_death_loses_and_doubles_nothing(db: Path, log: Log, method: str) -> None:
    engine = pipeline(db, log, method, "die", visibility_timeout=2)
    feed(engine, "work", list(range(10)))
    summary = drain(engine, "work")
    assert sorted(values(engine, "sink")) == list(range(10))
    assert summary["work"].failed == 1


@METHODS
def test_tasks_that_cannot_be_sent_are_a_config_error(db: Path, method: str) -> None:
    engine = engine_at(db, [source, Task(lambda value: value, name="work")], start_method=method)
    with pytest.raises(ConfigError, match="start_method"):
        engine.run()


def gated(value, gate: Gate, log: Log):
    log.note(value, os.getpid())
    gate.wait()
    return value


@METHODS
def test_stop_and_restart_lose_nothing(db: Path, log: Log, gate: Gate, method: str) -> None:
    engine = engine_at(db, [source, Task(gated, name="work", args=(gate, log)), sink], start_method=method)
    feed(engine, "work", [1, 2, 3])

    def stop() -> None:
        eventually(log.lines)
        engine.stop()
        gate.open()

    stopper = threading.Thread(target=stop)
    stopper.start()
    summary = engine.run(only="work")
    stopper.join()
    assert summary.reason == "stopped"
    assert waiting(engine, "work")[1:] == (0, 0)
    drain(engine, "work")
    assert sorted(values(engine, "sink")) == [1, 2, 3]


SCRIPT = """
import sys
from sqspipes_mp import Engine, Task, SQLite

class Odd(Exception):
    def __init__(self, *, code):
        super().__init__(code)
        self.code = code

def source():
    yield from range(5)

def work(value):
    if value == 3 and len(sys.argv) > 3:
        raise Odd(code=value)
    return value

def made():
    return Engine([source, Task(work)], domain="t", broker=SQLite(sys.argv[1]), start_method=sys.argv[2])

if __name__ == "__main__":
    try:
        with made().run(iterate=True, until="drained") as results:
            print(sorted(results))
    except Odd as error:
        print("odd", error.code, len(error.__notes__))
"""


@METHODS
@pytest.mark.parametrize("fails", [False, True], ids=["fine", "failing"])
def test_a_programs_own_functions_and_exceptions_work(tmp_path: Path, db: Path, method: str, fails: bool) -> None:
    with program(tmp_path, SCRIPT, db, method, *(["fail"] if fails else [])) as process:
        code, output, errors = ended(process)
    assert (code, output) == (0, "odd 3 2\n" if fails else "[0, 1, 2, 3, 4]\n"), errors


def note_setup(log: Log) -> None:
    log.note("setup", os.getpid())


@METHODS
def test_setup_runs_once_in_each_child(db: Path, log: Log, tmp_path: Path, method: str) -> None:
    setups = Log(str(tmp_path / "setups"))
    pipeline(db, log, method, setup=partial(note_setup, setups)).run(only="source")
    assert len(setups.lines()) == len(set(setups.lines())) == 2


def count(log: Log, *, up_to: int):
    eventually(lambda: sum(line[0] == "built" for line in log.lines()) == 2)
    yield from range(up_to)


def tell_env(log: Log) -> None:
    log.note("setup", os.environ.get("DEVICE"))


class Scale:
    def __init__(self, log: Log) -> None:
        self.log = log
        log.note("built", os.environ.get("DEVICE"), os.environ.get("OMP_NUM_THREADS"))

    def __call__(self, value, *, by: int = 1):
        return value * by

    def close(self) -> None:
        self.log.note("closed", os.environ.get("DEVICE"))


def double_all(values, *, plus: int):
    return [value * 2 + plus for value in values]


def device(index: int) -> dict[str, str]:
    return {"DEVICE": str(index), "OMP_NUM_THREADS": "7"}


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_keywords_and_an_environment_for_each_worker(db: Path, log: Log, method: str) -> None:
    tasks = [
        Task(count, args=(log,), kwargs={"up_to": 10}, env={"DEVICE": "none"}),
        Task(Scale, init_args=(log,), kwargs={"by": 10}, env=device, workers=2),
        Task(double_all, batch=4, batch_wait=0.05, kwargs={"plus": 1}),
    ]
    engine = engine_at(db, tasks, start_method=method, setup=partial(tell_env, log))
    with engine.run(iterate=True, until="drained") as results:
        assert sorted(results) == [value * 20 + 1 for value in range(10)]
    lines = log.lines()
    assert sorted(line[1] for line in lines if line[0] == "setup" and line[1]) == ["0", "1", "none"]
    assert sorted(line[1:] for line in lines if line[0] == "built") == [("0", "7"), ("1", "7")]
    assert sorted(line[1] for line in lines if line[0] == "closed") == ["0", "1"]
    assert "DEVICE" not in os.environ


UNGUARDED = """
import sys
from sqspipes_mp import Engine

def numbers():
    yield from range(3)

engine = Engine([numbers], domain="u", broker=f"sqlite:///{sys.argv[1]}", start_method=sys.argv[2])
print(list(engine.run(iterate=True)) if sys.argv[3] == "iterate" else engine.run())
"""


@pytest.mark.parametrize(("method", "how"), [("spawn", "run"), ("forkserver", "iterate")])
def test_a_program_without_its_guard_is_told_so(tmp_path: Path, db: Path, method: str, how: str) -> None:
    with program(tmp_path, UNGUARDED, db, method, how) as process:
        code, _, errors = ended(process)
    assert code == 1
    assert 'start the engine under if __name__ == "__main__":' in errors.splitlines()[-1]


_IN_A_PACKAGE = """
import threading
from functools import partial
from sqspipes_mp import Engine, Task
from sqspipes_mp.pipeline.plan import Settings
from sqspipes_mp.supervisor.fresh import unloadable
def square(n, more=0): return n * n + more
def ready(): pass
def judge(error, attempt): return "raise"
class Number(int): pass
if __name__ == "__main__":
    for options in (
        {"method": square}, {"method": partial(square, more=1)}, {"method": abs, "init": ready},
        {"method": abs, "exit": ready}, {"method": pow, "args": (Number(2),)}, {"method": abs, "on_error": judge},
    ):
        assert unloadable(Task(name="t", input=True, **options)), options
    assert unloadable(Settings(setup=ready))
    assert unloadable(Task(abs, input=True)) is None
    stop = threading.Event()
    threading.Thread(target=stop.wait, daemon=True).start()
    print(list(Engine([Task(partial(square, more=1), name="t", input=True)], domain="d", broker="sqlite://").map([3])))
    stop.set()
"""


@pytest.mark.parametrize("way", ["package", "text"])
def test_what_a_fresh_process_cannot_load_is_forked(tmp_path: Path, way: str) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__main__.py").write_text(_IN_A_PACKAGE)
    how = ["-m", "pkg"] if way == "package" else ["-c", _IN_A_PACKAGE]
    result = subprocess.run(
        [sys.executable, *how],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[10]\n"
    assert "forking although other threads are alive" in result.stderr
    assert "out of memory" not in result.stderr


def mode(value: int) -> list[str | None]:
    return [os.environ.get(name) for name in ("SQSPIPES_TEST_MODE", "OMP_NUM_THREADS")]


def test_a_run_with_fresh_processes_has_the_environment_of_its_own_start(
    db: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server: Any = multiprocessing.forkserver._forkserver
    before = (server._forkserver_pid, server._preload_modules)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("sqspipes_mp.supervisor.run._chosen.method", "fork")
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="tqdm_monitor")
    thread.start()
    try:
        for name in ("one", "two"):
            monkeypatch.setenv("SQSPIPES_TEST_MODE", name)
            engine = Engine([Task(mode, input=True)], domain="d", broker=SQLite(db))
            assert list(engine.map([1])) == [[name, str(cpus())]]
    finally:
        stop.set()
        thread.join()
    # The user's own is left as it was.
    assert (server._forkserver_pid, server._preload_modules) == before
    told = [text for text in caplog.messages if "fresh processes (forkserver)" in text]
    assert len(told) == 1
    assert "tqdm_monitor" in told[0]


def test_a_module_that_is_not_on_the_path_of_a_fresh_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("def double(n): return 2 * n\n")
    spec = importlib.util.spec_from_file_location("only_here", tmp_path / "only_here.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["only_here"] = module
    try:
        spec.loader.exec_module(module)
        assert "only_here" in (unloadable(module.double) or "")
        assert unloadable((json.dumps, Task(mode, input=True), SQLite("x.db"))) is None
    finally:
        del sys.modules["only_here"]


@pytest.mark.parametrize("changed", [False, True], ids=["the same environment", "another environment"])
def test_a_spare_forkserver_that_the_host_has_reaped_is_replaced(
    db: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    engine = Engine([Task(abs, name="work", input=True)], domain="t", broker=SQLite(db), start_method="forkserver")
    for value in (1, 2):
        engine.put(value)
        assert engine.run(until="drained", idle=0.0)["work"].done == 1
        server: Any = fresh._spare._server
        pid = server._forkserver_pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if changed:
            monkeypatch.setenv("CHANGED", str(value))
    engine.put(3)
    assert engine.run(until="drained", idle=0.0)["work"].done == 1
