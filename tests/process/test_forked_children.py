"""A child that the user's code forked, and that forgot ``os._exit``, never answers for its parent; numpy's seeds."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sqspipes_mp import Engine, SQLite, Task
from tests.gates import Log, dead, drain, engine_at, feed, values


def source() -> Iterator[object]:
    yield from ()


def sink(value: object) -> object:
    return value


def fork() -> bool:
    """Return True in the child; its parent goes on once that has ended, and so could not be first."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return not pid


def returns(value: object) -> object:
    return "the child's" if fork() else "the parent's"


def raises(value: object) -> object:
    if fork():
        raise ValueError("the child's")
    return "the parent's"


def streams(value: object) -> Iterator[object]:
    yield "the child's" if fork() else "the parent's"


def batch(found: list[object]) -> list[object]:
    return ["the child's" if fork() else "the parent's" for _ in found]


class Built:
    def __init__(self) -> None:
        fork()

    def __call__(self, value: object) -> object:
        return "the parent's"

    def close(self) -> None:
        fork()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (returns, {}),
        (raises, {}),
        (streams, {}),
        (returns, {"threads": 2}),
        (batch, {"batch": 2}),
        (Built, {}),
        (lambda value: "the parent's", {"init": fork, "exit": fork}),
    ],
    ids=["returns", "raises", "generator", "threads", "batch", "class", "hooks"],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_only_the_parent_answers(db: Path, method: Any, settings: dict[str, Any]) -> None:
    engine = engine_at(db, [source, Task(method, name="work", **settings), sink], on_error="retry")
    feed(engine, "work", [1, 2])
    summary = drain(engine, "work")
    assert values(engine, "sink") == ["the parent's"] * 2
    assert (dead(engine, "work"), summary["work"].done) == ([], 2)


def test_setup_and_an_outputs_json_that_fork_have_one_worker(db: Path, log: Log) -> None:
    engine = engine_at(
        db, [source, Task(odd, name="work", args=(log,)), sink], setup=fork, json_default=lambda value: [fork()]
    )
    feed(engine, "work", [1, 2])
    drain(engine, "work")
    assert (values(engine, "sink"), log.lines()) == ([[False]] * 2, [1, 2])


def odd(value: object, log: Log) -> object:
    log.note(value)
    return {value}


def draw(value: object) -> tuple[int, int]:
    return os.getpid(), int(np.random.randint(10**9))


def test_forked_workers_and_their_successors_draw_different_numbers() -> None:
    np.random.seed(7)
    task = Task(draw, input=True, workers=2, max_tasks_per_worker=2)
    rows = list(Engine([task], domain="seeds", broker=SQLite(), start_method="fork").map(range(12)))
    assert len({pid for pid, _ in rows}) > 2
    assert len({number for _, number in rows}) == 12


def seed() -> None:
    np.random.seed(7)


def test_a_seed_of_setup_or_init_stays_the_users() -> None:
    task = Task(draw, input=True, init=seed)
    [(_, number)] = Engine([task], domain="seeds", broker=SQLite(), start_method="fork").map([0])
    np.random.seed(7)
    assert number == int(np.random.randint(10**9))
