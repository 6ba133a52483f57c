"""Memory: a worker over its own limit, and a container that is nearly full. Who is replaced or killed, and who pays."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sqspipes_mp import Task
from sqspipes_mp.supervisor import memory as limits
from sqspipes_mp.supervisor import watchdog
from sqspipes_mp.supervisor.memory import Fill
from tests.gates import (
    Background,
    Gate,
    Log,
    alive,
    charges,
    children,
    dead,
    ended,
    engine_at,
    eventually,
    feed,
    program,
    values,
)

MB = 1 << 20

_hoard: list[bytearray] = []


def source():
    yield from ()


def sink(value):
    return value


def hoards(value, log: Log, gate: Gate, begin: Gate):
    """Take 70 MB at the first message, and keep them."""
    log.note(value, os.getpid())
    begin.wait()
    if value == 0 and not _hoard:
        _hoard.append(bytearray(b"x") * (70 * MB))
        log.note("has it", os.getpid())
    gate.wait()
    return value


# --- max_memory ---


def load_a_model():
    _hoard.append(bytearray(b"x") * (200 * MB))


def takes_more(value, log: Log, gate: Gate, begin: Gate):
    log.note(value, os.getpid())
    begin.wait()
    if value == "fat":
        _hoard.append(bytearray(b"x") * (150 * MB))
        gate.wait()
    return value


def test_what_init_holds_does_not_count_and_a_message_far_over_max_memory_is_dead_lettered(
    db: Path, log: Log, gate: Gate, begin: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Looks(limits.private_bytes)
    monkeypatch.setattr(limits, "private_bytes", looks)
    for module in (limits, watchdog):
        monkeypatch.setattr(module, "LOOK_EVERY", 0.02)
    task = Task(
        takes_more,
        name="work",
        args=(log, gate, begin),
        init=load_a_model,
        max_memory="50MB",
        max_attempts=1,
        prefetch=3,
    )
    engine = engine_at(db, [source, task, sink], start_method="fork", on_error="retry")
    feed(engine, "work", [1, "fat", 2, 3])
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        log.wait_for(1)
        # While the first one runs its worker is looked at, 200 MB and all.
        eventually(lambda: looks.count > 5)
        begin.open()
    [(body, failure)] = dead(engine, "work")
    assert '"fat"' in body
    assert (failure.error, failure.attempts, failure.signal) == ("WorkerLost", 1, "SIGKILL")
    assert failure.text == "the worker was over its memory limit"
    assert sorted(values(engine, "sink")) == [1, 2, 3]
    assert (run.summary["work"].failed, run.summary["work"].dead) == (1, 1)
    # The first one ran to its end in the worker that took more after it.
    assert log.lines()[0][1] == log.lines()[1][1]


def keeps_and_waits(value, log: Log, gate: Gate):
    if value == "fat":
        _hoard.append(bytearray(b"x") * (200 * MB))
    log.note(value, os.getpid())
    if value == "harmless":
        gate.wait()
    return value


def test_what_an_earlier_call_has_left_is_not_charged_to_the_one_that_runs_when_it_is_seen(
    db: Path, log: Log, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Looks(lambda pid: private(pid) if len(log.lines()) > 1 else 0)
    private = limits.private_bytes
    monkeypatch.setattr(limits, "private_bytes", looks)
    for module in (limits, watchdog):
        monkeypatch.setattr(module, "LOOK_EVERY", 0.02)
    task = Task(keeps_and_waits, name="work", args=(log, gate), max_memory="50MB", max_attempts=1, prefetch=3)
    engine = engine_at(db, [source, task, sink], start_method="fork", on_error="retry")
    feed(engine, "work", ["fat", "harmless", "last"])
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        log.wait_for(2)
        seen = looks.count
        eventually(lambda: looks.count > seen + 5)
        gate.open()
    assert (dead(engine, "work"), values(engine, "sink")) == ([], ["fat", "harmless", "last"])
    assert run.summary["work"].failed == 0
    # Its worker was replaced after the message it ran.
    (_, first), (_, second), (_, third) = log.lines()
    assert (first == second, second == third) == (True, False)


class Looks:
    """Counts how often a worker's memory is looked at."""

    def __init__(self, look: Callable[[int], int]) -> None:
        self.count = 0
        self._look = look

    def __call__(self, pid: int) -> int:
        found = self._look(pid)
        self.count += 1
        return found


# --- who goes first when the kernel chooses ---

SCORES = """
import sys
from pathlib import Path
from tests.process.test_memory import *
db, log, gate, own = sys.argv[1:]
if __name__ == "__main__":
    score = Path("/proc/self/oom_score_adj")
    # Lowering it would take a privilege.
    score.write_text(str(max(int(own), int(score.read_text()))))
    engine = engine_at(Path(db), [source, Task(held, name="work", args=(Log(log), Gate(gate))), sink])
    for _ in engine.run(only="work", iterate=True):
        break
"""


def held(value, log: Log, gate: Gate):
    log.note(os.getpid(), os.getppid())
    gate.wait()
    return value


def score_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


@pytest.mark.parametrize("own", [0, 800])
def test_the_kernel_is_offered_workers_before_everybody_else(
    tmp_path: Path, db: Path, log: Log, gate: Gate, own: int
) -> None:
    feed(engine_at(db, [source, Task(held, name="work"), sink]), "work", [1])
    with program(tmp_path, SCORES, db, log.path, gate.path, own) as process:
        [(worker, supervisor)] = log.wait_for(1)
        scores = {child.pid: score_of(child.pid) for child in children(process.pid)}
        base = score_of(process.pid)
        gate.open()
        assert ended(process)[0] == 0
    # The supervisor, in a process of its own since its caller iterates, and the keeper are as the caller is.
    assert len(scores) == 3
    assert supervisor != process.pid
    assert scores.pop(worker) == min(1000, base + 500)
    assert set(scores.values()) == {base}


# --- a container that is nearly full ---


class Container:
    """A memory limit, as this process's supervisor is told of it."""

    def __init__(self) -> None:
        self.looks = 0
        self.measured = Looks(limits.private_bytes)
        self.is_empty()

    def __call__(self) -> Fill:
        self.looks += 1
        return self.fill

    def is_empty(self) -> None:
        self.fill = Fill(0, 100 * MB)

    def is_full(self, share: float, used: int) -> None:
        self.fill = Fill(used, int(used / share))


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> Container:
    container = Container()
    monkeypatch.setattr(watchdog, "pressure", container)
    monkeypatch.setattr(limits, "private_bytes", container.measured)
    monkeypatch.setattr(watchdog, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(watchdog, "SETTLE", 0.05)
    return container


@pytest.fixture
def begin(new_gate: Callable[[], Gate]) -> Gate:
    return new_gate()


def hoarding(db: Path, log: Log, gate: Gate, begin: Gate, count: int):
    task = Task(hoards, name="work", args=(log, gate, begin), max_attempts=1, prefetch=0)
    engine = engine_at(db, [source, task, sink], start_method="fork", on_error="retry")
    feed(engine, "work", range(count))
    return engine


def first_worker(log: Log, begin: Gate, container: Container) -> int:
    """Return the pid of the worker that has the first message, once it has the memory, too."""
    log.wait_for(1)
    # What it had when it got ready is known.
    eventually(lambda: container.measured.count)
    begin.open()
    return log.wait_for(2)[0][1]


def test_what_an_earlier_call_took_of_a_full_container_is_not_charged_to_a_later_one(
    db: Path, log: Log, gate: Gate, container: Container
) -> None:
    task = Task(keeps_and_waits, name="work", args=(log, gate), max_attempts=1, prefetch=3)
    engine = engine_at(db, [source, task, sink], start_method="fork", on_error="retry")
    feed(engine, "work", ["fat", "harmless"])
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        (_, worker), _ = log.wait_for(2)
        eventually(lambda: container.measured.count)
        container.is_full(0.98, 210 * MB)
        eventually(lambda: not alive(worker))
        container.is_empty()
        gate.open()
    assert (run.summary["work"].failed, dead(engine, "work")) == (0, [])
    assert sorted(values(engine, "sink")) == ["fat", "harmless"]


def test_a_container_that_others_filled_costs_no_worker(
    db: Path, log: Log, gate: Gate, begin: Gate, container: Container, caplog: pytest.LogCaptureFixture
) -> None:
    engine = hoarding(db, log, gate, begin, 3)
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        worker = first_worker(log, begin, container)
        for share in (0.92, 0.98):
            container.is_full(share, 1000 * MB)
            looks = container.looks
            eventually(lambda looks=looks: container.looks > looks + 3)  # type: ignore[misc]
        gate.open()
    assert {pid for _, pid in log.lines()} == {worker}
    assert (run.summary["work"].failed, sorted(values(engine, "sink"))) == (0, [0, 1, 2])
    told = [text for text in caplog.messages if "the container's memory" in text]
    assert len(told) == 1
    assert "92% full; replacing a worker would not help, not even work[0] (pid" in told[0]


def test_a_worker_with_much_of_a_nearly_full_container_is_replaced_after_its_message(
    db: Path, log: Log, gate: Gate, begin: Gate, container: Container, caplog: pytest.LogCaptureFixture
) -> None:
    engine = hoarding(db, log, gate, begin, 2)
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        worker = first_worker(log, begin, container)
        container.is_full(0.92, 100 * MB)
        eventually(lambda: "92% full; replacing work[0]" in caplog.text)
        looks = container.looks
        eventually(lambda: container.looks > looks + 5)
        container.is_empty()
        gate.open()
    assert caplog.text.count("% full;") == 1
    [(_, second)] = [line for line in log.lines() if line[0] == 1]
    assert second != worker
    assert (run.summary["work"].failed, values(engine, "sink")) == (0, [0, 1])
    assert [value for value, _ in log.lines()].count(0) == 1


def test_a_worker_killed_to_make_room_does_not_cost_its_message_an_attempt(
    db: Path, log: Log, gate: Gate, begin: Gate, container: Container, caplog: pytest.LogCaptureFixture
) -> None:
    engine = hoarding(db, log, gate, begin, 1)
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        worker = first_worker(log, begin, container)
        # It has a large part, but others have more.
        container.is_full(0.98, 180 * MB)
        eventually(lambda: not alive(worker))
        container.is_empty()
        log.wait_for(3)
        assert charges(engine) == [0]
        gate.open()
    assert "killed to make room" in caplog.text
    assert (run.summary["work"].failed, values(engine, "sink"), dead(engine, "work")) == (0, [0], [])


def test_a_message_that_fills_the_container_itself_pays_for_it(
    db: Path, log: Log, gate: Gate, begin: Gate, container: Container
) -> None:
    engine = hoarding(db, log, gate, begin, 2)
    with Background(engine, only="work", until="drained", idle=0.0) as run:
        worker = first_worker(log, begin, container)
        container.is_full(0.98, 100 * MB)
        eventually(lambda: not alive(worker))
        container.is_empty()
        gate.open()
    [(body, failure)] = dead(engine, "work")
    assert '"value": 0' in body
    assert (failure.error, failure.attempts, failure.signal) == ("WorkerLost", 1, "SIGKILL")
    assert failure.text.startswith("the container was nearly out of memory, most of which the worker had taken")
    assert (run.summary["work"].dead, values(engine, "sink")) == (1, [1])
