"""Progress as people see it: on a terminal, in the log, or not at all."""

import contextlib
import io
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import ConfigError, Engine, Task
from sqspipes_mp.brokers.base import Depth
from sqspipes_mp.caller.progress import progress
from sqspipes_mp.errors import AccessDenied
from sqspipes_mp.ipc.summary import readings
from sqspipes_mp.keeper.queue_counts import WaitCount
from sqspipes_mp.pipeline.plan import Settings, make_plan
from sqspipes_mp.supervisor.run import new_board
from tests.gates import ROOT, TIMEOUT, Gate, engine_at, eventually

PROGRAM = """
import os, sys
from sqspipes_mp import Engine, Task
from sqspipes_mp.caller.progress import progress
from tests.gates import Gate

progress.DRAW_EVERY = progress.COUNT_EVERY = 0.05

def numbers():
    yield from range(3)

def hold(value, gate, fails):
    os.write(2, f"the worker got {value}\\n".encode())
    gate.wait()
    if fails:
        raise ValueError("no luck")
    return value

_, how, gate, ending = sys.argv
tasks = [numbers, Task(hold, args=(Gate(gate), ending == "raise"), prefetch=0)]
engine = Engine(tasks, domain="t", broker="sqlite://")
if how == "run":
    engine.run(until="drained")
else:
    for value in engine.run(iterate=True, until="drained"):
        os.write(1, f"the caller got {value}\\n".encode())
"""
MADE, UNDONE = re.compile(r"\x1b\[1;\d+r"), "\033[r"


class Terminal:
    """The other side of a terminal of 24 rows."""

    def __init__(self) -> None:
        self._fd, self.theirs = pty.openpty()
        termios.tcsetwinsize(self._fd, (24, 100))
        self._raw = ""

    @property
    def text(self) -> str:
        """What was written so far, without colours."""
        return re.sub(r"\x1b\[[\d;]*m", "", self._raw)

    def read(self, wait: float) -> bool:
        """Take what is there; False: nothing came, or nobody can write any more."""
        if not select.select([self._fd], [], [], wait)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:
            return False
        self._raw += data.decode()
        return bool(data)

    def read_until(self, seen: Callable[[str], object]) -> None:
        while not seen(self.text):
            assert self.read(TIMEOUT), f"not seen in {self.text!r}"

    def leave(self) -> None:
        """Close the side of those who write: once they are gone there is an end to read."""
        if self.theirs >= 0:
            os.close(self.theirs)
            self.theirs = -1

    def close(self) -> None:
        self.leave()
        os.close(self._fd)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    pytest.importorskip("rich", reason="the extra 'progress' is not installed")
    monkeypatch.setenv("TERM", "xterm")
    made = Terminal()
    yield made
    made.close()


def held(text: str) -> object:
    """The table shows the one running call and the two values behind it."""
    return re.search(r"hold +2 +1/1 +0 ", text)


@pytest.mark.parametrize(
    ("how", "ending", "code"),
    [
        ("run", "raise", 1),
        ("run", "ctrl-c", -signal.SIGINT),
        ("iterate", "done", 0),
        ("iterate", "ctrl-c", -signal.SIGINT),
    ],
)
def test_a_terminal_shows_a_table_and_is_put_back(
    terminal: Terminal, tmp_path: Path, gate: Gate, how: str, ending: str, code: int
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, "program.py", how, gate.path, ending],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=terminal.theirs,
        stdout=terminal.theirs,
        stderr=terminal.theirs,
    )
    terminal.leave()
    try:
        terminal.read_until(held)
        if ending == "ctrl-c":
            process.send_signal(signal.SIGINT)
        gate.open()
        while terminal.read(TIMEOUT):
            pass
        assert process.wait(TIMEOUT) == code
    finally:
        process.kill()
        process.wait()
    text = terminal.text
    assert re.search(r"stage +waiting +running +done +failed +dead +per s +ETA +busy", text)
    # What others write is whole, and never in the rows of the table.
    assert "the worker got 0\r\n" in text
    if how == "iterate" and ending == "done":
        assert [line[-1] for line in re.findall(r"the caller got \d", text)] == ["0", "1", "2"]
    # The whole screen scrolls again, and the table is gone: nothing was drawn after that, by anyone.
    assert text.count(UNDONE) == 1
    before, after = text.split(UNDONE)
    assert len(MADE.findall(before)) == 1
    assert not re.search(r"\x1b\[\d+;1H\S*stage", after)
    assert "hold " not in after
    assert text.count("\0337") == text.count("\0338")
    if ending == "raise":
        assert after.rstrip().count("ValueError: no luck") == 1


def numbers() -> Iterator[int]:
    yield from range(3)


def hold(value: int, gate: Gate) -> int:
    gate.wait()
    return value


class Opener(logging.Handler):
    """Opens a gate once a line tells what it waits for."""

    def __init__(self, gate: Gate, seen: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._gate = gate
        self._seen = seen

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if self._seen in record.getMessage():
            self._gate.open()


@contextlib.contextmanager
def heard(handler: logging.Handler, level: int) -> Iterator[None]:
    logger = logging.getLogger("sqspipes_mp.progress")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@pytest.mark.parametrize("how", ["no terminal", "no extra", "iterate"])
def test_elsewhere_it_is_lines_of_the_log(
    db: Path, gate: Gate, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    stream: Any = io.StringIO()
    if how == "no extra":
        stream = os.fdopen(os.dup(request.getfixturevalue("terminal").theirs), "w")
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LOG_EVERY", 0.02)
    engine = engine_at(db, [numbers, Task(hold, args=(gate,), prefetch=0)])
    # Whether the first one runs by then is a matter of an instant, and its start alone is no reason for another line.
    opener = Opener(gate, "2 waiting")
    with stream, heard(opener, logging.INFO):
        if how == "iterate":
            assert sorted(engine.run(iterate=True, until="drained", progress=True)) == [0, 1, 2]
        else:
            engine.run(until="drained", progress=True)
    assert opener.lines[0].startswith("numbers ")
    assert len(set(opener.lines)) == len(opener.lines)
    assert not any("\033" in line for line in opener.lines)


@pytest.mark.parametrize(
    ("wanted", "level", "table", "lines"),
    [(False, logging.INFO, False, False), (None, logging.INFO, True, False), (True, logging.INFO, True, False)],
)
def test_off_means_nothing(
    db: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, wanted: Any, level: int, table: bool, lines: bool
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY", 0.001)
    opener = Opener(Gate(""), "never")
    engine = engine_at(db, [numbers, Task(abs, name="absolute")])
    with os.fdopen(os.dup(terminal.theirs), "w") as stream, heard(opener, level):
        monkeypatch.setattr(sys, "stderr", stream)
        engine.run(until="drained", progress=wanted)
    while terminal.read(0):
        pass
    assert bool(terminal.text) is table
    assert bool(opener.lines) is lines


@pytest.mark.parametrize("wanted", [None, False])
def test_without_a_terminal_nobody_gets_lines_unasked(db: Path, monkeypatch: pytest.MonkeyPatch, wanted: Any) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LOG_EVERY", 0.001)
    opener = Opener(Gate(""), "never")
    with heard(opener, logging.INFO):
        assert sorted(engine_at(db, [Task(abs, name="absolute")]).map([-1, 2], progress=wanted)) == [1, 2]
    assert (opener.lines, stream.getvalue()) == ([], "")


@pytest.mark.parametrize("call", ["run", "map"])
def test_another_value_is_refused(db: Path, call: str) -> None:
    engine = engine_at(db, [Task(abs, name="absolute", input=True)])
    value: Any = "yes"
    with pytest.raises(ConfigError, match=rf"{call}\(progress\) must be True, False or None"):
        engine.run(progress=value) if call == "run" else engine.map([1], progress=value)
    assert not db.exists()


def test_stats_tells_programs_the_same(db: Path, gate: Gate) -> None:
    engine = engine_at(db, [numbers, Task(hold, args=(gate,), prefetch=0)])
    began = time.monotonic()
    with engine.run(iterate=True, until="drained") as results:
        eventually(lambda: (engine.stats()["hold"].running, engine.stats()["hold"].visible) == (1, 2), "one runs")
        stats = engine.stats()["hold"]
        assert (stats.done, stats.per_second, stats.eta) == (0, 0.0, None)
        gate.open()
        assert len(list(results)) == 3
    stats = engine.stats()["hold"]
    took = time.monotonic() - began
    assert (stats.running, stats.done, stats.eta) == (0, 3, 0.0)
    # The caller's time, which begins before the supervisor's and ends after it.
    assert 3 / took <= stats.per_second <= 3 / results.summary.seconds
    assert engine.stats()["numbers"].eta is None


def test_the_calls_of_threads_are_counted_one_by_one(db: Path, gate: Gate) -> None:
    engine = engine_at(db, [numbers, Task(hold, args=(gate,), threads=4)])
    with engine.run(iterate=True, until="drained", progress=False) as results:
        eventually(lambda: engine.stats()["hold"].running == 3, "three calls in one worker")
        gate.open()
        assert len(list(results)) == 3
    assert engine.stats()["hold"].running == 0


# --- what the keeper counts ---


class Counted:
    """A connection that knows how much is in each queue, and notes who asks."""

    settle = 60.0

    def __init__(self, denies: bool = False) -> None:
        self.asked: list[str] = []
        self._denies = denies

    def depth(self, queue: str) -> Depth:
        self.asked.append(queue)
        if self._denies:
            raise AccessDenied("sqs:GetQueueAttributes")
        return Depth(visible=len(self.asked), in_flight=100, delayed=10)


@contextlib.contextmanager
def counting(every: float | None, connection: Counted) -> Iterator[tuple[WaitCount, Callable[[], list[int | None]]]]:
    tasks = [Task(numbers, priorities=2), Task(abs, name="one", priorities=2), Task(abs, name="two")]
    plan = replace(make_plan(Engine(tasks, domain="t", broker="sqlite://").pipeline, Settings()), count_every=every)
    with contextlib.closing(new_board(plan)) as board:
        count = WaitCount(plan, board, connection, lambda: None)  # type: ignore[arg-type]
        yield count, lambda: [each.waiting for each in readings(plan, board)]


def test_what_waits_is_counted_one_queue_a_turn_and_each_once_in_a_round() -> None:
    connection = Counted()
    with counting(10.0, connection) as (count, waiting):
        assert waiting() == [None, None, None]
        now = 100.0
        while len(connection.asked) < 4:
            asked = len(connection.asked)
            assert count.look(now) >= now
            assert len(connection.asked) == asked + 1
        # A source has nothing waiting; each other stage has two levels, whose sum it is.
        assert waiting() == [None, 1 + 2 + 20, 3 + 4 + 20]
        assert count.look(now) == now + 2.5
        for _ in range(1000):
            now += 0.1
            count.look(now)
        assert len(connection.asked) == pytest.approx(44, abs=2)
        assert {name: connection.asked.count(name) for name in connection.asked[:4]} == pytest.approx(
            dict.fromkeys(connection.asked[:4], 11), abs=1
        )


def test_a_line_of_the_log_tells_counts_of_the_last_seconds() -> None:
    connection = Counted()
    lines = progress.Lines()
    with counting(lines.count_every, connection) as (count, _):
        for tenth in range(int(10 * lines.every)):
            count.look(100.0 + tenth / 10)
        assert min(map(connection.asked.count, set(connection.asked))) >= 3


def test_nothing_is_counted_where_nobody_looks() -> None:
    connection = Counted()
    with counting(None, connection) as (count, _):
        assert count.look(100.0) == float("inf")
        assert connection.asked == []


def test_a_count_that_is_denied_is_not_asked_for_again() -> None:
    connection = Counted(denies=True)
    with counting(10.0, connection) as (count, waiting):
        assert count.look(100.0) == float("inf")
        assert count.look(1000.0) == float("inf")
        assert len(connection.asked) == 1
        assert waiting() == [None, None, None]


def test_queues_are_counted_for_a_while_after_each_look_and_absent_later() -> None:
    connection = Counted()
    with counting(None, connection) as (count, waiting):
        assert count.look(100.0) == float("inf")
        count.looked_at(200.0)
        now = 200.0
        for _ in range(300):
            now = max(now + 0.001, count.look(now))
            if now >= 230.0:
                break
        # Rounds 10 s apart, give or take a fifth, of two stages with two levels each and three dead-letter queues.
        queues = len(set(connection.asked))
        assert queues == 6
        assert 3 * queues <= len(connection.asked) <= 5 * queues
        counts = waiting()
        assert None not in counts[1:]
        # The counts are kept for those who look again soon.
        assert count.look(240.0) == 320.0
        assert waiting() == counts
        assert count.look(320.0) == float("inf")
        assert waiting() == [None, None, None]
        asked = len(connection.asked)
        assert count.look(400.0) == float("inf")
        assert len(connection.asked) == asked


def test_looks_change_nothing_of_what_the_display_is_counted() -> None:
    connection = Counted()
    with counting(10.0, connection) as (count, waiting):
        now = 100.0
        count.looked_at(now)
        while now < 170.0:
            now = max(now + 0.001, count.look(now))
        # A round is the display's again.
        del connection.asked[:]
        while now < 210.0:
            now = max(now + 0.001, count.look(now))
        assert not any(name.endswith("--dead") for name in connection.asked)
        assert len(connection.asked) == pytest.approx(16, abs=1)
        assert None not in waiting()[1:]
