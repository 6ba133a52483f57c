"""``put`` and ``put_many``: what is sent, what is refused, and what a run makes of it."""

import gc
import json
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import SQS, AccessDenied, ConfigError, Engine, MessageTooLarge, OutputError, PutError, SQLite, Task
from standin import standin
from standin.brokers import sqs_at
from tests.gates import TIMEOUT, Background, Gate, Log, bodies, eventually, present, waiting


def noted(value, log: Log):
    log.note(value)


def fed(db: Path, *args: object, **settings: Any) -> Engine:
    task = Task(noted, name="work", input=True, args=args, priorities=settings.pop("priorities", 1))
    return Engine([task, Task(noted, name="end")], domain="t", broker=SQLite(db), **settings)


def test_put_needs_no_run_and_a_run_takes_it(db: Path, log: Log) -> None:
    engine = Engine([Task(noted, name="work", input=True, args=(log,))], domain="t", broker=SQLite(db))
    ident = engine.put({"a": 1})
    assert engine.put([2], key="mine") == "mine"
    assert waiting(engine, "work") == (2, 0, 0)
    found = [json.loads(body) for body in bodies(engine, "t--input")]
    assert [body["meta"]["id"] for body in found] == [ident, "mine"]
    summary = engine.run(until="drained", idle=0.0)
    assert sorted(map(str, log.lines())) == ["[2]", "{'a': 1}"]
    assert summary["work"].done == 2


def test_another_process_needs_only_the_definition(db: Path) -> None:
    engine = fed(db)
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=put_elsewhere, args=(db,))
    child.start()
    child.join()
    child.close()
    assert waiting(engine, "work") == (3, 0, 0)


def put_elsewhere(db: Path) -> None:
    fed(db).put_many(iter("abc"))


def test_a_key_is_sent_once_until_purge(db: Path) -> None:
    engine = fed(db)
    assert engine.put_many(range(250), key=lambda value: value % 200) == 200
    assert engine.put_many(range(199, 202), key=str) == 2
    assert waiting(engine, "work") == (202, 0, 0)
    engine.put(7, key=7)
    assert waiting(engine, "work") == (202, 0, 0)
    engine.purge()
    assert engine.put_many(range(3), key=str) == 3


def test_put_many_takes_any_iterable_and_tells_how_far_it_is(db: Path) -> None:
    engine = fed(db)
    told: list[int] = []
    assert engine.put_many((number for number in range(1_050)), progress=told.append) == 1_050
    assert told[-1] == 1_050
    assert told == sorted(told)
    assert len(told) >= 10
    assert engine.put_many([]) == 0
    assert waiting(engine, "work") == (1_050, 0, 0)


def test_a_bad_value_stops_its_batch_and_says_what_was_sent(db: Path) -> None:
    engine = fed(db)
    values = [*range(130), {1, 2}, *range(5)]
    with pytest.raises(PutError, match=r"first 100 values.*number 130 .*set") as caught:
        engine.put_many(values)
    assert (caught.value.sent, caught.value.new, caught.value.doubtful) == (100, 100, 0)
    assert isinstance(caught.value.__cause__, OutputError)
    assert waiting(engine, "work") == (100, 0, 0)


def test_a_bad_value_alone_is_its_own_error(db: Path) -> None:
    engine = fed(db)
    with pytest.raises(MessageTooLarge, match="the value"):
        engine.put("x" * 2_000_000)
    with pytest.raises(OutputError, match="the value"):
        engine.put(float("nan"))
    with pytest.raises(ConfigError, match="key"):
        engine.put(1, key=lambda value: None)  # type: ignore[arg-type, return-value]
    assert not db.exists() or waiting(engine, "work") == (0, 0, 0)


def test_an_iterable_that_raises_ends_it_with_its_own_error(db: Path) -> None:
    def broken():
        yield from range(150)
        raise ZeroDivisionError

    engine = fed(db)
    with pytest.raises(ZeroDivisionError) as caught:
        engine.put_many(broken())
    assert caught.value.__notes__ == ["put_many: the first 100 values were sent, nothing after them was"]
    assert waiting(engine, "work") == (100, 0, 0)


def test_what_took_long_to_come_does_not_wait_for_the_next(db: Path) -> None:
    engine = fed(db)
    found = []

    def live():
        for number in range(3):
            threading.Event().wait(0.3)
            yield number
            found.append(waiting(engine, "work")[0])

    assert engine.put_many(live()) == 3
    assert found == [1, 2, 3]


def test_what_the_service_breaks_off_is_doubtful_and_counted() -> None:
    with standin() as server:
        engine = Engine([Task(noted, name="work", input=True)], domain="t", broker=sqs_at(server.url))

        def values():
            yield from range(240)
            # The first batch, of 24 requests, is at the service now.
            server.plan("SendMessageBatch", "denied", times=9)
            yield from range(50)

        with pytest.raises(
            PutError, match=r"^the first 240 values.*next 50 some may.*: the broker refused: .*denied"
        ) as caught:
            engine.put_many(values())
        assert (caught.value.sent, caught.value.new, caught.value.doubtful) == (240, 240, 50)
        assert isinstance(caught.value.__cause__, AccessDenied)
        assert waiting(engine, "work")[0] == 240


def test_levels_delay_and_groups(db: Path, tmp_path: Path) -> None:
    engine = fed(db, priorities=3)
    engine.put("low")
    engine.put("high", priority=9)
    engine.put_many(["a", "b"], priority=lambda value: 1)
    counts = engine.stats()["work"].inputs
    assert [(queue.name, queue.depth.visible) for queue in counts] == [
        ("t--input--p2", 1), ("t--input--p1", 2), ("t--input", 1),
    ]  # fmt: skip
    engine.put("later", delay=60)
    assert engine.stats()["work"].delayed == 1
    fifo = fed(tmp_path / "fifo.db", fifo=True)
    fifo.put("a", group="one")
    fifo.put("b", group="one, but a text that SQS would refuse as a group: é")
    assert waiting(fifo, "work") == (2, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"priority": -1}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": "1"}, "priority"),
        ({"delay": 1e10}, "delay"),
        ({"delay": -1}, "delay"),
        ({"group": "g"}, "group"),
        ({"key": ""}, "key"),
        ({"key": 1.5}, "key"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(db: Path, arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=rf"put\({names}"):
        fed(db).put(1, **arguments)
    assert not db.exists()


def test_a_source_is_not_fed(db: Path) -> None:
    with pytest.raises(ConfigError, match=r"source.*input=True"):
        Engine([Task(noted, name="work")], domain="t", broker=SQLite(db)).put(1)
    with pytest.raises(ConfigError, match="callable"):
        fed(db).put_many([1], key="one")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="FIFO"):
        fed(db, fifo=True).put(1, delay=5)


def test_stats_tell_what_the_run_does(db: Path, log: Log, gate: Gate) -> None:
    engine = Engine(
        [Task(gated, name="work", input=True, args=(log, gate)), Task(fan, name="fan", on_error="reject")],
        domain="t", broker=SQLite(db),
    )  # fmt: skip
    assert (engine.stats()["work"].workers, engine.stats()["work"].p50) == (0, None)
    engine.put_many(range(1, 21))
    with Background(engine, until="drained", idle=0.0):
        log.wait_for(1)
        row = engine.stats()["work"]
        assert (row.workers, row.done, row.p50) == (1, 0, None)
        gate.open()
    stats = engine.stats()
    assert (stats["work"].done, stats["fan"].done, stats["fan"].failed) == (20, 19, 1)
    assert (stats["fan"].run.dead, stats["fan"].dead) == (1, 1)
    assert 0 < present(stats["work"].p50) <= present(stats["work"].p95)
    assert present(stats["fan"].p95) < 1
    assert 0 < stats["work"].busy <= 1


def gated(value, log: Log, gate: Gate):
    log.note(value)
    gate.wait()
    return value


def fan(value):
    if value == 20:
        raise ValueError("twenty")
    yield from range(3)


def test_an_iterations_stats_are_seen_from_outside(db: Path) -> None:
    engine = Engine([Task(fan, input=True)], domain="t", broker=SQLite(db))
    engine.put_many(range(5))
    with engine.run(iterate=True, until="drained", idle=0.0) as results:
        assert len([next(results) for _ in range(4)]) == 4
        eventually(lambda: engine.stats()["fan"].done >= 1)
        assert len(list(results)) == 11
    assert present(results.summary)["fan"].done == engine.stats()["fan"].done == 5
    assert "fan 5 done, busy" in str(results.summary)


def test_a_level_that_is_missing_doubles_nothing_on_the_others(db: Path) -> None:
    with standin() as server:
        for broker in (SQLite(db), SQS("us-east-1", endpoint_url=server.url, access_key="x", secret_key="x")):
            first, more = (
                Engine(
                    [Task(noted, name="work", input=True, args=(None,), priorities=levels)], domain="t", broker=broker
                )
                for levels in (1, 2)
            )
            first.put(0)
            assert more.put_many(range(4), priority=lambda value: value % 2) == 4
            assert waiting(more, "work") == (5, 0, 0)


def test_an_empty_key_is_refused_with_what_to_give(db: Path) -> None:
    with pytest.raises(ConfigError, match=r"put\(key\) must be a non-empty text or a whole number, got ''. Give str"):
        fed(db).put(3, key="")


LOST = """
import os, sys
from sqspipes_mp import Engine, Task

def work(value):
    raise ValueError(value)

engine = Engine([Task(work, input=True, on_error="reject")], domain="lost", broker="sqlite://")
engine.put(1)
engine.run(until="drained", idle=0.0)
engine.put_many(range(3))
if not os.fork():
    sys.exit()
os.wait()
"""


def test_what_goes_with_a_temporary_file_is_told_once_by_its_owner(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(LOST)
    command = [sys.executable, str(tmp_path / "lost.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "temporary" in line]
    assert len(lines) == 1
    assert "lost: 3 messages and 1 dead letters go" in lines[0]
    assert "sqlite:///lost.db" in lines[0]


def test_nothing_is_told_of_a_temporary_file_that_is_empty(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine([Task(noted, name="work", input=True)], domain="t", broker=SQLite())
    engine.put(1)
    engine.purge()
    del engine
    gc.collect()
    assert caplog.records == []
