"""Which numeric variables are set, and which are the user's."""

import os

import pytest

from sqspipes_mp.host.numeric_threads import environment, share, variables


@pytest.mark.parametrize(
    ("cpus", "workers", "threads"), [(8, 2, 4), (8, 3, 2), (8, 8, 1), (2, 64, 1), (1, 1, 1), (4, 0, 4)]
)
def test_each_worker_gets_its_share(cpus, workers, threads):
    assert share(cpus, workers) == threads


def test_all_variables_are_set_where_the_user_set_none():
    found = variables({"PATH": "/bin"}, 3)
    assert set(found.values()) == {"3"}
    assert {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"} <= set(found)


def test_what_the_user_set_is_neither_changed_nor_overruled():
    assert variables({"OMP_NUM_THREADS": "5"}, 3) == {}
    found = variables({"MKL_NUM_THREADS": "5"}, 3)
    assert "MKL_NUM_THREADS" not in found
    assert found["OMP_NUM_THREADS"] == "3"


def test_the_callers_environment_is_as_before(monkeypatch):
    for name in variables({}, 1):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    before = dict(os.environ)
    with environment(3):
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["MKL_NUM_THREADS"] == "5"
    assert dict(os.environ) == before
