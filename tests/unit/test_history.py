"""The states that people see one after another: rates of now, an eta that stands still, a pause that blames nobody."""

import time
from collections.abc import Iterator

import pytest

from sqspipes_mp.ipc.running.history import History
from sqspipes_mp.ipc.running.state import ended
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import BUSY_NS, DONE, PAUSED, STAGE, WAITING, WANTED, Statistics


class Clock:
    """The wall clock of a test."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "time", made)
    return made


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    """Two stages of a worker each, for both of which 600 messages wait."""
    made = Scoreboard.create(2, 2)
    for stage in (0, 1):
        made.put(stage, STAGE, stage + 1)
        made.set_stage(stage, WANTED, 1)
        made.set_stage(stage, WAITING, 601)
    yield made
    made.close()


@pytest.fixture
def statistics(board: Scoreboard) -> Iterator[Statistics]:
    made = Statistics(memoryview(board._looks_map))
    yield made
    made.close()


def test_rates_are_of_three_seconds_and_the_eta_of_a_minute(
    clock: Clock, board: Scoreboard, statistics: Statistics
) -> None:
    history = History()
    seen = history.read(statistics)["stages"][0]
    assert (seen["per_second"]["done"], seen["eta"]) == (None, None)
    etas = []
    # Ten messages a second, but none in every second half minute.
    for second in range(240):
        clock.now += 1
        board.add(0, DONE, 20 * (second % 60 < 30))
        seen = history.read(statistics)["stages"][0]
        etas.append(seen["eta"])
    assert seen["per_second"]["done"] == 0
    assert etas[-120:] == pytest.approx([60] * 120, rel=0.05)
    # Nobody looked for long: an old state makes no rate of now.
    clock.now += 3600
    assert history.read(statistics)["stages"][0]["per_second"]["done"] is None


def test_a_paused_stage_has_no_eta_and_its_neighbour_is_no_bottleneck(
    clock: Clock, board: Scoreboard, statistics: Statistics
) -> None:
    history = History()

    def a_second_later() -> tuple[list[bool], list[bool]]:
        clock.now += 1
        for slot in (0, 1):
            board.add(slot, DONE, 10)
            board.add(slot, BUSY_NS, 950_000_000)
        stages = history.read(statistics)["stages"]
        return [stage["bottleneck"] for stage in stages], [stage["eta"] is None for stage in stages]

    history.read(statistics)
    assert a_second_later() == ([True, False], [False, False])
    board.set_stage(1, PAUSED, 1)
    assert a_second_later() == ([False, False], [False, True])
    # Nothing waits for it: it holds up nobody.
    board.set_stage(1, WAITING, 1)
    assert a_second_later() == ([True, False], [False, True])


def test_nothing_of_an_engine_that_has_ended_looks_alive(
    clock: Clock, board: Scoreboard, statistics: Statistics
) -> None:
    history = History()
    history.read(statistics)
    clock.now += 1
    board.add(0, DONE, 10)
    last = ended(history.read(statistics))
    assert last["stages"][0]["done"] == 10
    assert {(stage["per_second"]["done"], stage["eta"], stage["running"]) for stage in last["stages"]} == {
        (None, None, 0)
    }
    assert (last["notes"], {worker["state"] for worker in last["workers"]} - {"ended"}) == ([], set())


def test_the_cpus_in_use_are_told(clock: Clock, statistics: Statistics) -> None:
    history = History()
    first = history.read(statistics)["machine"]
    assert first["cpus"] >= 1
    assert first["busy"] is None
    clock.now += 1
    second = history.read(statistics)["machine"]
    if first["cpu_seconds"] is not None:
        assert first["cpu_seconds"] <= second["cpu_seconds"] <= second["cpu_seconds_possible"]
        assert 0 <= second["busy"] <= 1
