"""Every benchmark runs to its end and says what it measured; nothing here looks at a figure."""

import importlib.util
import json
import os
import platform
import subprocess
import sys

import pytest

from tests.gates import ROOT, TIMEOUT

FOLDER = ROOT / "benchmarks"
#: Scripts on the harness; what else is there has options and a test of its own.
SCRIPTS = {path.stem: path for path in FOLDER.glob("*.py")} | {
    path.parent.name: path for path in FOLDER.glob("*/__main__.py")
}
NAMES = sorted(name for name, path in SCRIPTS.items() if "parse(__doc__, argv" in path.read_text())
NAMES.remove("harness")
#: No picture says more than their tables.
DRAW_NOTHING = {"chains", "chaos", "idle", "jobs", "kept", "looking", "put", "under_way"}


def run(*command, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT * 2, check=False
    )


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_tells(name, tmp_path):
    """A few seconds: it starts engines, and some of them a stand-in. Draws, too, where matplotlib is installed."""
    picture = tmp_path / "told.png"
    draw = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    done = run(f"benchmarks.{name}", "--quick", "--json", str(tmp_path / "told.json"), *draw)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["benchmark"] == name
    assert told["quick"] is True
    assert {"cpu", "usable", "python", "system"} <= set(told["machine"])
    assert told["tables"] or told["notes"]
    for table in told["tables"]:
        assert table["title"] in done.stdout
        assert table["rows"]
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    assert platform.node() not in set(map(str, told["machine"].values()))
    if draw:
        assert ("draws nothing" in done.stdout) == (name in DRAW_NOTHING)
        assert picture.exists() == (name not in DRAW_NOTHING)


def test_each_is_described():
    described = (FOLDER / "README.rst").read_text()
    assert [name for name in NAMES if f"``{name}``" not in described] == []


def test_what_has_no_rounds_takes_no_rounds():
    done = run("benchmarks.idle", "--rounds", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--rounds" in done.stderr


def test_what_it_cannot_do_is_said_before_it_begins(tmp_path):
    done = run("benchmarks.start", "--json", str(tmp_path / "missing" / "told.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "folder does not exist" in done.stderr


#: One peer is not installed, one does not even start.
NONE_WORKS = """
import dataclasses, sys
from benchmarks import peers
absent = dataclasses.replace(peers.PEERS["celery"], needs=("boto3", "no-such-distribution"))
broken = dataclasses.replace(peers.PEERS["sqspipes"], needs=("boto3",), fill="benchmarks.no_such_program")
if __name__ == "__main__":
    peers.PEERS = {"absent": absent, "broken": broken}
    peers.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_peers_are_left_out_with_a_plain_line_where_they_are_missing_or_fail(tmp_path):
    """Runs Pool and the engine over the stand-in."""
    program = tmp_path / "none_works.py"
    program.write_text(NONE_WORKS)
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), "--quick", "--peers", "absent", "broken"]
    done = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True, timeout=TIMEOUT * 2, check=False)
    assert done.returncode == 0, done.stderr
    assert "absent: left out, no-such-distribution not installed: pip install 'celery[sqs]'" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("broken: left out")]
    assert "exit code 1 while filling its queue" in line
    assert "No module named benchmarks.no_such_program" in line
    rows = [line.split() for line in done.stdout.splitlines() if " 40 " in line]
    assert [row[3] for row in rows] == ["Pool", "sqspipes_mp"]
