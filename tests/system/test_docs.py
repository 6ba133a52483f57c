"""Every example of the documentation runs as it stands, and its tables name everything there is."""

import contextlib
import doctest
import inspect
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import sqspipes_mp
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.brokers.base import Output, QueueSpec
from sqspipes_mp.cli.exits import Exit
from sqspipes_mp.messages import limits
from tests.gates import eventually

_ROOT = Path(__file__).parents[2]
_DOCS = _ROOT / "docs"
_SCRIPTS = _DOCS / "scripts"
_PAGES = {path.relative_to(_DOCS).with_suffix("").as_posix(): path.read_text() for path in _DOCS.rglob("*.rst")}
_PACKAGE = Path(sqspipes_mp.__file__).parent
#: The scripts of the pages; each has a test below, primes.py in test_readme.py.
_TESTED = {
    "asynchronous.py", "client.py", "ends.py", "failing.py", "feed.py", "fleet.py", "logs.py", "orders.py", "pages.py",
    "pages_celery.py", "pi.py", "pool.py", "primes.py", "recipes.py", "test_words.py", "titles.py", "uploads.py",
    "vectors.py", "words.py",
}  # fmt: skip
_CONSOLE = re.compile(
    r"\.\. code-block:: console\n(?P<options>(?:   :\S+:.*\n)*)\n(?P<text>(?:(?:   .*)?\n)+)",
)


def _environment(folder, more):
    environ = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1", **more}
    environ.pop("SQSPIPES_DOMAIN", None)
    return environ


def _run(tmp_path, name, *args, env=None, source=None):
    script = tmp_path / name
    script.write_text((source or _SCRIPTS / name).read_text())
    return subprocess.Popen(
        [sys.executable, name, *args],
        cwd=tmp_path,
        env=_environment(tmp_path, env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def _tells(page, *printed):
    """Check that the page says that this is printed."""
    for line in printed:
        assert f"``{line}``" in _PAGES[page]


# Pages


def test_every_script_is_on_a_page_and_has_a_test_here():
    shown = re.findall(r"\.\. literalinclude:: (\S+)", "".join(_PAGES.values()))
    assert {path.name for path in _SCRIPTS.glob("*.py")} == _TESTED
    assert {Path(path).name for path in shown if "/scripts/" in f"/{path}"} == _TESTED
    # Where the page is read as it stands, in the repository, nothing is included: a link leads to the script.
    for name, page in _PAGES.items():
        for path in re.findall(r"\.\. literalinclude:: (\S*scripts/\S+)", page):
            assert f"<{path}>`__" in page, (name, path)
            assert (_DOCS / name).parent.joinpath(path).exists()
    # The others are the package's own, or have a test in test_examples.py.
    others = {path for path in shown if "/scripts/" not in f"/{path}"}
    examples = {f"../examples/{path.name}" for path in (_ROOT / "examples").glob("*.py")}
    assert others == {"../../sqspipes_mp/cli/demo_pipeline.py", *examples}


def test_no_page_has_code_that_no_test_runs():
    for name, page in _PAGES.items():
        assert not re.search(r"\.\. code(-block)?:: (?!console)", page), name
        assert name == "tutorial" or not _CONSOLE.search(page), name


@pytest.mark.parametrize("name", sorted(name for name, page in _PAGES.items() if ">>> " in page))
def test_what_a_page_types_at_the_prompt_gives_what_it_shows(name):
    failed, tried = doctest.testfile(str(_DOCS / f"{name}.rst"), module_relative=False)
    assert (failed, tried > 0) == (0, True)


def test_no_line_of_a_page_is_longer_than_120_characters():
    long = [(name, line) for name, page in _PAGES.items() for line in page.splitlines() if len(line) > 120]
    assert long == []


# Scripts


def _read_words(process, count):
    lines = [process.stdout.readline() for _ in range(count)]
    for line in lines:
        word, vowels = line.split()
        assert sum(letter in "aeiou" for letter in word) == int(vowels)
    process.send_signal(signal.SIGINT)
    return _finish(process)


def test_the_endless_example_prints_words_without_aws_until_it_is_stopped(tmp_path):
    process = _run(tmp_path, "words.py")
    _, _, err = _read_words(process, 20)
    assert "KeyboardInterrupt" in err
    beside = {f"words.db{end}" for end in ("", "-wal", "-shm", "-bell")}
    assert {path.name for path in tmp_path.iterdir()} <= {"words.py", *beside}
    assert (tmp_path / "words.db").exists()


def test_the_endless_example_runs_on_sqs_by_one_environment_variable(tmp_path, moto_url):
    environ = {
        "SQSPIPES_BROKER": f"sqs://us-east-1?endpoint_url={moto_url}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
    }
    process = _run(tmp_path, "words.py", env=environ)
    _read_words(process, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"words.py"}


def test_the_demos_own_source_runs(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "branchy.py").write_text("def branchy(x):\n    if x:\n        return 1\n    return 2\n")
    demo = _PACKAGE / "cli" / "demo_pipeline.py"
    status, out, err = _finish(_run(tmp_path, "demo_pipeline.py", str(tree), source=demo))
    assert (status, err) == (0, "")
    assert out.split() == ["2", "branchy", f"{tree}/branchy.py:1"]


def test_the_example_that_ends_ends_with_the_right_sum(tmp_path):
    status, out, err = _finish(_run(tmp_path, "ends.py"))
    assert (status, err) == (0, "")
    assert out == f"{sum(n * n for n in range(1000))}\ndrained 1000\n"
    _tells("howto/job", *out.splitlines())


@pytest.mark.parametrize(
    ("page", "example", "printed"),
    [
        ("howto/waiting", "titles.py", "64"),
        ("howto/waiting", "vectors.py", "332833500"),
        ("howto/notebooks", "asynchronous.py", "[0, 1, 4, 9]"),
        ("coming_from/celery", "pages.py", "3 done"),
        ("coming_from/concurrent_futures", "pool.py", "same"),
    ],
)
def test_a_script_prints_what_its_page_says(tmp_path, page, example, printed):
    assert _finish(_run(tmp_path, example)) == (0, f"{printed}\n", "")
    _tells(page, printed)


def test_the_example_of_several_machines_stores_its_results(tmp_path):
    environ = {"SQSPIPES_BROKER": f"sqlite:///{tmp_path}/fleet.db"}
    lines = ["998 sent", "168 [2, 3, 5, 7, 11]"]
    assert _finish(_run(tmp_path, "fleet.py", "feed", env=environ))[:2] == (0, f"{lines[0]}\n")
    run = ["-m", "sqspipes_mp", "run", "fleet:engine", "--until", "drained", "--idle", "0"]
    environ |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(_ROOT)}
    subprocess.run([sys.executable, *run], cwd=tmp_path, env=environ, check=True, capture_output=True, timeout=100)
    assert _finish(_run(tmp_path, "fleet.py", "show", env=environ))[:2] == (0, f"{lines[1]}\n")
    _tells("howto/sqs", *lines)


def test_values_that_failed_are_listed_alike_in_every_run(tmp_path):
    lines = ["{2: 0.5, 4: 0.25}", "{0: 'division by zero'}"]
    for _ in range(2):
        assert _finish(_run(tmp_path, "failing.py"))[:2] == (0, "".join(f"{line}\n" for line in lines))
    _tells("howto/map", *lines)


def test_celerys_side_of_the_comparison_prints_the_same(tmp_path):
    pytest.importorskip("celery")
    assert _finish(_run(tmp_path, "pages_celery.py"))[:2] == (0, "3 done\n")


def test_the_example_of_logging_logs_from_a_fresh_process(tmp_path):
    assert _finish(_run(tmp_path, "logs.py")) == (0, "[42]\n", "double[0], worker of double: 21\n")
    _tells("howto/logging", "[42]", "double[0], worker of double: 21")


def test_the_feeding_example_drops_known_keys(tmp_path):
    status, out, err = _finish(_run(tmp_path, "feed.py"))
    assert (status, err) == (0, "")
    # The workers and the program share standard output: only what each of them wrote is in order.
    own = ["5 sent", "5 new, then 1", "7 done"]
    assert [line for line in out.splitlines() if not line.isdecimal()] == own
    assert sorted(map(int, filter(str.isdecimal, out.splitlines()))) == [0, 1, 4, 9, 16, 25, 144]
    status, out, err = _finish(_run(tmp_path, "feed.py"))
    assert (status, out, err) == (0, "5 sent\n0 new, then 0\n0 done\n", "")
    _tells("howto/feeding", *own, "0 new, then 0", "0 done")


def test_the_recipes_print_what_stands_there_each_time(tmp_path):
    shown = textwrap.dedent(_PAGES["howto/outcomes"].partition("in any order::\n\n")[2].partition("\n\n")[0])
    assert len(shown.splitlines()) == 4
    for _ in range(2):
        status, out, _ = _finish(_run(tmp_path, "recipes.py"))
        assert (status, sorted(out.splitlines())) == (0, sorted(shown.splitlines()))


def test_the_example_of_sqspipess_interface_runs_a_task_per_program(tmp_path):
    source, sink = _run(tmp_path, "client.py", "number"), _run(tmp_path, "client.py")
    assert all(int(sink.stdout.readline()) in range(2, 201, 2) for _ in range(3))
    for process in (source, sink):
        process.send_signal(signal.SIGINT)
    for process in (source, sink):
        assert _finish(process)[2].rstrip().endswith("KeyboardInterrupt")


def test_the_example_of_a_queue_of_others_takes_s3_events(tmp_path):
    db = tmp_path / "s3.db"
    broker = SQLite(db)
    broker.check()
    record = {"s3": {"object": {"key": "a+b.txt"}}}
    with contextlib.closing(broker.open()) as connection:
        connection.ensure([QueueSpec(name="my-bucket-events", fifo=False, visibility=30)], create=True)
        events = [{"Event": "s3:TestEvent"}, {"Records": [record, record]}]
        connection.feed([Output("my-bucket-events", json.dumps(event), str(event)) for event in events], keyed=False)
    process = _run(tmp_path, "uploads.py", env={"SQSPIPES_BROKER": f"sqlite:///{db}"})
    # Two workers share standard output, and print() writes in pieces here.
    out = process.stdout.readline() + process.stdout.readline()
    assert sorted(out) == sorted("a b.txt 7\n" * 2)
    process.send_signal(signal.SIGTERM)
    code, output, errors = _finish(process)
    # What was printed may belong to a call that is not quite over.
    [told] = [line for line in errors.splitlines() if not line.startswith("stopping")]
    assert (code, output, told.startswith("each: decode gave None for message ")) == (0, "", True)


def test_the_test_example_passes(tmp_path):
    assert _finish(_run(tmp_path, "test_words.py"))[0] == 0


def test_the_example_of_long_calls_goes_on_where_it_was_interrupted(tmp_path):
    # Where the signal falls does not matter.
    interrupted = _run(tmp_path, "pi.py")
    assert eventually((tmp_path / "pi.db").exists)
    interrupted.send_signal(signal.SIGINT)
    _finish(interrupted)
    status, out, _ = _finish(_run(tmp_path, "pi.py"))
    assert (status, out) == (0, "3.14204 3.14942\n")


# The tutorial


class _Shell:
    """A shell in a folder, in which ``python`` and ``sqspipes-mp`` are this Python's; it remembers what is exported."""

    def __init__(self, folder):
        self.folder = folder
        commands = folder / ".commands"
        commands.mkdir()
        for name, command in (("python", ""), ("sqspipes-mp", " -m sqspipes_mp")):
            (commands / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{command} "$@"\n')
            (commands / name).chmod(0o755)
        self.environ = _environment(folder, {"PATH": f"{commands}:{os.environ['PATH']}", "COLUMNS": "120"})

    def start(self, command):
        return subprocess.Popen(
            ["/bin/bash", "-c", command],
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def output(self, command):
        if command.startswith("export "):
            self.environ |= dict(word.split("=", 1) for word in shlex.split(command)[1:])
            return ""
        return self.start(command).communicate(timeout=100)[0]


def _commands(text):
    """Return (command, what is shown of its output) of a session."""
    for part in re.split(r"^\$ ", textwrap.dedent(text), flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown.strip()


_TUTORIAL, _, _ON_SQS = _PAGES["tutorial"].partition("The same on SQS")


def _sessions(text):
    """Yield (options of the block, its commands with what is shown of their output) of a page."""
    for block in _CONSOLE.finditer(text):
        yield block["options"], list(_commands(block["text"]))


def _follow(shell, commands):
    """Run commands one after the other, and compare what they print."""
    for command, shown in commands:
        output = shell.output(command)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        same = doctest.OutputChecker().check_output(f"{shown}\n", f"{output.strip()}\n", flags)
        assert same, f"{command}\n{output}"


def test_the_tutorial_shows_what_its_commands_print(tmp_path):
    (tmp_path / "orders.py").write_text((_SCRIPTS / "orders.py").read_text())
    shell = _Shell(tmp_path)
    for _, commands in _sessions(_TUTORIAL):
        _follow(shell, commands)


def test_the_tutorial_goes_on_with_three_programs_on_sqs(tmp_path, moto_url):
    (tmp_path / "orders.py").write_text((_SCRIPTS / "orders.py").read_text())
    shell = _Shell(tmp_path)
    mend = next(
        command for _, commands in _sessions(_TUTORIAL) for command, _ in commands if command.startswith("sed ")
    )
    shell.output(f"python orders.py make && touch totals.db && {mend}")
    for options, commands in _sessions(_ON_SQS.replace("http://127.0.0.1:5000", moto_url)):
        if ":name: terminals" in options:
            _run_together(shell, [command for command, _ in commands])
        else:
            _follow(shell, commands)
    assert "``40 197111``" in _ON_SQS
    assert shell.output("python orders.py show") == "40 197111\n"


def _run_together(shell, commands):
    """Run commands side by side until all orders are stored; then interrupt them."""
    programs = [shell.start(f"exec {command}") for command in commands]
    try:
        assert len(programs) == 3
        assert eventually(lambda: _stored(shell.folder / "totals.db") == 40)
    finally:
        for program in programs:
            program.send_signal(signal.SIGINT)
        ends = [_finish(program) for program in programs]
    assert [status for status, _, _ in ends] == [0, 0, 0], ends


def _stored(file):
    """Return the number of totals in the file; 0: there is no table yet."""
    with contextlib.closing(sqlite3.connect(file)) as totals, contextlib.suppress(sqlite3.OperationalError):
        return totals.execute("SELECT count(*) FROM totals").fetchone()[0]
    return 0


# Tables


@pytest.mark.parametrize("callee", [Engine, Task])
def test_every_option_of_engine_and_task_is_in_the_tables(callee):
    hidden = {"self", "tasks", "method"}
    for name in inspect.signature(callee.__init__).parameters:
        assert name in hidden or f"``{name}``" in _PAGES["reference/options"], name


def test_every_argument_of_run_is_named():
    for name in inspect.signature(Engine.run).parameters:
        assert name == "self" or re.search(rf"\b{name}\b", _PAGES["reference/options"]), name


def test_every_public_name_is_in_the_reference():
    page = _PAGES["reference/api"]
    for name in set(sqspipes_mp.__all__) - {"__version__"}:
        assert re.search(rf"\b{name}\b", page), name


def test_every_environment_variable_is_in_the_reference():
    sources = "".join(path.read_text() for path in _PACKAGE.rglob("*.py"))
    # SQSPIPES_{flag} is put together in one place.
    for name in set(re.findall(r"SQSPIPES_[A-Z_]+[A-Z]", sources)):
        assert f"``{name}``" in _PAGES["reference/environment"], name


def test_every_exit_code_is_in_the_reference():
    assert re.findall(r"^(\d+) ", _PAGES["reference/exit_codes"], re.MULTILINE) == [str(code.value) for code in Exit]


def test_the_limits_are_the_codes_own():
    page = _PAGES["reference/limits"]
    for value in (limits.MAX_BYTES, limits.MAX_BODY, int(limits.MAX_VISIBILITY)):
        assert f"{value:,}" in page
