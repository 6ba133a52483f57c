"""ps, top, stack, stop and health as people and probes use them: programs that look at another program."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

import sqspipes_mp
from sqspipes_mp.cli.health import main as health
from sqspipes_mp.cli.main import main
from sqspipes_mp.ipc.running.folders import engines
from tests.gates import ROOT, Gate, Log, ended, eventually, kill

WORDS = """
import ctypes, sys
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.cli.health import main as health
from sqspipes_mp.cli.main import main
from tests.gates import Gate, Log
gate, log = Gate(sys.argv[-2]), Log(sys.argv[-1])

def work(value):
    log.note(value)
    if value == "deaf":
        ctypes.PyDLL(None).usleep(300_000_000)
    gate.wait()
    return value

engine = Engine([Task(work, input=True, workers=2)], domain="looked", broker=SQLite("w.db"))

if __name__ == "__main__":
    engine.put_many(sys.argv[1].split(","))
    engine.run()
"""


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run commands in this process: loading the command line takes longer than what they do."""
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(tmp_path / "registry"))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*args: object) -> Done:
        out, err = io.StringIO(), io.StringIO()
        command = health if args[0] == "health" else main
        words = list(map(str, args[1:] if command is health else args))
        with redirect_stdout(out), redirect_stderr(err):
            code = command(words)
        return Done(code, out.getvalue(), err.getvalue())

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


@contextmanager
def running(folder: Path, gate: Gate, log: Log, values: str, **more: str) -> Iterator["subprocess.Popen[str]"]:
    (folder / "words.py").write_text(WORDS)
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "words.py", values, gate.path, log.path],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), **more},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.kill)
        log.wait_for(2)
        yield process


def test_people_look_at_an_engine_that_they_did_not_start_and_stop_it(
    cli: Cli, tmp_path: Path, gate: Gate, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("ps", "--json").out == "[]\n"
    assert cli("health").code == 1
    nobody = cli("top", "--once")
    assert nobody.code == 1
    assert "no engine of this user runs here" in nobody.err
    with running(tmp_path, gate, log, "one,two") as process:
        eventually(lambda: cli("health", "looked", "--ready").code == 0, "it is ready")
        (row,) = json.loads(cli("ps", "--json").out)
        assert (row["pid"], row["domain"], row["workers"], row["live"]) == (process.pid, "looked", 2, True)
        assert "looked" in cli("ps", "looked").out
        assert "Did you mean 'looked'?" in cli("ps", "loked").err
        seen = json.loads(cli("top", process.pid, "--json").out)
        assert seen["format"] == 1
        assert [len(worker["calls"]) for worker in seen["workers"]] == [1, 1]
        assert all(worker["memory"] > 0 for worker in seen["workers"])
        (stage,) = seen["stages"]
        assert (stage["running"], stage["busy"]) == (2, pytest.approx(1, abs=0.3))
        text = cli("top", "looked", "--once").out
        assert seen["workers"][0]["calls"][0]["id"][:12] in text
        assert max(map(len, text.splitlines())) < 120
        assert "CPUs " in text or "1 CPU " in text
        # Where one task runs it need not be named.
        told = cli("stack", "--worker", 0)
        assert (told.code, told.out.count("gate.wait()")) == (0, 1)
        assert "no engine 'other' runs here" in cli("stop", "other").err
        assert cli("stack", "--stage", "none").code == 2
        with monkeypatch.context() as elsewhere:
            # As from another container that shares the folder: pids mean others, and its engines are its own probes'.
            elsewhere.setattr("sqspipes_mp.ipc.running.folders.pid_namespace", lambda: 1)
            assert "no engine runs here" in cli("health").out
            assert cli("health", "looked").code == 0
            assert json.loads(cli("top", "--json").out)["stages"][0]["running"] == 2
        stopped = cli("stop")
        assert (stopped.code, "it is stopping" in stopped.err) == (0, True)
        gate.open()
        assert ended(process)[0] == 0
    assert cli("health").code == 1


def test_an_engine_elsewhere_is_looked_at_and_asked_through_its_own_server(
    cli: Cli, tmp_path: Path, gate: Gate, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("a token\n")
    served = {"SQSPIPES_HTTP": "127.0.0.1:0", "SQSPIPES_HTTP_TOKEN_FILE": str(tmp_path / "token")}
    with running(tmp_path, gate, log, "one,two", **served) as process:
        eventually(lambda: [engine for engine in engines() if engine.text("http")], "it serves")
        url = f"http://{engines()[0].text('http')}"
        # As on another machine: nothing of the engine is here but its address.
        monkeypatch.setenv("SQSPIPES_RUN_DIR", "off")
        eventually(lambda: cli("health", url, "--ready").code == 0, "it is ready")
        assert cli("health", url).out == f"{url}: every stage is ready\n"

        seen = cli("top", url, "--json")
        assert "numbers only" in seen.err
        state = json.loads(seen.out)
        assert (state["stages"][0]["running"], state["engine"]["pid"]) == (2, None)
        assert [(worker["pid"], worker["calls"][0]["id"]) for worker in state["workers"]] == [(None, "")] * 2
        assert "work[1]" in cli("top", url, "--once").out
        for order in (["stop"], ["stack", "--stage", "work"], ["pause", "--stage", "work"], ["cancel", "0123"]):
            refused = cli(order[0], url, *order[1:])
            assert (refused.code, "set SQSPIPES_HTTP_TOKEN" in refused.err) == (1, True)
        monkeypatch.setenv("SQSPIPES_HTTP_TOKEN", "a guess")
        assert "this is not the token" in cli("top", url, "--once").err

        monkeypatch.setenv("SQSPIPES_HTTP_TOKEN", "a token")
        seen = cli("top", url, "--json")
        assert "numbers only" not in seen.err
        state = json.loads(seen.out)
        assert state["engine"]["pid"] == process.pid
        assert state["stages"][0]["busy"] is not None
        call = state["workers"][0]["calls"][0]["id"]
        assert call[:12] in cli("top", url, "--once").out
        assert cli("stack", url, "--stage", "work").out.count("gate.wait()") == 2
        paused = cli("pause", url, "--stage", "work")
        assert (paused.code, f"{url}: work is paused" in paused.err) == (0, True), paused.err
        named = f"{url}/?engine=looked"
        assert f"sqspipes-mp resume {named} --stage work" in cli("top", named, "--once").out.replace("\n  ", " ")
        for order, said in (
            (["resume", url, "--stage", "work"], "work goes on"),
            (["scale", url, "work=3"], "work: 3 workers, 2 before"),
            (["cancel", url, call], "is cancelled"),
        ):
            done = cli(*order)
            assert (done.code, said in done.err) == (0, True), done.err
        assert "no call 0000 runs here" in cli("cancel", url, "0000").err
        assert cli("stop", url).code == 0
        gate.open()
        assert ended(process)[0] == 0
    gone = cli("health", url)
    assert (gone.code, gone.out.startswith(f"no answer from {url}: ")) == (1, True)
    assert f"no answer from {url}" in cli("top", url, "--once").err
    assert "is http://HOST:PORT, not" in cli("top", "http://me:secret@host", "--once").err


def test_a_worker_whose_gil_is_held_is_asked_by_a_signal_and_counts_as_live(
    cli: Cli, tmp_path: Path, gate: Gate, log: Log
) -> None:
    with running(tmp_path, gate, log, "deaf,two") as process:
        gate.open()
        silent = cli("stack", "--stage", "work")
        assert silent.code == 1
        assert "--signal" in silent.out
        healthy = cli("health", "--ready")
        assert healthy.code == 0, healthy.out
        told = cli("stack", "--stage", "work", "--signal")
        assert (told.code, "in work" in told.out) == (0, True)
        # The stack of a person who asked is no late call: nothing was killed, nothing failed.
        (stage,) = json.loads(cli("top", "--json").out)["stages"]
        assert (stage["failed"], stage["restarts"]["timeout"]) == (0, 0)
        # A supervisor that stands still is looked at all the same.
        kill(process.pid, 19)
        assert json.loads(cli("top", "--json").out)["engine"]["domain"] == "looked"
        kill(process.pid, 18)


def test_a_probes_program_loads_nothing_heavy(cli: Cli, tmp_path: Path, gate: Gate, log: Log) -> None:
    with running(tmp_path, gate, log, "one,two"):
        heavy = "json re typing dataclasses argparse socket logging pathlib botocore sqspipes_mp.engine"
        code = (
            "import sys; sys.argv = ['', 'health', 'looked']; from sqspipes_mp.__main__ import main; code = main();"
            f"print(code, *sorted(set(sys.modules) & set({heavy!r}.split())))"
        )
        clean = subprocess.run(
            # Without site: what the environment loads is not health's doing.
            [sys.executable, "-S", "-c", code],
            env={**os.environ, "PYTHONPATH": str(Path(sqspipes_mp.__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert clean.stdout.splitlines()[-1] == "0"
        gate.open()
