"""A call that keeps the GIL keeps its own worker from going on, and nobody else."""

import collections
import ctypes
import itertools
import time
from pathlib import Path

from sqspipes_mp import Engine, SQLite, Task
from tests.gates import Log

#: Seconds: several times as long as the leases.
KEPT = 5.0
VISIBILITY = 2.0
#: Values whose call keeps the GIL, while results of those before are on their way out.
LONG = {200, 600, 1000, 1400}


def work(value: int, log: Log) -> int:
    log.note(f"{value} {time.monotonic()}")
    if value in LONG:
        ctypes.PyDLL(None).usleep(int(KEPT * 1_000_000))
        return value
    # Without letting go of the GIL: the worker's other threads are nearly always about to do something.
    until = time.monotonic() + 0.005
    while time.monotonic() < until:
        pass
    return value


def last(value: int) -> None:
    pass


def test_a_call_that_keeps_the_gil_costs_nobody_a_lease(tmp_path: Path, log: Log) -> None:
    broker = SQLite(str(tmp_path / "queues.db"))
    tasks = [Task(work, args=(log,), input=True, workers=3), Task(last)]
    engine = Engine(tasks, domain="t", broker=broker, on_error="retry", visibility_timeout=VISIBILITY)
    engine.put_many(range(2500))
    summary = engine.run(until="drained", idle=0)
    rows = [line.split() for line in log.lines()]
    times = sorted(float(at) for _, at in rows)
    assert [value for value, n in collections.Counter(value for value, _ in rows).items() if n > 1] == []
    assert len(rows) == 2500
    assert summary["last"].done == 2500
    # While there was work; what came last waited for the calls that keep the GIL.
    assert max(b - a for a, b in itertools.pairwise(times[:2000])) < KEPT / 2
