"""The README's example runs as it stands and survives its end, and the text's other facts are true."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import docutils.core

from tests.gates import eventually

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.rst").read_text()
_BLOCKS = re.findall(r"\.\. code:: python\n\n((?:(?:    .*)?\n)+)", _README)
_PRIMES = textwrap.dedent(_BLOCKS[0]).strip().partition("\n")
#: The values end before this one; fewer are enough for a test.
_END, _SOONER = 30_000, 1_000


def _start(folder: Path) -> subprocess.Popen[str]:
    whole, fewer = f"range(2, {_END:_})", f"range(2, {_SOONER})"
    assert _PRIMES[2].count(whole) == 1
    (folder / "primes.py").write_text(_PRIMES[2].replace(whole, fewer))
    return subprocess.Popen(
        [sys.executable, "primes.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def test_its_only_example_is_that_of_the_page_on_map():
    assert len(_BLOCKS) == 1
    assert _PRIMES[0] == "# primes.py"
    assert _PRIMES[2] == (_ROOT / "docs" / "scripts" / "primes.py").read_text().rstrip()


def _told(end: int) -> str:
    """Return the line of the example for the values below ``end``, counted by a sieve."""
    primes = set(range(2, end))
    for n in range(2, end):
        if n in primes:
            primes.difference_update(range(n * n, end, n))
    return f"{len(primes)} {sorted(primes)[:5]}"


def test_the_text_says_the_right_answer():
    assert f"``{_told(_END)}``" in _README
    for page in ("index.rst", "howto/map.rst"):
        assert f"``{_told(_END)}``" in (_ROOT / "docs" / page).read_text()


def test_the_example_prints_the_same_each_time(tmp_path):
    assert _finish(_start(tmp_path)) == (0, f"{_told(_SOONER)}\n", "")
    status, again, warning = _finish(_start(tmp_path))
    assert (status, again) == (0, f"{_told(_SOONER)}\n")
    assert warning.startswith("primes: 998 values were done by earlier runs since ")


def test_the_example_prints_the_same_after_it_was_interrupted(tmp_path):
    # Where the signal falls does not matter: before the first value, in the midst, or after the last.
    interrupted = _start(tmp_path)
    assert eventually((tmp_path / "primes.db").exists)
    interrupted.send_signal(signal.SIGINT)
    _finish(interrupted)
    assert _finish(_start(tmp_path))[:2] == (0, f"{_told(_SOONER)}\n")


def test_ci_calls_its_test_command_word_for_word():
    command = "pip install '.[test]' && .ci/test -n 5"
    assert f"    {command}\n" in _README
    assert f"\n{command}\n" in (_ROOT / ".ci" / "run").read_text()


def test_it_is_short():
    lines = _README.splitlines()
    assert len(lines) <= 150
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


def test_it_is_well_formed():
    docutils.core.publish_string(_README, writer="null", settings_overrides={"report_level": 2, "halt_level": 2})


def test_its_links_lead_somewhere():
    targets = [target for target in re.findall(r"<([^<>]+)>`_", _README) if "://" not in target]
    # The scratch folder of .ci/test has those of the docs and the examples.
    here = [target for target in targets if target.startswith(("docs/", "examples"))]
    assert len(here) > 20
    assert [target for target in here if not (_ROOT / target).exists()] == []
