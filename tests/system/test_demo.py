"""The demo: a real pipeline over real files, which says what it found and leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from sqspipes_mp.cli.demo import as_text
from tests.gates import ROOT, TIMEOUT, children, ended

Demo = Callable[..., "subprocess.CompletedProcess[str]"]

PLAIN = "def straight():\n    return 1\n"
BRANCHY = (
    "class Some:\n    def branchy(self, a, b):\n        if a and b:\n            return 1\n        return a or b\n"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Eight files to find, four of them broken, and some to leave alone."""
    root = tmp_path / "tree"
    for folder in ("", "inner", ".hidden", "site-packages", "folder.py"):
        (root / folder).mkdir(exist_ok=True)
    (root / "plain.py").write_text(PLAIN)
    (root / "inner" / "branchy.py").write_text(BRANCHY)
    (root / "latin.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    (root / "empty.py").write_text("")
    (root / "syntax.py").write_text("def (\n")
    (root / "undecodable.py").write_bytes(b"name = '\xff'\n")
    (root / "null.py").write_bytes(b"a = 1\0\n")
    os.mkfifo(root / "pipe.py")
    for left_out in (".hidden/a.py", "site-packages/a.py", "notes.txt"):
        (root / left_out).write_text(PLAIN)
    return root


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "sqspipes_mp", "demo", *map(str, args)]


def environment(temporary: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary)}


@pytest.fixture
def demo(tmp_path: Path, temporary: Path) -> Iterator[Demo]:
    working = tmp_path / "working"
    working.mkdir()

    def run(*args: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command(*args),
            cwd=working,
            env=environment(temporary),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    yield run
    assert list(working.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_it_measures_every_file_and_reports_the_broken_ones(demo: Demo, tree: Path) -> None:
    result = demo(tree, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["files"], found["lines"], found["functions"]) == (8, 9, 2)
    assert found["most_complex"] == [
        {"complexity": 4, "function": "branchy", "where": "inner/branchy.py:2"},
        {"complexity": 1, "function": "straight", "where": "plain.py:1"},
    ]
    assert [error["path"] for error in found["errors"]] == ["null.py", "pipe.py", "syntax.py", "undecodable.py"]
    assert [(stage["name"], stage["done"]) for stage in found["stages"]] == [("find", 8), ("measure", 8), ("rank", 8)]
    assert found["one_process"]["files"] == 8
    assert found["speedup"] > 0


def test_its_table_is_for_people(demo: Demo, tree: Path) -> None:
    result = demo(tree, "--workers", "3")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["inner/branchy.py:2", "branchy", "4"] in lines
    assert ["measure", "3", "8"] in [line[:3] for line in lines]
    assert "4 of the files could not be read or parsed" in result.stdout
    assert "One process alone" in result.stdout
    assert "of 8 files" in result.stderr


def test_a_name_that_is_no_text_does_not_stop_it(demo: Demo, tree: Path) -> None:
    (tree / os.fsdecode(b"odd-\xff.py")).write_text(PLAIN)
    result = demo(tree, "--json")
    assert result.returncode == 0, result.stderr
    assert "odd-\\udcff.py" in [error["path"] for error in json.loads(result.stdout)["errors"]]


def test_one_file_is_enough(demo: Demo, tree: Path) -> None:
    result = demo(tree / "plain.py", "--json")
    found = json.loads(result.stdout)
    assert (found["files"], found["most_complex"][0]["function"]) == (1, "straight")


def test_a_tree_of_nothing_but_broken_files_is_told(demo: Demo, tmp_path: Path) -> None:
    root = tmp_path / "broken"
    root.mkdir()
    (root / "a.py").write_text("def (")
    result = demo(root)
    assert result.returncode == 0, result.stderr
    assert "a.py: SyntaxError" in result.stdout
    assert "no speed to compare" in result.stdout


def test_an_empty_folder_is_told(demo: Demo, temporary: Path) -> None:
    result = demo(temporary)
    assert result.returncode == 0
    assert "no Python file" in result.stdout


@pytest.mark.parametrize("arguments", [("missing",), (".", "--workers", "0"), (".", "--workers", "many")])
def test_wrong_usage_is_exit_code_2(demo: Demo, arguments: tuple[str, ...]) -> None:
    result = demo(*arguments)
    assert result.returncode == 2
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr


def test_a_sample_is_called_one(demo: Demo, tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for number in range(60):
        (root / f"{number}.py").write_text(PLAIN)
    assert "a random sample of 50 of the files" in demo(root).stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_in_the_middle_it_leaves_nothing(tmp_path: Path, temporary: Path, number: signal.Signals) -> None:
    root = tmp_path / "many"
    root.mkdir()
    first = shutil.copy(subprocess.__file__.replace("subprocess.py", "heapq.py"), root / "first.py")
    # Seconds of work, so that it is in the middle whenever this process gets to send its signal.
    for copy in range(1500):
        os.link(first, root / f"{copy}.py")
    process = subprocess.Popen(
        command(root),
        env=environment(temporary),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Under nohup it would rightly go on.
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509  (nothing else can)
    )
    try:
        assert process.stderr is not None
        while "files in" not in process.stderr.readline():
            assert process.poll() is None
        family = children(process.pid)
        assert len(family) >= 5
        # As a terminal does: to the whole group.
        os.killpg(process.pid, number)
        code, output, errors = ended(process)
    finally:
        process.kill()
        process.wait()
    assert (code, output) == (0, "")
    assert ("the demo was interrupted" in errors) == (number != signal.SIGHUP)
    assert "temporary file" not in errors
    assert not any(each.is_running() for each in family)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("speedup", "told"), [(4.0, True), (1.9, False)])
def test_a_speed_up_that_cannot_be_is_told(speedup: float, told: bool) -> None:
    counts = dict.fromkeys(("files", "lines", "functions", "seconds", "files_per_second", "lines_per_second"), 1)
    found = {"root": "/tree", **counts, "most_complex": [], "errors": [], "stages": [], "cpus": 2, "speedup": speedup}
    text = as_text({**found, "one_process": {"files": 1, "sample": False, "lines": 100, "seconds": 4.0}})
    assert "all the files, 100 lines in 4.0 s" in text
    assert ("disturbed. Run the demo again" in text) == told
