"""Workers share the CPUs among their numeric libraries, however those come into the process."""

import os
import sys

import pytest

from sqspipes_mp import Task
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.host.numeric_threads import variables
from tests.gates import Log, drain, engine_at, feed

#: What a library would read that this module imports.
AT_IMPORT = os.environ.get("OMP_NUM_THREADS")


def source():
    yield from ()


def look(value, log: Log):
    log.note(AT_IMPORT, os.environ.get("OMP_NUM_THREADS"), os.environ.get("MKL_NUM_THREADS"))


def look_at_blas(value, log: Log):
    import threadpoolctl  # noqa: PLC0415  (in the worker, as a user's library may come)

    log.note([library["num_threads"] for library in threadpoolctl.threadpool_info()])


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in variables({}, 1):
        monkeypatch.delenv(name, raising=False)


def run(tmp_path, function, workers, **settings):
    log = Log(str(tmp_path / "log"))
    engine = engine_at(tmp_path / "q.db", [source, Task(function, args=(log,), workers=workers)], **settings)
    feed(engine, function.__name__, [1])
    drain(engine, function.__name__)
    return log.lines()[0]


def test_a_forked_worker_finds_its_share(tmp_path):
    expected = str(max(1, cpus() // 2))
    assert run(tmp_path, look, 2, start_method="fork")[1:] == (expected, expected)
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.usefixtures("helpers_of_multiprocessing")
def test_a_spawned_worker_finds_it_before_its_modules_are_imported(tmp_path):
    expected = str(max(1, cpus() // 2))
    assert run(tmp_path, look, 2, start_method="spawn") == (expected, expected, expected)
    assert "OMP_NUM_THREADS" not in os.environ


def test_what_the_user_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(tmp_path, look, 2, start_method="fork")[1:] == ("7", None)


def test_a_library_that_is_loaded_already_is_told(tmp_path):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    pytest.importorskip("numpy")
    before = threadpoolctl.threadpool_info()
    assert "numpy" in sys.modules
    workers = max(2, cpus())
    (found,) = (run(tmp_path, look_at_blas, workers, start_method="fork"),)
    assert found
    assert set(found) == {1}
    assert threadpoolctl.threadpool_info() == before
