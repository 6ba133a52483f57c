"""The three-stage word pipeline, in one engine and spread over programs, on both brokers."""

import contextlib
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

from sqspipes_mp import SQS, Engine, SQLite, Task
from tests.gates import TIMEOUT, Log, ended, eventually, program

VOWELS = frozenset("aeiou")
WORDS = [f"{'abcdefghijklmnopqrstuvwxyz'[n % 26]}{n:x}aeb" for n in range(60)]
EXPECTED = Counter((word, sum(letter in VOWELS for letter in word)) for word in WORDS)
# Queues of SQS that are no FIFO deliver at least once, and moto now and then gives one message to two who ask at once.
AT_LEAST = set(EXPECTED)


def words():
    yield from WORDS


def vowels(word):
    return word, "".join(letter for letter in word if letter in VOWELS)


def count(pair):
    word, found = pair
    return word, len(found)


def count_into(pair, log: Log):
    log.note(*count(pair))


def pipeline(broker: Any, log: Log | None = None, domain: str = "words") -> Engine:
    last = Task(count) if log is None else Task(count_into, name="count", args=(log,))
    return Engine([words, Task(vowels, workers=2), last], domain=domain, broker=broker)


def test_one_engine_gives_every_word_once(db: Path, log: Log) -> None:
    engine = pipeline(SQLite(db), log)
    summary = engine.run(until="drained")
    assert summary.reason == "drained"
    assert Counter(map(tuple, log.lines())) == EXPECTED
    assert [stage.done for stage in summary.stages] == [60, 60, 60]
    assert [stage.failed for stage in summary.stages] == [0, 0, 0]


def test_iterating_gives_every_word_once(db: Path) -> None:
    with pipeline(SQLite(db)).run(iterate=True, until="drained") as results:
        assert Counter(results) == EXPECTED
        assert results.summary.reason == "drained"


def test_the_temporary_default_file_works_and_goes_with_its_engine(log: Log, own_temporary_folder: Path) -> None:
    engine = pipeline("sqlite://", log)
    engine.run(until="drained")
    assert list(own_temporary_folder.glob("sqspipes*"))
    del engine
    assert Counter(map(tuple, log.lines())) == EXPECTED


def test_it_runs_again_on_the_same_file(db: Path, log: Log) -> None:
    engine = pipeline(SQLite(db), log)
    engine.run(until="drained")
    engine.run(until="drained")
    assert Counter(map(tuple, log.lines())) == Counter(dict.fromkeys(EXPECTED, 2))


def run_stage(broker: Any, log: Log, name: str, domain: str) -> None:
    until: Literal["drained"] | None = "drained" if name == "words" else None
    summary = pipeline(broker, log, domain).run(only=name, until=until)
    log_of_reasons(log).note(name, summary.reason, summary[name].done)


def log_of_reasons(log: Log) -> Log:
    return Log(f"{log.path}-reasons")


STAGE = """
import sys
from sqspipes_mp import SQLite
from tests.gates import Log
from tests.system.test_words import run_stage
name, db, log = sys.argv[1:]
run_stage(SQLite(db), Log(log), name, "words")
"""


@pytest.mark.slow
def test_three_programs_share_the_work_over_sqlite(tmp_path: Path, db: Path, log: Log) -> None:
    with contextlib.ExitStack() as stack:
        # The last stage first: each waits for the one before it.
        programs = [
            stack.enter_context(program(tmp_path, STAGE, name, db, log.path)) for name in ("count", "vowels", "words")
        ]
        log.wait_for(len(WORDS))
        assert ended(programs.pop())[0] == 0
        for each in programs:
            each.terminate()
        assert [ended(each)[0] for each in programs] == [0, 0]
    assert Counter(map(tuple, log.lines())) == EXPECTED
    reasons = {name: (reason, done) for name, reason, done in log_of_reasons(log).lines()}
    assert reasons.pop("words")[1] == len(WORDS)
    assert reasons == {"vowels": ("SIGTERM", len(WORDS)), "count": ("SIGTERM", len(WORDS))}


@pytest.mark.slow
def test_one_engine_on_sqs(moto: SQS, log: Log) -> None:
    engine = pipeline(moto, log, "one")
    assert engine.run(until="drained").reason == "drained"
    engine.delete()
    assert set(map(tuple, log.lines())) == AT_LEAST


@pytest.mark.slow
def test_iterating_on_sqs(moto: SQS) -> None:
    engine = pipeline(moto, domain="iter")
    with engine.run(iterate=True, until="drained") as results:
        assert set(results) == AT_LEAST
    engine.delete()


@pytest.mark.slow
def test_three_processes_share_the_work_over_sqs(moto: SQS, log: Log) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run_stage, args=(moto, log, name, "three")) for name in ("words", "vowels", "count")
    ]
    for process in processes:
        process.start()
    try:
        engine = pipeline(moto, log, "three")
        # There one message may go to two who ask at one instant, so lines alone prove little.
        eventually(lambda: set(map(tuple, log.lines())) == AT_LEAST, "every word")
        empty = [(0, 0, 0)] * 3
        eventually(lambda: [(each.visible, each.in_flight, each.delayed) for each in engine.stats().stages] == empty)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(TIMEOUT)
        assert [process.exitcode for process in processes[1:]] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
    assert [(stage.visible, stage.in_flight, stage.dead) for stage in engine.stats().stages] == [(0, 0, 0)] * 3
    engine.delete()
    assert set(map(tuple, log.lines())) == AT_LEAST
