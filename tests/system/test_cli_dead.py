"""``sqspipes-mp dead`` as people and scripts use it: real programs, real SQLite files."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gates import ROOT, TIMEOUT
from tests.system.test_cli import status

PARTS = """
import json, os, signal
from pathlib import Path
from sqspipes_mp import Engine, SQLite, Task

def numbers():
    yield from range(6)

def fails(value):
    if value % 2 and not Path("fixed").exists():
        raise ValueError(f"no luck with {value}\\nnor with \\x1b[31mred")
    return value

def tell(value):
    print("value", value, flush=True)

def shorts(value):
    raise RuntimeError("x" * 500)

def quotes(value):
    # As strptime, for one: the exception's text has the value as it is.
    raise ValueError(value)

db = "sqlite:///w.db"
quoting = Engine([numbers, quotes], domain="parts", broker=db)
engine = Engine([numbers, fails, tell], broker=db, on_error="reject")
two = Engine([numbers, fails, shorts], domain="two", broker=db, on_error="reject")
temporary = Engine([numbers, fails, tell], domain="parts", broker="sqlite://")
elsewhere = Engine([numbers, fails, tell], domain="parts")

class Signalled:
    '''A broker that sends this process a signal once, when it has just received something.'''

    longest_hold, longest_delay, temporary, remembers_keys = None, None, False, True

    def __init__(self, number):
        self.number = number
        self.broker = SQLite("w.db")
        self.check, self.warm, self.describe = self.broker.check, self.broker.warm, self.broker.describe
        self.exists, self.lock_file, self.cleanup = self.broker.exists, self.broker.lock_file, self.broker.cleanup

    def open(self, **settings):
        connection = self.broker.open(**settings)
        receive = connection.receive

        def signalled(*args, **options):
            found = receive(*args, **options)
            if found and self.number:
                number, self.number = self.number, None
                os.kill(os.getpid(), number)
            return found

        connection.receive = signalled
        return connection

terminated = Engine([numbers, fails, tell], domain="parts", broker=Signalled(signal.SIGTERM))
interrupted = Engine([numbers, fails, tell], domain="parts", broker=Signalled(signal.SIGINT))
killed = Engine([numbers, fails, tell], domain="parts", broker=Signalled(signal.SIGKILL))
"""

Result = subprocess.CompletedProcess[str]
Cli = Callable[..., Result]


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "sqspipes_mp", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def cli_in(folder: Path) -> Cli:
    (folder / "parts.py").write_text(PARTS)

    def run(*args: object, stdin: int = subprocess.DEVNULL, **variables: str) -> Result:
        return subprocess.run(
            command(*args),
            cwd=folder,
            env=environment(**variables),
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file of an engine in which 1, 3 and 5 have failed."""
    folder = tmp_path_factory.mktemp("drained")
    assert cli_in(folder)("run", "parts:engine", "--until", "drained", "--log-level", "critical").returncode == 5
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def cli(folder: Path) -> Cli:
    return cli_in(folder)


@pytest.fixture
def failed(cli: Cli, folder: Path, drained: Path) -> Cli:
    """The command line where 1, 3 and 5 have failed."""
    for file in drained.glob("w.db*"):
        shutil.copy(file, folder)
    return cli


def letters(cli: Cli, *args: object, target: str = "parts:engine") -> list[dict[str, Any]]:
    result = cli("dead", "list", target, "--json", *args)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def values(cli: Cli, target: str = "parts:engine") -> list[int]:
    return sorted(letter["value"] for letter in letters(cli, target=target))


def told(result: Result, *texts: str) -> None:
    for text in texts:
        assert text in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


# --- list ---


def test_list_is_a_table_with_short_ids_and_one_line_errors(failed: Cli) -> None:
    ids = {letter["id"] for letter in letters(failed)}
    result = failed("dead", "list", "parts:engine", COLUMNS="120")
    assert result.returncode == 0
    first, _, header, *rows = result.stdout.splitlines()
    assert first.startswith("parts on SQLite")
    assert header.split() == ["id", "stage", "value", "failed", "attempts", "error"]
    assert {row.split()[0] for row in rows} == {ident[:8] for ident in ids}
    assert sorted(row.partition("ValueError: ")[2] for row in rows) == [
        f"no luck with {value} nor with \\x1b[31mred" for value in (1, 3, 5)
    ]
    assert [row.split()[1:3] for row in rows] == [["fails", str(value)] for value in (1, 3, 5)]
    assert all(row.split()[5] == "1" for row in rows)


def test_list_cuts_to_the_terminal_s_width(failed: Cli) -> None:
    lines = failed("dead", "list", "parts:engine", COLUMNS="60").stdout.splitlines()[2:]
    assert lines[0].split() == ["id", "stage", "value", "failed", "error"]
    assert [len(line) for line in lines[1:]] == [60, 60, 60]
    assert all(line.endswith("...") for line in lines[1:])


def test_list_shows_one_stage_if_asked(cli: Cli) -> None:
    cli("run", "parts:two", "--until", "drained", "--log-level", "critical")
    assert [letter["stage"] for letter in letters(cli, target="parts:two")] == ["fails"] * 3 + ["shorts"] * 3
    assert {letter["stage"] for letter in letters(cli, "--stage", "shorts", target="parts:two")} == {"shorts"}
    refused = cli("dead", "list", "parts:two", "--stage", "short")
    assert refused.returncode == 2
    told(refused, "--stage must be", "'shorts'")


def test_letters_are_listed_and_moved_by_choice(failed: Cli) -> None:
    chosen = ("--error", "ValueError", "--match", "with 3", "--since", "1d", "--stage", "fails")
    assert [letter["value"] for letter in letters(failed, *chosen)] == [3]
    assert letters(failed, "--since", "2100-01-01") == []
    assert "none of 3 dead letters fits" in failed("dead", "redrive", "parts:engine", "--match", "no such").stdout
    assert failed("dead", "redrive", "parts:engine", *chosen).stdout == "Put back 1: parts-numbers 1.\n"
    assert failed("dead", "discard", "parts:engine", "--match", "with 5", "--yes").stdout == "Deleted 1.\n"
    assert values(failed) == [1]
    refused = failed("dead", "list", "parts:engine", "--since", "yesterday")
    assert refused.returncode == 2
    told(refused, "--since", "30m", "'yesterday'")


def test_replay_calls_the_function_here_and_touches_nothing(failed: Cli, folder: Path) -> None:
    ident = next(letter["id"] for letter in letters(failed) if letter["value"] == 3)
    again = failed("dead", "replay", "parts:engine", ident[:8])
    assert again.returncode == 1
    assert "ValueError: no luck with 3" in again.stderr
    assert "fails failed again" in again.stderr
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"p value * 1000\nq\n")
        assert "3000" in failed("dead", "replay", "parts:engine", ident, "--pdb", stdin=theirs).stdout
    finally:
        os.close(ours)
        os.close(theirs)
    (folder / "fixed").touch()
    done = failed("dead", "replay", "parts:engine", ident)
    assert done.returncode == 0
    told(done, "fails returned 3.", "dead redrive parts:engine")
    assert values(failed) == [1, 3, 5]


def test_list_says_so_where_there_is_nothing_and_makes_no_file(cli: Cli, folder: Path) -> None:
    result = cli("dead", "list", "parts:engine")
    assert result.returncode == 0
    told(result, "no dead letters")
    assert letters(cli) == []
    assert not (folder / "w.db").exists()


def test_another_broker_may_be_named(failed: Cli) -> None:
    assert values(failed, "parts:elsewhere") == []
    result = failed("dead", "list", "parts:elsewhere", "--broker", "sqlite:///w.db")
    assert result.stdout.count("ValueError") == 3


@pytest.mark.parametrize("verb", [["status"], ["dead", "list"], ["purge"]])
def test_a_temporary_file_is_said_to_be_one(cli: Cli, verb: list[str]) -> None:
    result = cli(*verb, "parts:temporary")
    assert result.returncode == 0
    assert "a temporary file of its own in every process" in result.stderr
    assert "(temporary)" in result.stdout


def test_looking_does_not_warn_of_the_broker(cli: Cli) -> None:
    assert cli("status", "parts:elsewhere").stderr == ""


# --- show ---


def test_show_tells_everything(failed: Cli) -> None:
    letter = letters(failed)[0]
    result = failed("dead", "show", "parts:engine", letter["id"][:6])
    assert (result.returncode, result.stderr) == (0, "")
    lines = dict(line.split(None, 1) for line in result.stdout.partition("\n\n")[0].splitlines())
    assert (lines["id"], lines["stage"], lines["queue"]) == (letter["id"], "fails", "parts-numbers")
    assert lines["attempts"] == "1"
    assert lines["error"].startswith("ValueError: no luck")
    assert 'raise ValueError(f"no luck with' in result.stdout
    # Its colours would be the terminal's otherwise.
    assert "\x1b" not in result.stdout
    assert json.loads(result.stdout.partition("\nbody:\n")[2]) == json.loads(letter["body"])
    assert '\n  "value": ' in result.stdout


def test_show_for_machines_is_the_letter_as_it_is(failed: Cli) -> None:
    letter = letters(failed)[0]
    result = failed("dead", "show", "--json", "parts:engine", letter["id"])
    assert json.loads(result.stdout) == letter
    assert json.loads(letter["body"])["value"] == letter["value"]
    failure = letter["failure"]
    assert (failure["error"], failure["attempts"], failure["source"]) == ("ValueError", 1, "parts-numbers")
    assert "\x1b[31m" in failure["text"]
    assert failure["first_seen"] <= failure["failed_at"]


def test_show_works_with_a_body_that_is_no_envelope(cli: Cli, folder: Path) -> None:
    put = """
import contextlib, sys
from sqspipes_mp.brokers.base import Completion, Output
from parts import engine
engine.broker.check()
with contextlib.closing(engine.broker.open()) as connection:
    connection.ensure(engine.pipeline.queues, create=True)
    for name in ("parts-numbers", "parts-fails--dead"):
        connection.complete([Completion(None, (Output(name, sys.argv[1], name),))])
"""
    body = '{"value": NaN, \u00fcnwell'
    subprocess.run([sys.executable, "-c", put, body], cwd=folder, env=environment(), check=True, timeout=TIMEOUT)
    (folder / "fixed").touch()
    cli("run", "parts:engine", "--until", "drained", "--log-level", "critical")
    found = letters(cli)
    assert sorted(letter["failure"]["error"] for letter in found) == ["DecodeError", "unknown"]
    for letter in found:
        result = cli("dead", "show", "parts:engine", letter["id"], PYTHONIOENCODING="ascii")
        assert result.returncode == 0
        assert result.stdout.endswith("body:\n" + body.replace("\u00fc", "\\xfc") + "\n")
    assert cli("dead", "redrive", "parts:engine", "--all").stdout == "Put back 2: parts-numbers 2.\n"


@pytest.mark.parametrize("verb", ["show", "redrive", "discard"])
def test_an_id_that_fits_none_or_several_is_refused_naming_candidates(failed: Cli, verb: str) -> None:
    ids = sorted(letter["id"][:8] for letter in letters(failed))
    result = failed("dead", verb, "parts:engine", "nobody")
    assert result.returncode == 2
    told(result, "nobody", ", ".join(ids))
    result = failed("dead", verb, "parts:engine", "")
    assert result.returncode == 2
    assert values(failed) == [1, 3, 5]


_HOSTILE = """
import contextlib, json, sys
from sqspipes_mp.brokers.base import Completion, DeadLetter, Output
from parts import engine
forged = "evil\\n2026-01-01 ERROR forged\\r\\x1b[2J\\u202etxt.exe\\u2028"
body = json.dumps({"meta": {"id": forged}, "value": "\\x1b]0;title\\x07" + forged}, ensure_ascii=False)
failure = {"error": forged, "text": forged, "traceback": forged + "\\nbody:\\nforged", "host": forged, "signal": forged,
           "attempts": int("9" * 4000), "pid": int("9" * 4000), "first_seen": int("9" * 4000), "failed_at": 1e308}
engine.broker.check()
with contextlib.closing(engine.broker.open()) as connection:
    connection.ensure(engine.pipeline.queues, create=True)
    connection.complete([Completion(None, (Output("parts-numbers", body, "one"),))])
    [found] = connection.receive(["parts-numbers"], 1, 0, 60)
    if sys.argv[1:]:
        connection.extend([found.handle], 0)
    else:
        letter = DeadLetter(found.handle, "parts-fails--dead", body, "one", json.dumps(failure))
        connection.dead_letter([letter])
"""


def _harmless(result: subprocess.CompletedProcess[str]) -> None:
    for stream in (result.stdout, result.stderr):
        assert all(char.isprintable() or char in "\n\t" for char in stream)
        assert not any(line.startswith("2026-01-01 ERROR forged") for line in stream.splitlines())


def test_what_a_stranger_has_sent_moves_no_cursor_and_forges_no_line(cli: Cli, folder: Path) -> None:
    subprocess.run([sys.executable, "-c", _HOSTILE], cwd=folder, env=environment(), check=True, timeout=TIMEOUT)
    listed = cli("dead", "list", "parts:engine")
    _harmless(listed)
    assert max(map(len, listed.stdout.splitlines())) <= 200
    ident = listed.stdout.splitlines()[3].split()[0]
    assert ident.startswith("evil\\n")
    shown = cli("dead", "show", "parts:engine", ident)
    assert shown.returncode == 0
    _harmless(shown)
    assert shown.stdout.count("\nbody:\n") == 1
    assert json.loads(shown.stdout.partition("\nbody:\n")[2].replace("\\x1b", "").replace("\\x07", ""))
    _harmless(cli("dead", "show", "parts:engine", "nobody"))
    _harmless(cli("dead", "discard", "parts:engine", "--all", "--yes"))


def test_a_message_that_fails_forges_no_line_of_the_log(cli: Cli, folder: Path) -> None:
    put = [sys.executable, "-c", _HOSTILE, "waiting"]
    subprocess.run(put, cwd=folder, env=environment(), check=True, timeout=TIMEOUT)
    for extra in ((), ("--on-error", "reject")):
        _harmless(cli("run", "parts:quoting", "--until", "drained", "--idle", "0", "--only", "quotes", *extra))


# --- redrive, discard ---


def test_what_is_put_back_is_done_once_the_bug_is_fixed(failed: Cli, folder: Path) -> None:
    letter = next(letter for letter in letters(failed) if letter["value"] == 3)
    result = failed("dead", "redrive", "parts:engine", "--broker", "sqlite:///w.db", letter["id"][:8])
    assert (result.returncode, result.stdout) == (0, "Put back 1: parts-numbers 1.\n")
    assert values(failed) == [1, 5]
    assert failed("dead", "redrive", "parts:engine", "--all").stdout == "Put back 2: parts-numbers 2.\n"
    (folder / "fixed").touch()
    rest = failed("run", "parts:engine", "--until", "drained")
    assert rest.returncode == 0
    assert sorted(map(int, rest.stdout.split()[1::2])) == sorted([*range(6), 1, 3, 5])
    again = failed("dead", "redrive", "parts:engine", "--all")
    assert again.returncode == 0
    told(again, "nothing to redrive")


def test_what_is_discarded_is_gone_and_nothing_else(failed: Cli) -> None:
    letter = next(letter for letter in letters(failed) if letter["value"] == 3)
    result = failed("dead", "discard", "parts:engine", letter["id"], "--yes")
    assert (result.returncode, result.stdout) == (0, "Deleted 1.\n")
    assert values(failed) == [1, 5]
    assert failed("dead", "discard", "--yes", "--all", "parts:engine").stdout == "Deleted 2.\n"
    assert failed("dead", "redrive", "parts:engine", "--all").stdout.endswith("nothing to redrive.\n")
    told(failed("dead", "discard", "parts:engine", "--all"), "nothing to discard")


def test_without_a_terminal_nothing_is_discarded(failed: Cli) -> None:
    result = failed("dead", "discard", "parts:engine", "--all")
    assert result.returncode == 2
    told(result, "--yes")
    assert values(failed) == [1, 3, 5]


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, [1, 5]), ("n", 1, [1, 3, 5])])
def test_the_answer_decides(failed: Cli, answer: str, code: int, left: list[int]) -> None:
    ident = next(letter["id"] for letter in letters(failed) if letter["value"] == 3)
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        result = failed("dead", "discard", "parts:engine", ident[:8], stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == code
    # The end of the line is cut to the terminal's width, which the path of the queues may have used up.
    assert result.stdout.count("ValueError: no luck") == 1
    assert values(failed) == left


@pytest.mark.parametrize(
    "arguments",
    [
        ("dead",),
        ("dead", "redrive", "parts:engine"),
        ("dead", "redrive", "parts:engine", "abc", "--all"),
        ("dead", "discard", "parts:engine", "--yes"),
        ("dead", "show", "parts:engine"),
        ("dead", "list", "parts:nothing"),
        ("dead", "list", "parts:engine", "--broker", "redis://"),
    ],
)
def test_wrong_usage_is_exit_code_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.returncode == 2
    told(result, "error: ")


def test_help_shows_every_command(cli: Cli) -> None:
    told(cli("--help"), "dead list words:engine")
    told(cli("dead", "--help"), "list", "show", "replay", "redrive", "discard")
    told(cli("dead", "redrive", "--help"), "(ID... | --all | --stage NAME")


# --- signals ---


@pytest.mark.parametrize("verb", ["list", "redrive"])
@pytest.mark.parametrize("target", ["parts:terminated", "parts:interrupted"])
def test_a_signal_gives_everything_back(failed: Cli, verb: str, target: str) -> None:
    result = failed("dead", verb, target, *(["--all"] if verb == "redrive" else []))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    # A redrive may have gone on with its round before the signal was heard: then they wait where they failed.
    moved = status(failed, "parts:engine")["fails"][0] if verb == "redrive" else 0
    assert (values(failed), moved) in [([1, 3, 5], 0), ([], 3)]


def test_what_a_killed_command_holds_is_counted(failed: Cli) -> None:
    assert failed("dead", "list", "parts:killed").returncode == -signal.SIGKILL
    result = failed("dead", "list", "parts:engine")
    assert result.returncode == 0
    told(result, "no dead letters to be seen", "about 3 more")
    told(failed("dead", "redrive", "parts:engine", "--all"), "nothing to redrive", "about 3 more")
