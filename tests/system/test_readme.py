"""Every code example of the README runs as it stands, and what it says of commands is true."""

import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import docutils.core
import pytest

import sqspipes_mp
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.brokers.base import Output, QueueSpec

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.rst").read_text()
_BLOCKS = {
    match.group("name"): textwrap.dedent(match.group("code"))
    for match in re.finditer(
        r"\.\. code:: python\n\n(?P<code>    (?:# (?P<name>\S+\.py)\n)?(?:(?:    .*)?\n)+)", _README + "\n"
    )
}
_DEMO = "demo_pipeline.py"


def _run(tmp_path, name, *args, env=None):
    script = tmp_path / name
    script.write_text(_BLOCKS[name])
    environ = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1", **(env or {})}
    environ.pop("SQSPIPES_DOMAIN", None)
    return subprocess.Popen(
        [sys.executable, name, *args],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def _tells(*printed):
    """Check that the README says that this is printed."""
    for line in printed:
        assert f"``{line}``" in _README


def test_every_python_block_has_a_name_and_a_test_here():
    assert set(_BLOCKS) == {
        "words.py", _DEMO, "client.py", "ends.py", "feed.py", "primes.py", "recipes.py", "test_words.py", "titles.py",
        "uploads.py", "vectors.py",
    }  # fmt: skip


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
    assert {path.name for path in tmp_path.iterdir()} <= {"words.py", "words.db", "words.db-wal", "words.db-shm"}
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


def test_the_last_example_is_the_demos_own_source_and_runs(tmp_path):
    own = (Path(sqspipes_mp.__file__).parent / "cli" / "demo_pipeline.py").read_text()
    assert _BLOCKS[_DEMO].strip() == f"# {_DEMO}\n{own}".strip()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "branchy.py").write_text("def branchy(x):\n    if x:\n        return 1\n    return 2\n")
    status, out, err = _finish(_run(tmp_path, _DEMO, str(tree)))
    assert (status, err) == (0, "")
    assert out.split() == ["2", "branchy", f"{tree}/branchy.py:1"]


def test_the_example_that_ends_ends_with_the_right_sum(tmp_path):
    status, out, err = _finish(_run(tmp_path, "ends.py"))
    assert (status, err) == (0, "")
    assert out == f"{sum(n * n for n in range(1000))}\ndrained 1000\n"
    _tells(*out.splitlines())


@pytest.mark.parametrize(("example", "printed"), [("titles.py", "64"), ("vectors.py", "332833500")])
def test_the_examples_of_threads_and_batches_end(tmp_path, example, printed):
    status, out, err = _finish(_run(tmp_path, example))
    assert (status, err, out.split()) == (0, "", [printed])
    _tells(printed)


def test_the_feeding_example_drops_known_keys(tmp_path):
    status, out, err = _finish(_run(tmp_path, "feed.py"))
    assert (status, err) == (0, "")
    # The workers and the program share standard output: only what each of them wrote is in order.
    own = ["5 sent", "5 new, then 1", "7 done"]
    assert [line for line in out.splitlines() if not line.isdecimal()] == own
    assert sorted(map(int, filter(str.isdecimal, out.splitlines()))) == [0, 1, 4, 9, 16, 25, 144]
    status, out, err = _finish(_run(tmp_path, "feed.py"))
    assert (status, out, err) == (0, "5 sent\n0 new, then 0\n0 done\n", "")
    _tells(*own, "0 new, then 0", "0 done")


def test_the_recipes_print_what_stands_there_each_time(tmp_path):
    shown = textwrap.dedent(_README.partition("in any order::\n\n")[2].partition("\n\n")[0]).splitlines()
    assert len(shown) == 4
    for _ in range(2):
        status, out, _ = _finish(_run(tmp_path, "recipes.py"))
        assert (status, sorted(out.splitlines())) == (0, sorted(shown))


def test_the_example_of_sqspipess_interface_runs_a_task_per_program(tmp_path):
    source, sink = _run(tmp_path, "client.py", "number"), _run(tmp_path, "client.py")
    assert all(int(sink.stdout.readline()) in range(2, 201, 2) for _ in range(3))
    for process in (source, sink):
        process.send_signal(signal.SIGINT)
    for process in (source, sink):
        assert _finish(process)[2].rstrip().endswith("KeyboardInterrupt")


def test_the_finite_job_is_done_once(tmp_path):
    assert _finish(_run(tmp_path, "primes.py")) == (0, "168 [2, 3, 5, 7, 11]\n", "")
    status, told, warning = _finish(_run(tmp_path, "primes.py"))
    assert (status, told) == (0, "0 []\n")
    assert warning.startswith("primes: 998 values were done by earlier runs since ")
    _tells("168 [2, 3, 5, 7, 11]", "0 []")


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
    [told] = [line for line in errors.splitlines() if not line.startswith("draining")]
    assert (code, output, told.startswith("each: decode gave None for message ")) == (0, "", True)


def test_the_test_example_passes(tmp_path):
    assert _finish(_run(tmp_path, "test_words.py"))[0] == 0


@pytest.mark.parametrize("command", ["pip install '.[test]' && .ci/test -n 5"])
def test_ci_calls_the_readmes_test_command_word_for_word(command):
    assert f"    {command}\n" in _README
    assert f"\n{command}\n" in (_ROOT / ".ci" / "run").read_text()


def test_no_line_is_longer_than_120_characters():
    assert [number for number, line in enumerate(_README.splitlines(), 1) if len(line) > 120] == []


def test_it_is_well_formed():
    docutils.core.publish_string(_README, writer="null", settings_overrides={"report_level": 2, "halt_level": 2})


def test_every_option_of_engine_and_task_is_in_the_tables():
    hidden = {"self", "tasks", "method"}
    for callee in (Engine, Task):
        for name in inspect.signature(callee.__init__).parameters:
            assert name in hidden or f"``{name}``" in _README, name
