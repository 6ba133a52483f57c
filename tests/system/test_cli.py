"""The command line as people and scripts use it: real programs, real SQLite files."""

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import __version__
from tests.gates import ROOT, TIMEOUT, Log, children, ended

WORDS = """
import os, sys, time
from sqspipes_mp import Engine, Task

def numbers():
    yield from range(5)

def endless():
    return 1

def lasting():
    while True:
        yield 1
        time.sleep(0.01)

def double(value):
    return 2 * value

def fails(value):
    raise ValueError("no luck")

def exits(value):
    sys.exit(0)

def interrupts(value):
    raise KeyboardInterrupt

def breaks():
    raise OSError("no model")

def tell(value):
    # One write: what several workers print in pieces may mix.
    os.write(1, f"value {value}\\n".encode())

db = "sqlite:///w.db"
engine = Engine([numbers, Task(double, workers=2), tell], broker=db)
failing = Engine([numbers, fails], domain="failing", broker=db)
stubborn = Engine([numbers, fails], domain="stubborn", broker=db, on_error="raise")
exiting = Engine([numbers, exits], domain="exiting", broker=db)
interrupting = Engine([numbers, interrupts], domain="interrupting", broker=db)
without_queues = Engine([numbers, tell], domain="none", broker=db, create_queues=False)
bad_setup = Engine([numbers, tell], domain="setup", broker=db, setup=breaks)
bad_init = Engine([numbers, Task(tell, init=breaks)], domain="init", broker=db)
endless = Engine([Task(endless, interval=0.01), tell], domain="endless", broker=db)
with_an_end = Engine([lasting, tell], domain="lasting", broker=db)
anywhere = Engine([numbers, tell], domain="anywhere")
spawning = Engine([numbers, tell], domain="spawning", broker=db, start_method="spawn")

def make():
    return Engine([numbers, tell], domain="made", broker=db)
"""

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "words.py").write_text(WORDS)
    return tmp_path


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "sqspipes_mp", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


@pytest.fixture
def cli(folder: Path) -> Cli:
    def run(*args: object, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command(*args),
            cwd=folder,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    return run


@contextlib.contextmanager
def started(folder: Path, *args: object) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        command(*args),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def values(result: "subprocess.CompletedProcess[str]") -> list[int]:
    return sorted(int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("value"))


def status(cli: Cli, target: str, *args: object) -> dict[str, Any]:
    result = cli("status", target, "--json", *args)
    assert result.returncode == 0, result.stderr
    stages = json.loads(result.stdout)["stages"]
    return {stage["name"]: (stage["waiting"], stage["in_flight"], stage["dead"]) for stage in stages}


# --- run ---


@pytest.mark.parametrize("target", ["words:engine", "./words.py:engine"])
def test_a_drained_run_is_done(cli: Cli, target: str) -> None:
    result = cli("run", target, "--until", "drained", "--log-level", "critical")
    assert (result.returncode, values(result)) == (0, [0, 2, 4, 6, 8])
    lines = result.stderr.splitlines()
    assert [line.split()[:6] for line in lines[4:]] == [
        ["numbers", "1", "5", "0", "0", "0"], ["double", "2", "5", "0", "0", "0"], ["tell", "1", "5", "0", "0", "0"],
    ]  # fmt: skip
    assert "drained after" in lines[1]
    assert lines[3].split() == ["stage", "workers", "done", "failed", "dead", "retried", "busy", "p50", "p95"]
    for part in ("words on", "w.db", "numbers x1, double x2, tell x1"):
        assert part in lines[0]


def test_start_and_end_are_told_once_and_the_choice_of_the_broker_before_them(cli: Cli, folder: Path) -> None:
    result = cli("run", "words:anywhere", "--until", "drained")
    assert (result.returncode, values(result)) == (0, [0, 1, 2, 3, 4])
    lines = result.stderr.splitlines()
    assert "no broker was chosen" in lines[0]
    assert sum("anywhere on SQLite" in line for line in lines) == 1
    assert sum("drained after" in line or "stopped (" in line for line in lines) == 1
    assert (folder / "anywhere.db").exists()


def test_a_function_may_return_the_engine(cli: Cli) -> None:
    result = cli("run", "words:make", "--until", "drained")
    assert (result.returncode, values(result)) == (0, [0, 1, 2, 3, 4])


def test_spawned_workers_find_the_module(cli: Cli) -> None:
    result = cli("run", "words:spawning", "--until", "drained")
    assert (result.returncode, values(result)) == (0, [0, 1, 2, 3, 4])


def test_some_tasks_run_here_and_others_there(cli: Cli) -> None:
    source = cli("run", "words:engine", "--only", "numbers")
    assert (source.returncode, values(source)) == (0, [])
    assert status(cli, "words:engine")["double"] == (5, 0, 0)


def test_every_flag_has_its_variable(cli: Cli, folder: Path) -> None:
    variables = {
        "SQSPIPES_ONLY": "numbers,tell",
        "SQSPIPES_WORKERS": "tell=3",
        "SQSPIPES_BROKER": "sqlite:///elsewhere.db",
        "SQSPIPES_UNTIL": "drained",
        "SQSPIPES_IDLE": "0",
        "SQSPIPES_LOG_FORMAT": "json",
        "SQSPIPES_LOG_LEVEL": "debug",
    }
    result = cli("run", "words:anywhere", **variables)
    assert (result.returncode, values(result)) == (0, [0, 1, 2, 3, 4])
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert all({"time", "level", "logger", "message", "pid"} <= line.keys() for line in lines)
    assert any("elsewhere.db: numbers x1, tell x3" in line["message"] for line in lines)
    assert not (folder / "anywhere.db").exists()


def test_the_code_s_broker_wins_over_the_variable_and_the_flag_over_the_code(cli: Cli, folder: Path) -> None:
    told = cli("run", "words:make", "--until", "drained", SQSPIPES_BROKER="sqlite:///other.db").stderr
    assert told.count("SQSPIPES_BROKER is set and has no effect") == 1
    assert (folder / "w.db").exists()
    assert not (folder / "other.db").exists()
    flag = ("--broker", "sqlite:///other.db")
    told = cli("run", "words:make", "--until", "drained", *flag, SQSPIPES_BROKER="sqlite:///no.db").stderr
    assert "SQSPIPES_BROKER" not in told
    assert (folder / "other.db").exists()


def test_a_task_s_exception_is_shown_and_told_by_the_exit_code(cli: Cli) -> None:
    result = cli("run", "words:failing", "--until", "drained")
    assert result.returncode == 1
    assert 'raise ValueError("no luck")' in result.stderr
    assert "in stage 'fails'" in result.stderr
    assert "cli/run.py" not in result.stderr
    assert "--on-error" in result.stderr.splitlines()[-1]
    assert status(cli, "words:failing")["fails"] == (5, 0, 0)


def test_a_failure_is_one_json_object_too(cli: Cli) -> None:
    result = cli("run", "words:failing", "--until", "drained", "--log-format", "json")
    last = json.loads(result.stderr.splitlines()[-1])
    assert (result.returncode, last["level"]) == (1, "ERROR")
    assert "ValueError: no luck" in last["exc"]


def test_the_command_that_a_failed_run_names_finishes_only_what_is_left(cli: Cli, folder: Path) -> None:
    """Run again as it was, the source would make everything once more; the same is told where it begins."""
    broker = f"sqlite:///{folder}/other file.db"
    failed = cli("run", "words:failing", "--until", "drained", "--broker", broker)
    named = re.search(r"sqspipes-mp (run .* --idle 1)", failed.stderr.splitlines()[-1])
    assert named is not None
    words = shlex.split(named[1])
    assert words == [
        "run", "words:failing", "--broker", broker, "--only", "fails", "--until", "drained", "--idle", "1",
    ]  # fmt: skip
    program = folder / "words.py"
    program.write_text(program.read_text().replace('raise ValueError("no luck")', "tell(value)"))
    finished = cli(*words)
    assert (finished.returncode, values(finished)) == (0, [0, 1, 2, 3, 4])
    assert "earlier run" not in finished.stderr


def test_where_a_source_begins_among_what_an_earlier_run_left_the_other_run_is_named(cli: Cli) -> None:
    cli("run", "words:failing")
    again = cli("run", "words:failing")
    told = [line for line in again.stderr.splitlines() if "WARNING" in line and "earlier run" in line]
    assert len(told) == 1
    assert "--only fails --until drained --idle 1" in told[0]


@pytest.mark.parametrize("target", ["words:exiting", "words:interrupting"])
def test_a_task_that_ends_the_program_has_failed(cli: Cli, target: str) -> None:
    assert cli("run", target, "--until", "drained").returncode == 1


def test_drained_with_dead_letters_is_a_failure(cli: Cli) -> None:
    result = cli("run", "words:failing", "--until", "drained", "--on-error", "reject")
    assert result.returncode == 5
    assert "fails 5" in result.stderr.splitlines()[-1]
    assert status(cli, "words:failing")["fails"] == (0, 0, 5)


def test_on_error_of_the_environment_gives_way_to_the_code(cli: Cli) -> None:
    cli("run", "words:failing", "--until", "drained", SQSPIPES_ON_ERROR="reject")
    cli("run", "words:stubborn", "--until", "drained", SQSPIPES_ON_ERROR="reject")
    assert status(cli, "words:failing")["fails"] == (0, 0, 5)
    assert status(cli, "words:stubborn")["fails"] == (5, 0, 0)


@pytest.mark.parametrize("target", ["words:without_queues", "words:bad_setup"])
def test_an_engine_that_cannot_start_is_a_boot_failure(cli: Cli, target: str) -> None:
    assert cli("run", target).returncode == 3


@pytest.mark.slow
def test_an_init_that_fails_is_a_boot_failure(cli: Cli) -> None:
    result = cli("run", "words:bad_init")
    assert result.returncode == 3
    assert 'raise OSError("no model")' in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(cli: Cli, folder: Path, number: signal.Signals) -> None:
    with started(folder, "run", "words:endless") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "value 1\n"
        process.send_signal(number)
        code, _, errors = ended(process)
    assert (code, "Traceback" in errors) == (0, False)
    assert f"{number.name} after" in errors
    assert errors.splitlines()[-2].split()[:2] == ["endless", "1"]
    _waiting, in_flight, dead = status(cli, "words:endless")["tell"]
    assert (in_flight, dead) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "code"), [(("words:with_an_end",), 143), (("words:with_an_end", "--until", "stopped"), 0)]
)
def test_a_run_that_has_an_end_and_is_stopped_before_it_says_so(
    folder: Path, arguments: tuple[str, ...], code: int
) -> None:
    with started(folder, "run", *arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "value 1\n"
        process.terminate()
        assert ended(process)[0] == code


def test_a_signal_before_the_engine_runs_ends_it_cleanly(folder: Path, log: Log) -> None:
    text = f"from tests.gates import Log\nLog({log.path!r}).note('here')\nimport signal\nsignal.pause()\n"
    (folder / "pausing.py").write_text(text)
    with started(folder, "run", "pausing:engine") as process:
        log.wait_for(1)
        process.terminate()
        code, _, errors = ended(process)
    assert (code, errors) == (0, "")


# --- what cannot be run ---


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("words", "words:engine"),
        ("words:engin", "Did you mean words:engine?"),
        ("wrds:engine", "Did you mean words?"),
        ("./wrds.py:engine", "Did you mean words?"),
        ("words:db", "must be an Engine"),
        ("words:double", "without arguments"),
        (":engine", "must name a module"),
    ],
)
def test_a_wrong_target_is_refused_with_the_cure(cli: Cli, target: str, told: str) -> None:
    result = cli("run", target)
    assert result.returncode == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("import nothing_like_it", 3, "No module named 'nothing_like_it'"),
        ("def (", 3, "SyntaxError"),
        ("import sys\nsys.exit(0)", 3, "SystemExit"),
        ("from sqspipes_mp import Engine\nengine = Engine([], domain='t')", 2, "module.py:2: "),
        (
            "from sqspipes_mp import Engine, Task\nengine = Engine([Task(abs, input=True)])\nlist(engine.map([1]))",
            2,
            'module.py:3: a call of map() in module must be under `if __name__ == "__main__":`',
        ),
    ],
)
def test_a_module_that_fails_is_told_by_its_own_lines(cli: Cli, folder: Path, text: str, code: int, told: str) -> None:
    (folder / "module.py").write_text(text)
    result = cli("status", "module:engine")
    assert result.returncode == code
    assert told in result.stderr
    assert "importlib" not in result.stderr
    assert "cli/" not in result.stderr
    assert not (folder / "module.db").exists()


def test_a_file_whose_name_is_taken_is_refused(cli: Cli, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "queue.py").write_text(WORDS)
    result = cli("run", "sub/queue.py:engine")
    assert result.returncode == 2
    assert "rename" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("run",),
        ("walk", "words:engine"),
        ("run", "words:engine", "--workers", "3"),
        ("run", "words:engine", "--only", "nobody"),
        ("run", "words:engine", "--broker", "redis://"),
        ("run", "words:endless", "--until", "drained"),
    ],
)
def test_wrong_usage_is_exit_code_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.returncode == 2
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version").stdout == f"sqspipes-mp {__version__}\n"
    result = cli("run", "--help")
    assert result.returncode == 0
    assert "SQSPIPES_ON_ERROR" in result.stdout


# --- status, purge, delete ---


def test_status_works_without_queues_and_makes_no_file(cli: Cli, folder: Path) -> None:
    result = cli("status", "words:engine")
    assert result.returncode == 0
    assert "does not exist yet" in result.stdout
    assert status(cli, "words:engine") == dict.fromkeys(("numbers", "double", "tell"), (0, 0, 0))
    assert not (folder / "w.db").exists()


def test_status_names_every_queue_and_its_counts(cli: Cli) -> None:
    cli("run", "words:engine", "--only", "numbers")
    result = cli("status", "words:engine")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["double", "words-numbers", "5", "0", "0", "0"] in lines
    assert ["tell", "words-double", "-", "-", "-", "-"] in lines


COLLIDING = """
from sqspipes_mp import Engine, Task

def work(value):
    return value

def tell(value):
    return None

first = Engine([Task(work, name="x-y", input=True), tell], domain="app", broker="sqlite:///o.db")
second = Engine([Task(work, name="y", input=True), tell], domain="app-x", broker="sqlite:///o.db")
if __name__ == "__main__":
    first.put(1)
    first.run(only="x-y", until="drained", idle=0)
"""


def test_a_queue_of_another_pipeline_is_told(cli: Cli, folder: Path) -> None:
    (folder / "owners.py").write_text(COLLIDING)
    subprocess.run([sys.executable, "owners.py"], cwd=folder, env=environment(), timeout=TIMEOUT, check=True)
    for looking in ("status", "dead list"):
        result = cli(*looking.split(), "owners:second", "--json")
        assert json.loads(result.stdout) is not None
        assert "not all of these messages are this pipeline's" in result.stderr
        assert "'app-x-y'" in result.stderr
        assert cli(*looking.split(), "owners:first").stderr == ""


def test_without_a_terminal_nothing_is_removed(cli: Cli) -> None:
    cli("run", "words:engine", "--only", "numbers")
    for verb in ("purge", "delete"):
        result = cli(verb, "words:engine")
        assert result.returncode == 2
        assert "--yes" in result.stderr
    assert status(cli, "words:engine")["double"] == (5, 0, 0)


def test_purge_and_delete_name_what_they_touch_and_touch_nothing_else(cli: Cli) -> None:
    cli("run", "words:engine", "--only", "numbers")
    cli("run", "words:make", "--only", "numbers")
    purged = cli("purge", "words:engine", "--yes")
    assert purged.returncode == 0
    assert ["words-numbers", "5"] in [line.split() for line in purged.stdout.splitlines()]
    assert "made-numbers" not in purged.stdout
    assert "keys" not in purged.stdout
    assert status(cli, "words:engine")["double"] == (0, 0, 0)
    assert status(cli, "words:make")["tell"] == (5, 0, 0)
    assert cli("delete", "words:make", "--yes").returncode == 0
    assert "does not exist yet" in cli("status", "words:make").stdout
    assert "nothing to delete" in cli("delete", "words:make", "--yes").stdout


def test_another_pipelines_queues_are_refused_before_anything_is_asked(cli: Cli, folder: Path) -> None:
    with (folder / "words.py").open("a") as more:
        more.write("""
one = Engine([Task(double, name="x-y", input=True), tell], domain="app", broker=db)
other = Engine([Task(double, name="y", input=True), tell], domain="app-x", broker=db)
""")
    subprocess.run(
        [sys.executable, "-c", "import words; words.one.put(1, key='k')"], cwd=folder, env=environment(), check=True
    )
    assert cli("run", "words:one", "--only", "x-y", "--until", "drained", "--idle", "0").returncode == 0
    for verb in ("purge", "delete"):
        refused = cli(verb, "words:other")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "queue 'app-x-y' in" in refused.stderr
    assert cli("run", "words:other").returncode == 2
    assert status(cli, "words:one")["tell"][0] >= 1
    assert "1 key, and the results kept for its value, will be forgotten" in cli("purge", "words:one", "--yes").stdout


@pytest.mark.parametrize("verb", ["purge", "delete"])
def test_at_sqs_the_exact_queues_are_listed_before_the_question(cli: Cli, moto_url: str, verb: str) -> None:
    """SQS does not know whose a queue is, so the list is what can be checked."""
    broker = ("--broker", f"sqs://us-east-1?endpoint_url={moto_url}")
    assert cli("run", "words:engine", "--only", "numbers", *broker).returncode == 0
    asked = cli(verb, "words:engine", *broker)
    assert asked.returncode == 2
    assert [line.split()[0] for line in asked.stdout.splitlines() if line.startswith("words-")] == [
        "words-double--dead", "words-numbers",
    ]  # fmt: skip
    assert cli("delete", "words:engine", "--yes", *broker).returncode == 0


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 0), ("n", 1, 5), ("", 1, 5)])
def test_the_answer_decides(cli: Cli, folder: Path, answer: str, code: int, left: int) -> None:
    cli("run", "words:engine", "--only", "numbers")
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        result = subprocess.run(
            command("purge", "words:engine"),
            cwd=folder,
            env=environment(),
            stdin=theirs,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == code
    assert status(cli, "words:engine")["double"][0] == left


def test_nothing_is_left_running(folder: Path) -> None:
    with started(folder, "run", "words:endless") as process:
        assert process.stdout is not None
        process.stdout.readline()
        family = children(process.pid)
        assert len(family) >= 3
        process.terminate()
        assert ended(process)[0] == 0
        assert not any(each.is_running() for each in family)


def test_standard_streams_that_are_closed_cost_nothing_but_what_they_would_show(cli: Cli, folder: Path) -> None:
    command = f'"{sys.executable}" -m sqspipes_mp run words:engine --until drained --idle 0 <&- >&- 2>&-'
    result = subprocess.run(["/bin/sh", "-c", command], cwd=folder, env=environment(), timeout=TIMEOUT, check=False)
    assert result.returncode == 0
    assert set(status(cli, "words:engine").values()) == {(0, 0, 0)}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_full_is_told_as_what_it_is(folder: Path) -> None:
    def into_the_full_disk(*words: str, **variables: str) -> tuple[int, str]:
        with Path("/dev/full").open("w") as full:
            result = subprocess.run(
                [sys.executable, "-m", "sqspipes_mp", *words],
                cwd=folder,
                env=environment(**variables),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        return result.returncode, result.stderr

    told = "sqspipes-mp: error: the output could not be written: No space left on device\n"
    for unbuffered in ("", "1"):
        assert into_the_full_disk("ps", "--json", PYTHONUNBUFFERED=unbuffered) == (1, told)


def test_streams_that_know_ascii_only_show_the_rest_escaped(cli: Cli, folder: Path) -> None:
    result = cli("status", "words:anywhere", "--broker", "sqlite:///gr\xf6\xdfe.db", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "gr\\xf6\\xdfe.db" in result.stdout


def test_the_summary_is_a_file_whole_or_none(folder: Path, cli: Cli) -> None:
    refused = cli("run", "words:engine", "--summary-json", "no/such/folder/s.json")
    assert refused.returncode == 2
    assert "--summary-json must be a file that can be written" in refused.stderr
    done = cli("run", "words:engine", "--until", "drained", SQSPIPES_SUMMARY_JSON="s.json")
    assert done.returncode == 0, done.stderr
    told = json.loads((folder / "s.json").read_text())
    assert (told["reason"], told["domain"]) == ("drained", "words")
    assert {stage["name"] for stage in told["stages"]} == {"numbers", "double", "tell"}
    assert all(stage["done"] > 0 for stage in told["stages"])
    assert not list(folder.glob(".s.json*"))
