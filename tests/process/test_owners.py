"""Two pipelines whose domain and task names join to the same queue, and stages that were renamed or removed."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import ConfigError, Engine, Task
from tests.gates import ended, program, query


def work(value):
    return value


def tell(value):
    return None


def pipeline(db: Path, domain: str, name: str, **more: Any) -> Engine:
    """Its one queue between the two tasks is {domain}-{name}."""
    return Engine([Task(work, name=name, input=True), tell], domain=domain, broker=f"sqlite:///{db}", **more)


def counts(db: Path) -> dict[str, int]:
    return dict(
        query(db, "SELECT q.name, count(m.seq) FROM queues q JOIN messages m ON m.queue = q.id GROUP BY q.name")
    )


@pytest.mark.parametrize(
    "act",
    [
        lambda engine: engine.run(until="drained", idle=0),
        lambda engine: engine.put(1),
        lambda engine: engine.put_many([1]),
        lambda engine: next(engine.map([1])),
        lambda engine: engine.purge(),
        lambda engine: engine.delete(),
    ],
    ids=["run", "put", "put_many", "map", "purge", "delete"],
)
def test_a_queue_of_another_pipeline_is_refused(db: Path, act) -> None:
    first, second = pipeline(db, "app", "x-y"), pipeline(db, "app-x", "y")
    first.put(1)
    first.run(only="x-y", until="drained", idle=0)
    assert counts(db) == {"app-x-y": 1}
    with pytest.raises(ConfigError) as caught:
        act(second)
    text = str(caught.value)
    for part in ("'app-x-y'", "'app'", "'app-x'", "Rename the domain or the task"):
        assert part in text
    assert counts(db) == {"app-x-y": 1}
    assert query(db, "SELECT name FROM queues WHERE name LIKE 'app-x--%'") == []
    # The owner goes on, purge included.
    first.purge()
    assert counts(db) == {}


@pytest.mark.parametrize("fifo", [False, True])
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (("app", "x--p1"), ("app", "x")),
        (("app", "x-y--dead"), ("app-x", "y")),
        (("app", "x-y--p1"), ("app-x", "y")),
        (("app", "x--input"), ("app-x", "y")),
    ],
    ids=["one domain", "dead", "priority", "input"],
)
def test_reserved_endings_collide_too(db: Path, mine, theirs, fifo: bool) -> None:
    engine = Engine(
        [Task(work, name=mine[1], priorities=1, input=True), tell], domain=mine[0], broker=f"sqlite:///{db}", fifo=fifo
    )
    engine.put(1)
    engine.run(only=mine[1], until="drained", idle=0)
    other = Engine(
        [Task(work, name=theirs[1], priorities=2, input=True), tell],
        domain=theirs[0], broker=f"sqlite:///{db}", fifo=fifo,
    )  # fmt: skip
    if mine[0] == theirs[0]:
        other.purge()
        assert counts(db) == {}
    else:
        with pytest.raises(ConfigError, match=mine[0]):
            other.purge()
        assert sum(counts(db).values()) == 1


def test_a_deleted_queue_is_free_for_another(db: Path) -> None:
    first, second = pipeline(db, "app", "x-y"), pipeline(db, "app-x", "y")
    first.put(1)
    first.run(until="drained", idle=0)
    first.delete()
    second.put(1)
    second.run(until="drained", idle=0)
    with pytest.raises(ConfigError, match="'app-x'"):
        first.run(until="drained", idle=0)


def test_a_queue_of_others_has_no_owner(db: Path) -> None:
    first = pipeline(db, "app", "x")
    first.put(1)
    first.run(only="x", until="drained", idle=0)
    reader = Engine([Task(tell, input="app-x")], domain="reader", broker=f"sqlite:///{db}")
    assert reader.run(until="drained", idle=0)["tell"].done == 1
    assert dict(query(db, "SELECT queue, domain FROM owners WHERE queue = 'app-x'")) == {"app-x": "app"}
    first.run(until="drained", idle=0)


def test_an_owner_holds_for_the_queue_it_was_written_for(db: Path) -> None:
    """0.1.0 deletes a queue without its owner; whoever creates it next owns it."""
    first, second = pipeline(db, "app", "x-y"), pipeline(db, "app-x", "y")
    first.put(1)
    first.run(until="drained", idle=0)
    with sqlite3.connect(db) as file:
        file.execute("DELETE FROM queues")
        file.execute("UPDATE meta SET generation = generation + 1")
    file.close()
    second.put(1)
    assert second.run(until="drained", idle=0)["tell"].done == 1


RENAMED = """
import logging, sys
from sqspipes_mp import Engine, Reject, Task

def fails(value):
    raise Reject("no") if value == 2 else ValueError("not yet")

logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
broker = f"sqlite:///{sys.argv[1]}"
def work(value):
    return value
def pipeline(name, domain="app", **more):
    tasks = [Task(work, name=name, input=True, priorities=2), Task(fails, name="end")]
    return Engine(tasks, domain=domain, broker=broker, **more)
old, new = pipeline("old"), pipeline("new")
"""


def said(tmp_path: Path, text: str, db: Path) -> str:
    """Run a program to its good end; return what it logged."""
    with program(tmp_path, text, db) as process:
        code, _, errors = ended(process)
    assert code == 0, errors
    return errors


def test_what_a_renamed_stage_leaves_is_told_at_boot(tmp_path: Path, db: Path) -> None:
    text = RENAMED + (
        "old.put_many([1, 2, 3], priority=lambda value: value % 2)\n"
        "old.run(only='old', until='drained', idle=0)\n"
        "new.run(until='drained', idle=0)\n"
        "print('told', file=sys.stderr)\n"
        "new.broker.open().delete(['app-old', 'app-old--p1', 'app-old--dead'])\n"
        "new.run(until='drained', idle=0)\n"
    )
    errors = said(tmp_path, text, db)
    told, after = errors.split("told\n")
    assert told.count("no task of this pipeline") == 1
    for part in (
        "app: 3 messages and 0 dead letters",
        "app-old (1), app-old--p1 (2)",
        "old name",
        "engine.broker.open().delete([",
    ):
        assert part in told
    assert "no task of this pipeline" not in after


def test_a_stranded_queue_of_the_first_version_may_be_another_domains(tmp_path: Path, db: Path) -> None:
    text = RENAMED + (  # noqa: S608
        "import sqlite3\n"
        "other = pipeline('y', domain='app-x')\n"
        "other.put(1)\nother.run(only='y', until='drained', idle=0)\n"
        "with sqlite3.connect(sys.argv[1]) as file:\n    file.execute('DELETE FROM owners')\n"
        "new.run(until='drained', idle=0)\n"
    )
    errors = said(tmp_path, text, db)
    assert "app-x-y (1)" in errors
    assert "they may be another domain's" in errors
    assert "delete(" not in errors


def test_stranded_dead_letters_are_counted_apart_and_other_domains_left_alone(tmp_path: Path, db: Path) -> None:
    text = RENAMED + (
        "other = pipeline('y', domain='app-x')\n"
        "other.put(1)\nother.run(only='y', until='drained', idle=0)\n"
        "gone = Engine([Task(fails, name='gone', input=True)], domain='app', broker=broker)\n"
        "gone.put(2)\ngone.run(until='drained', idle=0)\n"
        "new.run(until='drained', idle=0)\n"
    )
    errors = said(tmp_path, text, db)
    assert "WARNING app: 0 messages and 1 dead letters" in errors
    assert "app-gone--dead (1)" in errors
    assert "app-x" not in errors
