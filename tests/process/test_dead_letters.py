"""Dead letters of real engines: seen with their reasons, put back where they failed, and never lost on the way."""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp import Engine, Retry, SQLite, Task, current_message
from sqspipes_mp.brokers.base import Broker, Completion, Handle, Output, Received
from sqspipes_mp.brokers.base import DeadLetter as Letter
from sqspipes_mp.brokers.sqs import SQS
from sqspipes_mp.caller import dead_letters
from sqspipes_mp.caller.choice import Choice
from sqspipes_mp.caller.dead_letters import DeadLetter, discard, look, redrive, resolve_ids, short_ids, survey
from sqspipes_mp.errors import ConfigError
from standin import StandIn
from tests.gates import (
    TIMEOUT,
    Background,
    Log,
    bodies,
    charges,
    drain,
    engine_at,
    eventually,
    feed,
    query,
    send,
    waiting,
)


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "_POLL", 0.0)


def source():
    yield from ()


def sink(value):
    return value


def engine_on(broker: Broker, tasks: Sequence[Any], **settings: Any) -> Engine:
    return Engine(list(tasks), domain=f"t{uuid.uuid4().hex[:12]}", broker=broker, **settings)


def connect(engine: Engine) -> Any:
    engine.broker.check()
    connection = engine.broker.open()
    connection.ensure(engine.pipeline.queues, create=True)
    return contextlib.closing(connection)


def bury(engine: Engine, stage: str, *values: object, group: str | None = None, text: str | None = None) -> None:
    """Put values into a stage's dead-letter queue as an engine does: received from its input, and moved."""
    queue = engine.pipeline.stage(stage).inputs[-1]
    feed(engine, stage, [{"n": value} for value in values], group=group)
    failure = None if text is None else json.dumps({"error": "ValueError", "text": text, "source": queue})
    with connect(engine) as connection:
        left = len(values)
        while left:
            received = connection.receive([queue], min(left, 10), 1.0, 30.0)
            left -= len(received)
            dead = str(engine.pipeline.stage(stage).dead)
            letters = [Letter(r.handle, dead, r.body, r.handle.message_id, failure, r.group) for r in received]
            assert connection.dead_letter(letters) == []


def numbers(letters: Sequence[DeadLetter]) -> list[Any]:
    return [letter.value["n"] for letter in letters]


def dead_depth(engine: Engine, stage: str = "work") -> tuple[int, int]:
    """Return (visible, in flight) of a stage's dead-letter queue."""
    queue = engine.stats()[stage].dead_letters
    assert queue is not None
    assert queue.depth is not None
    return queue.depth.visible, queue.depth.in_flight


class Wrapped:
    """A broker whose connections do something else in one method."""

    def __init__(self, broker: Broker, method: str, instead: Callable[..., Any]) -> None:
        self._broker, self._method, self._instead = broker, method, instead
        self.check, self.warm, self.describe = broker.check, broker.warm, broker.describe
        self.longest_hold, self.longest_delay = broker.longest_hold, broker.longest_delay
        self.temporary = broker.temporary
        self.remembers_keys, self.exists = broker.remembers_keys, broker.exists
        self.lock_file, self.cleanup = broker.lock_file, broker.cleanup

    def open(self, **settings: Any) -> Any:
        return WrappedConnection(self._broker.open(**settings), self._method, self._instead)


class WrappedConnection:
    def __init__(self, inner: Any, method: str, instead: Callable[..., Any]) -> None:
        self._inner, self._method, self._instead = inner, method, instead

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return (lambda *args, **named: self._instead(found, *args, **named)) if name == self._method else found


def die_in(engine: Engine, method: str, instead: Callable[..., Any], what: Callable[..., Any], *args: Any) -> None:
    """Call a function of ``dead`` in a child whose connection dies in the middle of ``method``."""
    process = multiprocessing.get_context("fork").Process(
        target=what, args=(engine.pipeline, Wrapped(engine.broker, method, instead), *args)
    )
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == 9


# --- what is told ---


def fail_two(value):
    if value == 2:
        raise ValueError("no luck")
    return value


def fall_asleep_here(value):
    threading.Event().wait()


def exit_3(value):
    os._exit(3)


def kill_myself(value):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("on_error", ["reject", "retry"])
def test_an_exception_is_told_with_traceback_attempts_times_and_value(db: Path, on_error: str) -> None:
    began = time.time()
    work = Task(fail_two, name="work", max_attempts=1)
    engine = engine_at(db, [source, work, sink], on_error=on_error)
    feed(engine, "work", [1, 2, 3])
    drain(engine, "work", "sink")
    [letter] = engine.dead_letters()
    failure = letter.failure
    assert (letter.stage, letter.queue, letter.value) == ("work", "t-source", 2)
    assert json.loads(letter.body)["value"] == 2
    assert (failure.error, failure.text, failure.attempts) == ("ValueError", "no luck", 1)
    assert 'raise ValueError("no luck")' in failure.traceback
    assert failure.first_seen is not None
    assert failure.failed_at is not None
    assert began - 1 <= failure.first_seen <= failure.failed_at <= time.time()


def test_the_id_is_the_message_s_own_hop(db: Path) -> None:
    engine = engine_at(db, [source, Task(fail_two, name="work"), sink], on_error="reject")
    hop = "0a" * 32
    metas = [{"id": "root", "hop": hop}, {"id": "root"}, {"id": "other", "hop": "no digest of ours"}]
    send(engine, "work", *(json.dumps({"meta": meta, "value": 2}) for meta in metas))
    drain(engine, "work", "sink")
    assert sorted(letter.id for letter in engine.dead_letters()) == [hop, "other", "root"]


@pytest.mark.parametrize(
    ("method", "limits", "error", "field", "told"),
    [
        (exit_3, {}, "WorkerLost", "text", "exit status 3"),
        (kill_myself, {}, "WorkerLost", "signal", "SIGKILL"),
        (fall_asleep_here, {"timeout": 0.3}, "TaskTimeout", "stack", "fall_asleep_here"),
    ],
)
def test_a_killed_worker_s_message_tells_what_killed_it(
    db: Path, method: Callable[[Any], Any], limits: dict[str, Any], error: str, field: str, told: str
) -> None:
    engine = engine_at(db, [source, Task(method, name="work", max_attempts=1, **limits), sink])
    feed(engine, "work", [1])
    drain(engine, "work")
    [letter] = engine.dead_letters()
    assert (letter.failure.error, letter.failure.attempts, letter.value) == (error, 1, 1)
    assert told in getattr(letter.failure, field)


class Notes(logging.Handler):
    """A ``setup`` that notes what each process logs about dead letters."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def __call__(self) -> None:
        logging.getLogger("sqspipes_mp").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "is dead-lettered" in record.getMessage():
            self._log.note(record.getMessage())


@pytest.mark.parametrize("method", [fail_two, exit_3], ids=["worker", "keeper"])
def test_the_log_names_the_id_that_dead_show_takes(db: Path, log: Log, method: Callable[[Any], Any]) -> None:
    tasks = [source, Task(sink, name="first"), Task(method, name="work", max_attempts=1), sink]
    engine = engine_at(db, tasks, on_error="retry", setup=Notes(log), start_method="fork")
    feed(engine, "first", [2])
    drain(engine, "first", "work")
    [letter] = engine.dead_letters()
    [line] = log.lines()
    assert line.startswith(f"work: message {letter.id[:16]} ")
    assert "is dead-lettered" in line


class Reporter(logging.Handler):
    """An error reporter, and a ``setup`` that has it in each process: notes records at ERROR with an exception."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.ERROR)
        self._log = log

    def __call__(self) -> None:
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.name == "sqspipes_mp.dead":
            fields = [getattr(record, name) for name in ("stage", "id", "attempt", "reason")]
            dead = "is dead-lettered" in record.getMessage()
            self._log.note([dead, record.exc_info[0].__name__, *fields])


def ends_badly(value: int) -> None:
    if value == 1:
        raise KeyError("one")
    if value == 2:
        os._exit(3)
    threading.Event().wait()


def test_dead_letters_lost_workers_and_late_calls_reach_error_reporters(db: Path, log: Log) -> None:
    # Only the late call has a timeout: on a busy machine any call may outlive one.
    tasks = [
        source,
        Task(ends_badly, name="work", max_attempts=1),
        Task(ends_badly, name="crash", max_attempts=1),
        Task(ends_badly, name="late", max_attempts=1, timeout=0.5),
    ]
    reporter = Reporter(log)
    engine = engine_at(db, tasks, on_error="retry", setup=reporter, start_method="fork")
    for stage, value in (("work", 1), ("crash", 2), ("late", 3)):
        feed(engine, stage, [value])
    reporter()
    try:
        drain(engine, "work", "crash", "late")
    finally:
        logging.getLogger().removeHandler(reporter)
    letters = engine.dead_letters()
    found = log.lines()
    kinds = {1: "KeyError", 2: "WorkerLost", 3: "TaskTimeout"}
    expected = [[True, kinds[letter.value], letter.stage, letter.id[:16], 1, kinds[letter.value]] for letter in letters]
    assert sorted(line for line in found if line[0]) == sorted(expected)
    lost = [line for line in found if not line[0]]
    assert sorted([line[1], *line[4:]] for line in lost) == [
        ["TaskTimeout", 1, "TaskTimeout"],
        ["WorkerLost", 1, "WorkerLost"],
    ]
    assert sorted(line[2] for line in lost) == ["crash", "late"]
    assert all(line[3] for line in lost)


def test_letters_come_by_stage_and_time_and_of_one_stage_if_asked(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work"), Task(sink, name="last")])
    bury(engine, "last", 1, text="later stage")
    with connect(engine) as connection:
        dead = str(engine.pipeline.stage("work").dead)
        bury(engine, "work", 2, 3)
        handles = [received.handle for received in connection.receive([dead], 10, 0.0, 30.0)]
        for handle, at in zip(handles, (200.0, 100.0), strict=True):
            failure = json.dumps({"error": "E", "failed_at": at})
            body = json.dumps({"meta": {}, "value": {"n": at}})
            connection.dead_letter([Letter(handle, dead, body, str(at), failure)])
    assert numbers(engine.dead_letters()) == [100.0, 200.0, 1]
    assert numbers(look(engine.pipeline, engine.broker, "last")) == [1]
    assert look(engine.pipeline, engine.broker, "source") == []
    with pytest.raises(ConfigError, match="nobody"):
        look(engine.pipeline, engine.broker, "nobody")


def test_a_failure_that_nobody_wrote_is_understood(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    bury(engine, "work", 1)
    [letter] = engine.dead_letters()
    assert (letter.failure.error, letter.queue) == ("unknown", "t-source")
    assert "moved by the queue service" in letter.failure.text
    assert letter.failure.first_seen is not None


def test_where_nothing_ever_ran_there_are_no_letters_and_no_file_comes_of_looking(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    assert engine.dead_letters() == []
    assert redrive(engine.pipeline, engine.broker, None).letters == []
    assert not db.exists()


def fails_twofold(value):
    raise (KeyError if value["n"] % 2 else ValueError)(f"no {value['of']}")


def test_letters_are_chosen_by_stage_error_time_text_and_id(db: Path) -> None:
    engine = engine_at(db, [Task(fails_twofold, input=True), sink], on_error="reject")
    engine.put_many([{"n": n, "of": "schön"} for n in range(4)], key=lambda value: f"key-{value['n']}")
    engine.run(until="drained")
    assert [letter.key for letter in engine.dead_letters()] == [f"key-{n}" for n in range(4)]
    hour = timedelta(hours=1)
    assert numbers(engine.redrive(error="KeyError", match="key-3", stage="fails_twofold", since=hour)) == [3]
    assert engine.redrive(since=datetime.now(UTC) + hour) == engine.redrive(stage="sink") == []
    assert engine.discard(match="of nobody's") == []
    assert numbers(engine.discard(error="ValueError", match="schön")) == [0, 2]
    # As the list shows a value, too, which is no JSON.
    assert survey(engine.pipeline, engine.broker, chosen=Choice(match="'n': 1,")).letters == engine.dead_letters()
    [left] = engine.dead_letters()
    assert engine.redrive([left.id], error="ValueError") == []
    assert numbers(engine.redrive([left.id[:12]])) == [1]
    for wrong in ({"since": 5}, {"match": ""}, {"stage": "nobody"}):
        with pytest.raises(ConfigError):
            engine.redrive(**wrong)
    assert engine.dead_letters() == []


def test_queues_that_are_missing_hold_no_letters(db: Path, sqs: SQS) -> None:
    for broker in (SQLite(db), sqs):
        engine = engine_on(broker, [source, Task(sink, name="work"), Task(sink, name="last")])
        with connect(engine) as connection:
            connection.delete([engine.pipeline.stage("work").dead])
        bury_there = Output(str(engine.pipeline.stage("last").dead), '{"value": {"n": 1}}', "h")
        with contextlib.closing(broker.open()) as connection:
            connection.complete([Completion(None, (bury_there,))])
        assert numbers(engine.dead_letters()) == [1]


# --- put back ---


def work(value, log: Log, fixed: str):
    message = current_message()
    log.note(value, message.id, message.hop, message.attempt)
    if not Path(fixed).exists():
        raise ValueError("no luck")
    return value


def one_and_two():
    yield from (1, 2)


def repaired(engine: Engine, log: Log, fixed: Path) -> None:
    """Run to the end, with dead letters; put them back; run again with the bug fixed."""
    engine.run(until="drained")
    failed = log.lines()
    assert [attempt for *_, attempt in sorted(failed)] == [1, 2, 1, 2]
    letters = engine.dead_letters()
    assert {letter.id for letter in letters} == {hop for _, _, hop, _ in failed}
    assert [letter.failure.attempts for letter in letters] == [2, 2]
    moved = redrive(engine.pipeline, engine.broker, None)
    assert sorted(letter.value for letter in moved.letters) == [1, 2]
    assert (moved.missed, moved.hidden) == ([], 0)
    assert engine.dead_letters() == []
    fixed.touch()
    summary = drain(engine, "work", "sink")
    assert (summary["work"].done, summary["sink"].done, summary["work"].failed) == (2, 2, 0)
    again = log.lines()[len(failed) :]
    assert sorted(again) == sorted((value, ident, hop, 1) for value, ident, hop, attempt in failed if attempt == 1)


def tasks(log: Log, fixed: Path) -> list[Any]:
    return [one_and_two, Task(work, name="work", args=(log, str(fixed)), max_attempts=2), sink]


def at_once(error, attempt):
    return Retry(0)


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_what_was_put_back_runs_as_if_for_the_first_time(db: Path, log: Log, tmp_path: Path, fifo: bool) -> None:
    fixed = tmp_path / "fixed"
    repaired(engine_at(db, tasks(log, fixed), fifo=fifo, on_error=at_once), log, fixed)


@pytest.mark.slow
def test_what_was_put_back_runs_as_if_for_the_first_time_on_moto(moto: SQS, log: Log, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    # moto goes on with polls whose clients are gone, and hides what they take.
    repaired(engine_on(moto, tasks(log, fixed), on_error=at_once, visibility_timeout=4), log, fixed)


def test_a_fifo_message_put_back_within_five_minutes_is_not_dropped(
    sqs: SQS, server: StandIn, log: Log, tmp_path: Path
) -> None:
    fixed = tmp_path / "fixed"
    engine = engine_on(sqs, tasks(log, fixed), fifo=True, on_error=at_once)
    repaired(engine, log, fixed)
    ledger = server.ledger(messages=False)["queues"]
    assert ledger[engine.pipeline.stage("work").inputs[0]]["duplicates_dropped"] == 0


def test_no_charge_is_carried_over(db: Path) -> None:
    engine = engine_at(db, [source, Task(fail_two, name="work", max_attempts=2)], on_error=at_once)
    feed(engine, "work", [2])
    drain(engine, "work")
    assert charges(engine) == [1]
    redrive(engine.pipeline, engine.broker, None)
    assert charges(engine) == [0]


def test_it_goes_back_to_the_level_it_failed_at_or_else_that_of_its_priority(db: Path) -> None:
    engine = engine_at(db, [Task(source, name="source", priorities=3), Task(sink, name="work")])
    high, middle, low = engine.pipeline.stage("work").inputs
    bury(engine, "work", "low", text="failed here")
    with connect(engine) as connection:
        dead = str(engine.pipeline.stage("work").dead)
        for body in (
            '{"meta": {"priority": 9}, "value": {"n": "high"}}',
            '{"meta": {"priority": 1}, "value": 1}',
            "odd",
        ):
            connection.complete([Completion(None, (Output(dead, body, uuid.uuid4().hex),))])
    redrive(engine.pipeline, engine.broker, None)
    assert ["high" in body for body in bodies(engine, high)] == [True]
    assert len(bodies(engine, middle)) == 1
    assert ["low" in body or body == "odd" for body in bodies(engine, low)] == [True, True]


def test_a_body_that_is_no_envelope_goes_back_as_it_is(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    body = '{"value": 1, \u00e9 broken'
    send(engine, "work", body)
    drain(engine, "work")
    [letter] = engine.dead_letters()
    assert (letter.failure.error, letter.body, letter.value) == ("DecodeError", body, None)
    [moved] = redrive(engine.pipeline, engine.broker, [letter.id]).letters
    assert moved == letter
    assert bodies(engine, "t-source") == [body]
    assert waiting(engine, "work") == (1, 0, 0)


@pytest.mark.parametrize("fifo", [False, True])
def test_rows_that_are_not_utf_8_or_no_text_are_dead_letters_and_stop_nobody(db: Path, log: Log, fifo: bool) -> None:
    engine = engine_at(db, [source, Task(note_all, name="work", args=(log,))], fifo=fifo)
    foreign = [
        b'{"meta": {}, "value": "\xff"}',
        b"\xed\xa0\x80",
        memoryview(b"\x00\xfe"),
        memoryview(b'{"value": "blob"}'),
    ]
    send(engine, "work", *(["?"] * len(foreign)), json.dumps({"value": "good"}), group="g" if fifo else None)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        seqs = [seq for (seq,) in connection.execute("SELECT seq FROM messages ORDER BY seq")]
        for seq, body in zip(seqs, foreign, strict=False):
            value = "CAST(? AS TEXT)" if isinstance(body, bytes) else "?"
            connection.execute(f"UPDATE messages SET body = {value} WHERE seq = ?", (body, seq))  # noqa: S608
        connection.commit()
    summary = drain(engine, "work")
    assert (summary["work"].done, summary["work"].dead) == (2, 3)
    assert sorted(log.lines()) == ["blob", "good"]
    letters = engine.dead_letters()
    assert {letter.failure.error for letter in letters} == {"DecodeError"}
    assert sorted(letter.body for letter in letters) == ["\x00\\xfe", r"\xed\xa0\x80", r'{"meta": {}, "value": "\xff"}']
    assert len(redrive(engine.pipeline, engine.broker, None).letters) == 3


def note_all(value, log: Log):
    log.note(value)


def groups_of(db: Path, queue: str) -> list[Any]:
    text = """SELECT groups.name, body FROM messages JOIN groups ON groups.id = grp
        JOIN queues ON queues.id = messages.queue WHERE queues.name = ? ORDER BY seq"""
    return [(group, json.loads(body)["value"]["n"]) for group, body in query(db, text, queue)]


UNDECODABLE = {
    "no JSON at all": "not JSON",
    "{}": "no 'value'",
    '{"meta": {"hop": "\\ud800", "id": "of its own"}}': "no 'value'",
    "[1, 2]": "a JSON array",
    '"{}"': "a JSON string",
    "null": "a JSON null",
    '{"meta": {}, "value": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
    '{"value": "\\uZZZZ"}': "not JSON",
    '{"value": "\\xff"}': "not JSON",
    '{"value": 1} {"value": 2}': "not JSON",
    '\ufeff{"value": 1}': "not JSON",
    '{"value": ' + "9" * 5_000 + "}": "not JSON",
}


def noting(value, log: Log):
    log.note(os.getpid())
    return value


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_bodies_that_cannot_be_decoded_are_kept_and_cost_nobody_else_anything(
    sqs: SQS, server: StandIn, log: Log, fifo: bool
) -> None:
    good = [*range(len(UNDECODABLE) - 1), "\ud800"]
    tasks = [source, Task(noting, name="work", args=(log,)), sink]
    engine = engine_on(sqs, tasks, fifo=fifo, start_method="fork")
    mixed = [body for bad, value in zip(UNDECODABLE, good, strict=True) for body in (bad, json.dumps({"value": value}))]
    send(engine, "work", *mixed, group="g" if fifo else None)
    [queue] = engine.pipeline.stage("work").inputs
    with Background(engine, only="work") as run:
        eventually(lambda: server.ledger(queue, messages=False)["queues"][queue]["deleted"] == len(mixed))
        assert {each["received"] for each in server.messages(queue)} == {1}
        pids = log.lines()
        engine.stop()
        # The poll in flight, which is waited for, returns with it.
        send(engine, "work", '{"value": "too late"}', group="g" if fifo else None)
    stats = run.summary["work"]
    assert (stats.failed, stats.dead) == (0, len(UNDECODABLE))
    # One worker has seen them all.
    assert len(pids) == len(good)
    assert len(set(pids)) == 1
    [queue] = engine.pipeline.stage("sink").inputs
    with connect(engine) as connection:
        received = [each for _ in range(3) for each in connection.receive([queue], 10, 0.0, 30.0)]
    out = [value for each in received if (value := json.loads(each.body)["value"]) != "too late"]
    assert out == good if fifo else sorted(out, key=str) == sorted(good, key=str)
    # Of a long group a look would show a part.
    letters = redrive(engine.pipeline, engine.broker, None).letters
    assert sorted(letter.body for letter in letters) == sorted(UNDECODABLE)
    for letter in letters:
        assert (letter.failure.error, letter.failure.attempts) == ("DecodeError", 1)
        assert UNDECODABLE[letter.body] in letter.failure.text


def by_key(value):
    return "key"


def test_a_group_stays_together_and_in_order_on_sqlite(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work", group=by_key)], fifo=True)
    bury(engine, "work", *range(25), group="key")
    assert numbers(engine.dead_letters()) == list(range(25))
    redrive(engine.pipeline, engine.broker, None)
    assert groups_of(db, "t-source.fifo") == [("key", number) for number in range(25)]


def test_a_long_group_on_sqs_is_shown_in_part_and_put_back_as_a_whole_in_order(sqs: SQS, server: StandIn) -> None:
    engine = engine_on(sqs, [source, Task(sink, name="work", group=by_key)], fifo=True)
    bury(engine, "work", *range(25), group="key")
    found = survey(engine.pipeline, engine.broker)
    assert (numbers(found.letters), found.hidden) == (list(range(10)), 15)
    with pytest.raises(ConfigError, match="about 15 more"):
        redrive(engine.pipeline, engine.broker, ["nothing like it"])
    before = len(server.messages(engine.pipeline.stage("work").inputs[0]))
    assert numbers(redrive(engine.pipeline, engine.broker, None).letters) == list(range(25))
    back = server.messages(engine.pipeline.stage("work").inputs[0])[before:]
    assert len(back) == 25
    assert {record["group"] for record in back} == {"key"}
    with connect(engine) as connection:
        got: list[int] = []
        while len(got) < 25:
            batch = connection.receive([engine.pipeline.stage("work").inputs[0]], 10, 1.0, 30.0)
            got += [json.loads(received.body)["value"]["n"] for received in batch]
            connection.complete([Completion(received.handle) for received in batch])
    assert got == list(range(25))


def test_an_engine_that_fails_them_again_at_once_does_not_keep_a_redrive_going(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work", group=by_key)], fifo=True)
    bury(engine, "work", *range(5), group="key")

    def failing_again(complete: Any, completions: Sequence[Completion]) -> list[Handle]:
        back = [
            Completion(
                each.input,
                tuple(Output("t-work--dead.fifo", out.body, uuid.uuid4().hex, "key") for out in each.outputs),
            )
            for each in completions
        ]
        return list(complete(back))

    moved = redrive(engine.pipeline, Wrapped(engine.broker, "complete", failing_again), None)
    assert numbers(moved.letters) == list(range(5))
    assert dead_depth(engine) == (5, 0)


def test_only_what_was_asked_for_is_moved_or_deleted(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    bury(engine, "work", 1, 2, 3)
    one, two, three = (letter.id for letter in engine.dead_letters())
    assert numbers(discard(engine.pipeline, engine.broker, [two]).letters) == [2]
    assert numbers(redrive(engine.pipeline, engine.broker, [three]).letters) == [3]
    assert numbers(engine.dead_letters()) == [1]
    assert waiting(engine, "work") == (1, 0, 0)
    with pytest.raises(ConfigError, match="no luck"):
        redrive(engine.pipeline, engine.broker, [one, "no luck"])
    assert dead_depth(engine) == (1, 0)


def test_what_another_command_took_meanwhile_is_told(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    bury(engine, "work", 1)

    def too_late(complete: Any, completions: Sequence[Completion]) -> list[Handle]:
        show_all(db)
        discard(engine.pipeline, engine.broker, None)
        return list(complete(completions))

    moved = redrive(engine.pipeline, Wrapped(engine.broker, "complete", too_late), None)
    assert (moved.letters, numbers(moved.missed)) == ([], [1])
    assert waiting(engine, "work") == (0, 0, 0)


def show_all(db: Path) -> None:
    """Let every visibility timeout end."""
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("UPDATE messages SET visible_at = 0")
        connection.commit()


# --- given back, not lost ---


def test_looking_leaves_everything_visible(db: Path, sqs: SQS) -> None:
    for broker in (SQLite(db), sqs):
        engine = engine_on(broker, [source, Task(sink, name="work")])
        bury(engine, "work", *range(25))
        assert sorted(numbers(engine.dead_letters())) == list(range(25))
        assert dead_depth(engine) == (25, 0)


def test_what_is_delivered_twice_is_shown_once(sqs: SQS, server: StandIn) -> None:
    engine = engine_on(sqs, [source, Task(sink, name="work")])
    bury(engine, "work", *range(12))
    server.faults(duplicate=1.0)
    try:
        assert sorted(numbers(engine.dead_letters())) == list(range(12))
    finally:
        server.faults(duplicate=0.0)


def test_ctrl_c_while_looking_gives_everything_back(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    bury(engine, "work", *range(250))

    signals = [signal.SIGINT]

    def interrupted(receive: Any, *args: Any, **named: Any) -> list[Received]:
        found: list[Received] = receive(*args, **named)
        if signals:
            os.kill(os.getpid(), signals.pop())
        return found

    with pytest.raises(KeyboardInterrupt):
        look(engine.pipeline, Wrapped(engine.broker, "receive", interrupted))
    assert dead_depth(engine) == (250, 0)


def test_ctrl_c_in_a_redrive_ends_it_between_two_rounds(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    bury(engine, "work", *range(250))
    noticed = threading.Event()

    def interrupted(complete: Any, completions: Sequence[Completion]) -> list[Handle]:
        os.kill(os.getpid(), signal.SIGINT)
        assert noticed.wait(TIMEOUT)
        return list(complete(completions))

    class Noticing(Wrapped):
        def open(self, **settings: Any) -> Any:
            connection = super().open(**settings)
            interrupt = connection.interrupt
            connection.interrupt = lambda: (interrupt(), noticed.set())
            return connection

    with pytest.raises(KeyboardInterrupt):
        redrive(engine.pipeline, Noticing(engine.broker, "complete", interrupted), None)
    assert waiting(engine, "work") == (100, 0, 0)
    assert dead_depth(engine) == (150, 0)


def test_an_error_gives_everything_back(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    bury(engine, "work", *range(3))

    def broken(complete: Any, completions: Sequence[Completion]) -> list[Handle]:
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        redrive(engine.pipeline, Wrapped(engine.broker, "complete", broken), None)
    assert dead_depth(engine) == (3, 0)


def test_a_look_that_is_killed_hides_for_a_minute(sqs: SQS, server: StandIn) -> None:
    engine = engine_on(sqs, [source, Task(sink, name="work")])
    bury(engine, "work", *range(5))

    def killed(receive: Any, *args: Any, **named: Any) -> None:
        receive(*args, **named)
        os._exit(9)

    die_in(engine, "receive", killed, look)
    assert dead_depth(engine) == (0, 5)
    found = survey(engine.pipeline, engine.broker)
    assert (found.letters, found.hidden) == ([], 5)
    server.advance(61)
    assert sorted(numbers(engine.dead_letters())) == list(range(5))


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_a_redrive_killed_between_send_and_delete_loses_nothing(sqs: SQS, server: StandIn, fifo: bool) -> None:
    engine = engine_on(sqs, [source, Task(sink, name="work")], fifo=fifo)
    bury(engine, "work", 1, 2, 3)
    queue = engine.pipeline.stage("work").inputs[0]

    def killed(complete: Any, completions: Sequence[Completion]) -> None:
        complete(completions, lambda _: os._exit(9))

    die_in(engine, "complete", killed, redrive, None)
    assert waiting(engine, "work")[0] == 3
    assert dead_depth(engine) == (0, 3)
    server.advance(61)
    assert sorted(numbers(redrive(engine.pipeline, engine.broker, None).letters)) == [1, 2, 3]
    # FIFO drops what was sent before; a standard queue has it twice, as after any crash between the two.
    sent = 1 if fifo else 2
    with connect(engine) as connection:
        found = [each for _ in range(3) for each in connection.receive([queue], 10, 0.0, 30.0)]
    assert Counter(json.loads(each.body)["value"]["n"] for each in found) == {1: sent, 2: sent, 3: sent}
    assert engine.dead_letters() == []


def killed_in_its_second_round() -> Callable[[Any, Sequence[Completion]], list[Handle]]:
    rounds: list[int] = []

    def killed(complete: Any, completions: Sequence[Completion]) -> list[Handle]:
        rounds.append(len(completions))
        if len(rounds) == 2:
            os._exit(9)
        return list(complete(completions))

    return killed


def test_a_redrive_killed_between_two_rounds_loses_nothing(db: Path) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    bury(engine, "work", *range(250))
    die_in(engine, "complete", killed_in_its_second_round(), redrive, None)
    assert (len(bodies(engine, "t-source")), dead_depth(engine)) == (100, (0, 150))
    show_all(db)
    redrive(engine.pipeline, engine.broker, None)
    assert sorted(json.loads(body)["value"]["n"] for body in bodies(engine, "t-source")) == list(range(250))


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_a_discard_killed_between_two_rounds_deletes_nothing_else(sqs: SQS, server: StandIn, fifo: bool) -> None:
    tasks = [source, Task(sink, name="work"), Task(sink, name="other")]
    engine = engine_on(sqs, tasks, fifo=fifo)
    bury(engine, "work", *range(25))
    bury(engine, "other", 100, 101)
    feed(engine, "work", [{"n": 200}])
    letters = engine.dead_letters()
    wanted = {letter.id for letter in letters if letter.stage == "work" and letter.value["n"] != 7}
    die_in(engine, "complete", killed_in_its_second_round(), discard, wanted)
    # What it had received is hidden for a while: counted, and not touched by another one.
    batch = 10
    assert dead_depth(engine) == (0, 25 - batch)
    server.advance(61)
    left = numbers(engine.dead_letters())
    assert len(left) == 25 - batch + 2
    assert {7, 100, 101} < set(left)
    rest = {letter.id for letter in engine.dead_letters()} & wanted
    assert len(discard(engine.pipeline, engine.broker, rest).letters) == 24 - batch
    assert sorted(numbers(engine.dead_letters())) == [7, 100, 101]
    assert dead_depth(engine) == (1, 0)
    assert dead_depth(engine, "other") == (2, 0)
    assert waiting(engine, "work") == (1, 0, 0)


# --- ids ---

IDS = st.lists(st.text("ab0", min_size=1, max_size=14), min_size=1, max_size=12)


@given(IDS)
def test_a_short_id_means_the_one_it_was_made_of(ids: list[str]) -> None:
    short = short_ids(ids)
    assert short.keys() == set(ids)
    for ident, beginning in short.items():
        assert ident.startswith(beginning)
        assert len(beginning) >= min(8, len(ident))
        assert resolve_ids(ids, [beginning]) == {ident}


def test_an_id_that_fits_none_or_several_is_refused_with_candidates() -> None:
    known = ["aaaaaaaa1", "aaaaaaaa2", "bbbbbbbbbb", "cccccccccc"]
    assert resolve_ids(known, ["b", "aaaaaaaa2"]) == {"bbbbbbbbbb", "aaaaaaaa2"}
    with pytest.raises(ConfigError, match=r"These begin so: aaaaaaaa1, aaaaaaaa2$"):
        resolve_ids(known, ["b", "aa"])
    with pytest.raises(ConfigError, match=r"'x'\. There are: aaaaaaaa1, aaaaaaaa2, bbbbbbbb, cccccccc$"):
        resolve_ids(known, ["x"])
    with pytest.raises(ConfigError, match=r"There are: 00000000, .* and 4 more$"):
        resolve_ids([f"{number}0000000" for number in range(9)], [""])
    with pytest.raises(ConfigError, match=r"There are none$"):
        resolve_ids([], ["x"])


def test_the_note_names_the_message_as_dead_list_does(db: Path) -> None:
    engine = engine_at(db, [Task(explode, name="work", input=True, max_attempts=1)])
    engine.put(1)
    with pytest.raises(ValueError, match="1") as caught:
        engine.run()
    (letter,) = engine.dead_letters()
    assert letter.id.startswith(caught.value.__notes__[-1].rpartition(", message ")[2].partition(" ")[0])


def explode(value):
    raise ValueError(value)
