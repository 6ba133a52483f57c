"""vitals.py: when an engine is ready, without a process."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from sqspipes_mp import SQLite, Task
from sqspipes_mp.ipc.running import fixed
from sqspipes_mp.ipc.statistics import (
    CALL_STARTED,
    CPU_NS,
    LAST_CONTACT,
    LAST_TROUBLE,
    PAUSED,
    READINESS,
    RESTS,
    SUPERVISOR_BEAT,
    SlotField,
)
from sqspipes_mp.pipeline.plan import Settings, make_plan
from sqspipes_mp.pipeline.stages import build
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.run import new_board
from sqspipes_mp.supervisor.slot import Slot, Worker
from sqspipes_mp.supervisor.vitals import Vitals

SECOND = 1_000_000_000


def source() -> object:
    return None


def work(value: object) -> object:
    return value


@dataclass
class Process:
    """Stands for a child: this process, which lives."""

    pid: int


class Bench:
    """A source and a stage with two workers, none of them started."""

    def __init__(self) -> None:
        pipeline = build([Task(source), Task(work, workers=2)], domain="t", fifo=False, visibility=60.0)
        plan = make_plan(pipeline, Settings())
        self.board = new_board(plan)
        nothing: Any = None
        self.children = Children(plan, SQLite("unused.db"), self.board, nothing, nothing)
        self.vitals = Vitals(self.children)

    def start(self, *slots: int) -> None:
        """Have workers booted at second 1."""
        for index in slots:
            child: Any = Process(os.getpid())
            nothing: Any = None
            self.slot(index).started(Worker(child, nothing, nothing), 1.0)
            self.slot(index).got_ready()

    def slot(self, index: int) -> Slot:
        return self.children.slots[index]

    def put(self, index: int, field: SlotField, value: int) -> None:
        self.board.put(self.slot(index).index, field, value)

    def readiness(self, now: float) -> int:
        """Return READINESS as of ``now``, seconds."""
        self.vitals.changed()
        self.vitals.look(now, ending=False)
        return self.board.header(READINESS)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.board.close()


def test_each_stage_needs_a_booted_worker(bench: Bench) -> None:
    assert bench.readiness(2.0) == 0 << 8 | fixed.NO_WORKER
    bench.start(0)
    assert bench.readiness(2.0) == 1 << 8 | fixed.NO_WORKER
    bench.start(2)
    assert bench.readiness(2.0) == fixed.READY
    assert bench.board.header(SUPERVISOR_BEAT) == 2 * SECOND
    bench.vitals.changed()
    bench.vitals.look(3.0, ending=True)
    assert bench.board.header(READINESS) == fixed.ENDING


def test_a_stage_without_contact_is_ready_while_all_its_workers_are_busy_or_wait_on_purpose(bench: Bench) -> None:
    bench.start(0, 1, 2)
    board = bench.board
    away = 1 << 8 | fixed.NO_CONTACT
    assert bench.readiness(60.0) == fixed.READY
    assert bench.readiness(62.0) == away
    bench.put(1, CALL_STARTED, 5 * SECOND)
    assert bench.readiness(999.0) == away
    bench.put(2, RESTS, 1)
    assert bench.readiness(999.0) == fixed.READY
    bench.put(2, RESTS, 0)
    bench.put(2, LAST_CONTACT, 990 * SECOND)
    assert bench.readiness(999.0) == fixed.READY
    bench.put(2, LAST_CONTACT, 0)
    board.set_stage(1, PAUSED, 1)
    assert bench.readiness(999.0) == fixed.READY


def test_a_source_that_asks_nothing_is_ready_and_one_that_is_not_answered_is_not(bench: Bench) -> None:
    bench.start(0, 1)
    bench.put(1, CALL_STARTED, SECOND)
    assert bench.readiness(999.0) == fixed.READY
    bench.put(0, LAST_TROUBLE, 900 * SECOND)
    assert bench.readiness(999.0) == 0 << 8 | fixed.NO_CONTACT
    bench.slot(0).source_ended()
    bench.slot(0).leaves(999.0)
    bench.slot(0).died()
    assert bench.readiness(999.0) == fixed.READY


def test_cpu_never_goes_back_where_the_kernel_does_not_tell(bench: Bench) -> None:
    bench.start(0)
    bench.vitals.look(10.0, ending=False)
    before = bench.board.get(0, CPU_NS)
    assert before > 0
    child: Any = Process(2**22 + 1)
    worker = bench.slot(0).worker
    assert worker is not None
    bench.vitals.dead(bench.slot(0), Worker(child, worker.region, worker.stack))
    assert bench.board.get(0, CPU_NS) == before
