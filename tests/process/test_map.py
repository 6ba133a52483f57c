"""``engine.map``: each value's result once, whatever dies, and to the end after an interruption."""

import contextlib
import itertools
import os
import random
import re
import signal
import sqlite3
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import (
    SQS,
    ConfigError,
    EmptyTaskOutput,
    Engine,
    MapIncomplete,
    OutputError,
    QueuesNotEmpty,
    Reject,
    RemoteError,
    Retry,
    SQLite,
    SupervisorLost,
    Task,
    TaskLike,
    TaskTimeout,
    WorkerLost,
    current_message,
)
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from sqspipes_mp.caller.dead_letters import discard, redrive
from sqspipes_mp.caller.stats import opened
from sqspipes_mp.engine import every_queue
from standin import standin
from standin.brokers import sqs_at
from tests.gates import Gate, Log, alive, children, direct_children, ended, eventually, kill, present, program, waiting


def double(value):
    return 2 * value


def less(value):
    return value - 1


def pipeline(db: Path, *tasks: TaskLike, **settings: Any) -> Engine:
    chosen = tasks or (Task(double, workers=2), Task(less, workers=2))
    return Engine(list(chosen), domain="t", broker=SQLite(db), **settings)


def left(engine: Engine) -> int:
    return sum(stage.visible + stage.in_flight + stage.delayed for stage in engine.stats().stages)


# --- what comes out ---


def test_each_values_result_once_and_nothing_left(db: Path) -> None:
    engine = pipeline(db)
    with engine.map(range(700)) as results:
        found = list(results)
    assert sorted(found) == [2 * n - 1 for n in range(700)]
    assert results.summary.reason == "ended"
    assert present(results.summary)["less"].done == 700
    assert left(engine) == 0
    assert children() == []
    assert list(engine.map([])) == []


@pytest.mark.parametrize("fifo", [False, True])
def test_ordered_and_with_input(db: Path, fifo: bool) -> None:
    engine = pipeline(db, Task(jitter, workers=3), Task(less, workers=2), fifo=fifo)
    assert list(engine.map(range(300), ordered=True)) == [n - 1 for n in range(300)]
    pairs = list(engine.map(iter(range(100)), ordered=True, with_input=True))
    assert pairs == [(n, n - 1) for n in range(100)]
    assert sorted(engine.map(iter(range(100)), with_input=True)) == pairs


def jitter(value):
    random.seed(value)
    sum(range(int(random.random() * 20_000)))
    return value


def breaks_off(value: int):
    yield from range(value)
    raise ValueError("broken off")


def after_the_letter(value: int, gate: Gate) -> int:
    gate.wait()
    return -value


@pytest.mark.parametrize("kind", ["sqlite", "sqs"])
@pytest.mark.parametrize("ordered", [False, True])
def test_outputs_sent_before_their_generator_was_given_up_have_their_results(
    db: Path, gate: Gate, kind: str, ordered: bool
) -> None:
    with standin() if kind == "sqs" else contextlib.nullcontext() as server:
        broker = SQLite(db) if server is None else sqs_at(server.url)
        tasks = [Task(breaks_off, max_attempts=1), Task(after_the_letter, args=(gate,))]
        engine = Engine(tasks, domain="t", broker=broker, on_error="retry")
        with opened(engine.broker) as connection:
            sent = 2 * connection.batch
        results = engine.map([sent + 5], ordered=ordered, return_exceptions=True)

        def opens() -> None:
            eventually(lambda: engine.stats()["breaks_off"].dead == 1, "the generator is given up")
            gate.open()

        thread = threading.Thread(target=opens)
        thread.start()
        try:
            found = list(results)
        finally:
            thread.join()
        errors = [each for each in found if isinstance(each, BaseException)]
        assert [str(error) for error in errors] == ["broken off"]
        # Two full batches were accepted before.
        assert sorted(-each for each in found if isinstance(each, int)) == list(range(sent))


def passes_once(value: int, log: Log, gate: Gate, then: str) -> int | None:
    log.note(value, os.getpid())
    if value or len([each for each, _ in log.lines() if each == 0]) == 1:
        if value == 0:
            gate.wait()
        return value
    if then == "reject":
        raise Reject("it was moved before")
    return None


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("then", ["reject", "drop"])
def test_outputs_of_a_worker_that_died_before_they_were_accepted_are_not_awaited(
    db: Path, log: Log, gate: Gate, then: str, ordered: bool
) -> None:
    engine = pipeline(db, Task(passes_once, args=(log, gate, then)), Task(same), visibility_timeout=30)
    results = engine.map(range(8), ordered=ordered, return_exceptions=True)

    def dies() -> None:
        [(_, worker)] = [line for line in log.wait_for(1) if line[0] == 0]
        with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as others:
            others.execute("BEGIN IMMEDIATE")
            gate.open()
            told = results._ledger  # type: ignore[attr-defined]
            eventually(lambda: any(entry.announced for entry in list(told._open.values())), "the output is announced")
            kill(worker, signal.SIGKILL)
            others.execute("ROLLBACK")

    with ThreadPoolExecutor(1) as beside:
        death = beside.submit(dies)
        found = list(results)
        death.result()
    errors = [str(each) for each in found if isinstance(each, BaseException)]
    assert errors == (["it was moved before"] if then == "reject" else [])
    numbers = [each for each in found if not isinstance(each, BaseException)]
    assert (numbers if ordered else sorted(numbers)) == list(range(1, 8))
    assert left(engine) == 0


def fans_out(value: int, log: Log, gate: Gate) -> Iterator[int]:
    log.note(value, os.getpid())
    gate.wait()
    for number in range(40 if value == 0 else 1):
        yield 100 * value + number


@pytest.mark.parametrize("ordered", [False, True])
def test_outputs_that_were_accepted_and_not_reported_have_their_results_after_the_error(
    log: Log, gate: Gate, ordered: bool
) -> None:
    with standin() as server:
        tasks = [Task(fans_out, args=(log, gate), max_attempts=1), Task(same)]
        engine = Engine(tasks, domain="t", broker=sqs_at(server.url), on_error="retry")

        results = engine.map(range(2), ordered=ordered, return_exceptions=True)

        def dies() -> None:
            [(_, worker)] = log.wait_for(1)
            server.plan("SendMessageBatch", "lost_reply", times=4)
            gate.open()
            eventually(lambda: len(server.messages("t-fans_out")) >= 10, "outputs are accepted")
            kill(worker, signal.SIGKILL)

        with ThreadPoolExecutor(1) as beside:
            death = beside.submit(dies)
            found = list(results)
            death.result()
    assert [type(each) for each in found if isinstance(each, BaseException)] == [WorkerLost]
    numbers = sorted(each for each in found if isinstance(each, int))
    assert numbers[-1] == 100
    assert numbers[:-1] == list(range(len(numbers) - 1))
    assert len(numbers) > 10


def test_an_endless_iterable_is_read_as_results_are_taken(db: Path) -> None:
    read = itertools.count()
    engine = pipeline(db)
    with engine.map(read, ordered=True) as results:
        first = [next(results) for _ in range(600)]
    assert first == [2 * n - 1 for n in range(600)]
    assert next(read) < 600 + 400
    assert children() == []
    with pytest.raises(
        QueuesNotEmpty,
        match=r"^\d+ messages are still .* own. Finish them: write Task\(double, input=True\), then run\(until=.*purge",
    ) as caught:
        engine.map([1])
    assert caught.value.count == left(engine) > 0
    with pytest.raises(QueuesNotEmpty, match=r"own. Continue an interrupted map .* resume=True, finish .*purge"):
        pipeline(db, Task(double, input=True), less).map([1], key=str)
    engine.purge()
    assert list(engine.map([1])) == [1]


def test_drops_do_not_hang_it_and_fan_outs_do_not_end_it_early(db: Path) -> None:
    engine = pipeline(db, Task(spread, input=True, workers=2), Task(odd, workers=2), Task(same, workers=2))
    found = sorted(engine.map(range(300), with_input=True))
    assert found == sorted((n, k) for n in range(300) for k in range(n % 7) if k % 2)
    found = list(engine.map(range(60), ordered=True, with_input=True))
    assert [n for n, _ in found] == sorted(n for n, _ in found)
    assert len(found) == sum(n % 7 // 2 for n in range(60))
    assert left(engine) == 0


def spread(value):
    yield from range(value % 7)


def odd(value):
    return value if value % 2 else None


def same(value):
    return value


def test_none_and_tuples_come_back_as_they_are(db: Path) -> None:
    engine = pipeline(db, Task(same, name="first"), Task(kinds, name="kinds"))
    assert list(engine.map(range(4), ordered=True)) == [None, (1, 2), {3}]


def kinds(value):
    return [None, (1, 2), EmptyTaskOutput, {3}][value]


# --- what fails ---


def picky(value):
    if value % 10 == 3:
        raise Reject(f"no {value}")
    if value % 10 == 7:
        raise KeyError(value)
    return value


def test_errors_come_as_results_with_their_values(db: Path) -> None:
    engine = pipeline(db, Task(same, name="first"), Task(picky, workers=2))
    found = list(engine.map(range(60), ordered=True, return_exceptions=True))
    for n, item in enumerate(found):
        if n % 10 in (3, 7):
            assert isinstance(item, Reject if n % 10 == 3 else KeyError)
            assert item.value == n
        else:
            assert item == n
    assert len(found) == 60
    assert len(engine.dead_letters()) == 12
    assert left(engine) == 0


def test_a_dead_lettered_value_raises_and_the_rest_stays(db: Path) -> None:
    engine = pipeline(db, Task(picky, on_error="reject"))
    results = engine.map(range(50), ordered=True)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Reject, match="no 3") as caught:
        next(results)
    assert caught.value.value == 3  # type: ignore[attr-defined]
    assert children() == []
    assert list(results) == []
    assert left(engine) > 30


def test_what_a_task_raises_ends_it(db: Path) -> None:
    engine = pipeline(db, Task(picky))
    with pytest.raises(KeyError), engine.map([1, 7]) as results:
        list(results)
    # The first result was handed out, and the next one asked for; the end may have come before that was heard.
    assert left(engine) in (1, 2)


def test_a_value_that_cannot_be_sent_is_its_own_error(db: Path) -> None:
    engine = pipeline(db)
    found = list(engine.map([1, {2}, 3], ordered=True, return_exceptions=True))
    assert (found[0], found[2]) == (1, 5)
    assert isinstance(found[1], OutputError)
    assert found[1].value == {2}  # type: ignore[attr-defined]
    with pytest.raises(OutputError):
        list(engine.map([{2}]))


def test_an_iterable_that_raises_ends_it(db: Path) -> None:
    def broken():
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(pipeline(db).map(broken()))
    assert children() == []


def deadly(value):
    if value == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if value == 6:
        while True:
            pass
    return value


def test_values_that_kill_their_worker_end_as_errors(db: Path) -> None:
    engine = pipeline(db, Task(deadly, workers=2, max_attempts=1, timeout=2.0), visibility_timeout=6)
    found = list(engine.map(range(40), ordered=True, return_exceptions=True))
    assert type(found[5]) is WorkerLost
    assert type(found[6]) is TaskTimeout
    assert (found[5].value, found[6].value) == (5, 6)  # type: ignore[attr-defined]
    assert [item for item in found if isinstance(item, int)] == [n for n in range(40) if n not in (5, 6)]


# --- who dies ---


def slowly(value, log: Log):
    log.note(value, os.getpid())
    sum(range(30_000))
    return value


def test_killed_workers_cost_nothing(db: Path, log: Log) -> None:
    # What a receive brings while its worker dies is hidden for that long.
    engine = pipeline(db, Task(slowly, workers=2, args=(log,)), Task(same, workers=2), visibility_timeout=2)
    found = []
    with engine.map(range(600)) as results:
        for count, value in enumerate(results):
            found.append(value)
            if count in (100, 300):
                supervisor = direct_children()[0]
                for pid in random.sample(direct_children(supervisor)[1:], 2):
                    # It may be one that was killed before.
                    with contextlib.suppress(ProcessLookupError):
                        kill(pid)
    assert sorted(found) == list(range(600))
    assert left(engine) == 0


def test_results_that_others_took_are_missed(db: Path, gate: Gate, log: Log) -> None:
    engine = pipeline(db, Task(held, args=(log, gate)), Task(same))
    results = engine.map(range(3))
    thief = pipeline(db, Task(held, args=(log, gate)), Task(same))

    def steal() -> None:
        log.wait_for(1)
        with opened(thief.broker) as connection:
            connection.purge(every_queue(thief).queue_names())
        gate.open()

    thread = threading.Thread(target=steal)
    thread.start()
    with pytest.raises(MapIncomplete, match="another process took them") as caught:
        list(results)
    thread.join()
    assert caught.value.missing == 3
    assert children() == []


def held(value, log: Log, gate: Gate):
    log.note(value)
    gate.wait()
    return value


# --- interruption ---

RESUMED = textwrap.dedent("""
    import signal
    import sys
    from sqspipes_mp import Engine, SQLite, Task
    from tests.gates import Log

    def work(value, log):
        log.note(value)
        return value

    def same(value):
        return value

    def engine(db, log):
        return Engine(
            [Task(work, workers=2, args=(log,)), Task(same, workers=2)],
            domain="t", broker=SQLite(db), visibility_timeout=2,
        )

    if __name__ == "__main__":
        done = Log(sys.argv[3])
        results = engine(sys.argv[1], Log(sys.argv[2])).map(range(800), key=str, resume=True)
        for count, value in enumerate(results):
            done.note(value)
            if count == 600 and "stays" in sys.argv:
                # It is to be killed half-way, however late that comes.
                signal.pause()
""")


def test_kill_everything_half_way_and_resume(db: Path, log: Log, tmp_path: Path) -> None:
    done = Log(str(tmp_path / "done"))
    with program(tmp_path, RESUMED, db, log.path, done.path, "stays") as process:
        done.wait_for(300)
        family = [process.pid, *[child.pid for child in children(process.pid)]]
        for pid in family:
            kill(pid)
        process.wait()
        eventually(lambda: not any(alive(pid) for pid in family[1:]))
    before = done.lines()
    assert 300 <= len(before) < 800
    with program(tmp_path, RESUMED, db, log.path, done.path) as process:
        status, _, err = ended(process)
        # Of what was in flight at the kill, unless its leases ended meanwhile.
        known = r"t: waiting for \d+ messages .*within 2 s, when its leases end$"
        # What a machine that is too busy for leases of 2 s makes it say.
        known += r"|the keeper \(pid \d+\) |\w+: the lease of message "
        known += r"|t: \d+ values were done by earlier runs since "
        assert (status, [line for line in err.splitlines() if not re.match(known, line)]) == (0, [])
    after = done.lines()[len(before) :]
    assert set(before) | set(after) == set(range(800))
    assert len(after) == len(set(after))
    # What comes again was handed out, but its acknowledgement had not been carried out yet.
    assert len(set(before) & set(after)) < 200
    ran = log.lines()
    # In flight at the kill: in each first worker what it held, and what was not accepted yet.
    assert len(ran) - 800 <= 2 * 192
    with program(tmp_path, RESUMED, db, log.path, done.path) as process:
        assert ended(process)[0] == 0
    assert len(done.lines()) == len(before) + len(after)


def test_interrupted_between_the_send_and_its_note_nothing_is_lost(
    db: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pipeline(db, Task(noted, args=(log,)))
    feed = SQLiteConnection.feed

    def interrupted(self, outputs, *, keyed, wanted=None):
        feed(self, outputs, keyed=keyed)
        log.wait_for(5)
        os.kill(os.getpid(), signal.SIGINT)

    results = engine.map(range(5), key=str)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SQLiteConnection, "feed", interrupted)
        next(results)
    # It is closed, but its end must not look like that of a whole map.
    with pytest.raises(MapIncomplete, match="interrupted") as caught:
        next(results)
    assert caught.value.missing == 5
    assert sorted(engine.map(range(5), key=str, resume=True)) == list(range(5))


def noted(value, log: Log):
    log.note(value)
    return value


def test_resume_in_order_with_inputs(db: Path) -> None:
    engine = pipeline(db, visibility_timeout=2)
    results = engine.map(range(400), ordered=True, with_input=True, key=str)
    first = [next(results) for _ in range(150)]
    results.close()
    second = list(engine.map(range(400), ordered=True, with_input=True, key=str, resume=True))
    assert first == [(n, 2 * n - 1) for n in range(150)]
    assert second == [(n, 2 * n - 1) for n in range(149, 400)]
    assert list(engine.map(range(400), key=str, resume=True)) == []
    # Something new among what is known.
    assert list(engine.map(range(402), key=str, resume=True, ordered=True)) == [799, 801]


def test_what_an_earlier_run_dead_lettered_is_told_until_it_is_redriven_or_discarded(db: Path) -> None:
    engine = pipeline(db, Task(same, name="first", input=True), Task(picky, max_attempts=2))
    engine.put(3, key="a stranger's")
    engine.run(until="drained", idle=0.0)
    values = [1, 7, 2, 2]
    for _ in range(2):
        with pytest.raises(KeyError):
            list(engine.map(values, key=str, resume=True))
    with pytest.raises(RemoteError, match="KeyError: 7") as caught:
        list(engine.map(values, key=str, resume=True))
    assert caught.value.value == 7  # type: ignore[attr-defined]
    assert "sqspipes-mp dead list" in caught.value.__notes__[-1]
    assert str(caught.value) == "KeyError: 7"
    assert "in picky" in caught.value.__notes__[0]
    for asked in ({}, {"ordered": True}, {"with_input": True}):
        found = list(engine.map([*values, 7], key=str, resume=True, return_exceptions=True, **asked))
        [error] = [pair[1] if "with_input" in asked else pair for pair in found if not isinstance(pair, int)]
        assert (type(error), error.value) == (RemoteError, 7)
    [letter] = [letter for letter in engine.dead_letters() if letter.value == 7]
    redrive(engine.pipeline, engine.broker, [letter.id])
    [error] = engine.map(values, key=str, resume=True, return_exceptions=True)
    assert (type(error), error.value) == (KeyError, 7)
    discard(engine.pipeline, engine.broker, None)
    assert list(engine.map(values, key=str, resume=True)) == []


def test_what_the_iterable_no_longer_has_comes_last(db: Path) -> None:
    engine = pipeline(db, visibility_timeout=2)
    results = engine.map(range(100), key=str)
    next(results)
    results.close()
    found = list(engine.map(["new"], ordered=True, with_input=True, key=str, resume=True, return_exceptions=True))
    assert found[0][0] == "new"
    assert {value for value, _ in found[1:]} == {None}
    assert len(found) in (100, 101)


def test_known_keys_are_told_without_resume(db: Path) -> None:
    engine = pipeline(db)
    assert list(engine.map([1], key=str)) == [1]
    with pytest.raises(ConfigError, match=r"resume=True.*purge"):
        list(engine.map([1], key=str))
    engine.purge()
    with pytest.raises(ConfigError, match="seen before"):
        list(engine.map([1, 1], key=str))


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({}, r"Finish them.*or drop them with purge\(\)"),
        ({"key": str}, r"resume=True, finish them.*or drop them with purge\(\)"),
        ({"key": str, "resume": True}, "Run it again, with the same values: it goes on where it was"),
    ],
)
def test_stop_says_what_is_missing_and_what_can_be_done_here(
    db: Path, log: Log, options: dict[str, Any], cure: str
) -> None:
    engine = pipeline(db, Task(slowly, args=(log,)))
    results = engine.map(itertools.count(), **options)
    next(results)
    engine.stop()
    with pytest.raises(MapIncomplete, match=rf"stopped.*{cure}$"):
        list(results)
    assert children() == []


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"ordered": 1}, "ordered"),
        ({"resume": True}, "key"),
        ({"key": "k"}, "key"),
        ({"values": 5}, "values"),
    ],
)
def test_bad_arguments(db: Path, arguments: dict[str, Any], names: str) -> None:
    values = arguments.pop("values", [1])
    with pytest.raises(ConfigError, match=rf"map\({names}"):
        pipeline(db).map(values, **arguments)
    assert not db.exists()


def test_waiting_is_of_the_fed_queue(db: Path) -> None:
    engine = pipeline(db, Task(same, input=True))
    engine.put(1)
    assert waiting(engine, "same") == (1, 0, 0)
    with pytest.raises(QueuesNotEmpty):
        engine.map([2])


def test_a_lost_supervisor_is_told_and_the_map_resumed(db: Path) -> None:
    engine = pipeline(db, visibility_timeout=2)
    results = engine.map(range(300), key=str)
    found = [next(results) for _ in range(20)]
    kill(direct_children()[0])
    with pytest.raises(SupervisorLost):
        list(results)
    eventually(lambda: not children())
    found += engine.map(range(300), key=str, resume=True)
    assert set(found) == {2 * n - 1 for n in range(300)}


@pytest.mark.slow
def test_on_sqs(moto: SQS) -> None:
    engine = Engine([Task(double, workers=2), Task(picky, workers=2)], domain="map", broker=moto)
    found = list(engine.map(range(60), ordered=True, with_input=True, return_exceptions=True))
    assert [n for n, _ in found] == list(range(60))
    assert [item for _, item in found if not isinstance(item, KeyError)] == [2 * n for n in range(60)]
    with pytest.raises(ConfigError, match="SQS"):
        engine.map([1], key=str, resume=True)
    fed = Engine([Task(double, input=True)], domain="map", broker=moto)
    assert fed.put_many(range(25)) == 25
    assert len(fed.put(1)) == 32
    # Polls of the map that were cut off may still take some, and be counted twice while they do.
    eventually(lambda: left(fed) == 26)
    with pytest.raises(QueuesNotEmpty, match=r"^26 messages .* own. Finish them with run"):
        fed.map([1])
    engine.delete()


def test_keys_on_sqs_fifo_are_ids_and_each_map_sends_them_anew() -> None:
    taken: list[str] = []

    def values():
        yield "again"
        while "again" not in taken:
            yield f"filler {len(taken)} {next(count)}"
        yield "again"

    count = itertools.count()
    with standin() as server:
        engine = Engine([ident], domain="map", broker=sqs_at(server.url), fifo=True)
        assert list(engine.map(["again"], key=str)) == ["again"]
        with (
            pytest.raises(ConfigError, match=r"map\(key\).*seen before") as caught,
            engine.map(values(), key=str) as results,
        ):
            for value in results:
                taken.append(value)
        assert "again" in taken
        assert "resume" not in str(caught.value)


def ident(value):
    return current_message().id


def first_fails_once(value, log: Log):
    log.note(value)
    if value == 0 and log.lines().count(0) == 1:
        raise Retry(1.0)
    return value


def test_ordered_results_that_wait_do_not_keep_their_worker_from_being_replaced(db: Path, log: Log) -> None:
    sink = Task(first_fails_once, args=(log,), max_tasks_per_worker=3)
    engine = pipeline(db, sink, on_error=lambda *_: "retry")
    assert list(engine.map(range(8), ordered=True)) == list(range(8))
    assert left(engine) == 0
