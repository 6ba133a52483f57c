"""Progress in numbers: rates over a window, the time left, and the lines people read."""

from typing import Any

import pytest

from sqspipes_mp.caller.progress.rates import HEADER, WINDOW, Pace, cells, eta, fitting, line, span
from sqspipes_mp.ipc.summary import Reading


def reading(done: int = 0, **more: Any) -> Reading:
    return Reading(**{"name": "a", "workers": 2, "room": 2, "done": done, **more})


def test_the_first_look_is_compared_with_the_beginning():
    pace = Pace(100.0)
    (row,) = pace.observe(102.0, [reading(50, busy=3.0)])
    assert (row.per_second, row.busy) == (25.0, 0.75)
    # So are the next ones: half a second says little.
    (row,) = pace.observe(102.5, [reading(50, busy=3.0)])
    assert (row.per_second, row.busy) == (20.0, 0.6)


def test_rates_are_of_the_last_seconds_only():
    pace = Pace(0.0)
    for second in range(101):
        # A hundred a second at first, then a stop.
        (row,) = pace.observe(float(second), [reading(100 * min(second, 50), busy=2.0 * min(second, 50))])
        if second == 50:
            assert (row.per_second, row.busy) == (100.0, 1.0)
        if second == 55:
            assert (row.per_second, row.busy) == pytest.approx((50.0, 0.5))
    assert (row.per_second, row.busy) == (0.0, 0.0)
    assert len(pace._past) <= WINDOW + 2


def test_a_look_after_a_long_pause_is_compared_with_the_one_before_it():
    pace = Pace(0.0)
    pace.observe(1.0, [reading(10)])
    (row,) = pace.observe(101.0, [reading(210)])
    assert row.per_second == 2.0


def test_two_looks_at_one_moment_divide_by_nothing():
    pace = Pace(5.0)
    (row,) = pace.observe(5.0, [reading(3)])
    assert (row.per_second, row.busy, row.eta) == (0.0, 0.0, None)


@pytest.mark.parametrize(
    ("left", "per_second", "seconds"), [(None, 5.0, None), (0, 0.0, 0.0), (10, 0.0, None), (10, 4.0, 2.5)]
)
def test_the_time_left(left, per_second, seconds):
    assert eta(left, per_second) == seconds


def test_a_known_total_is_what_the_first_stage_has_left():
    pace = Pace(0.0, total=100)
    first, second = pace.observe(2.0, [reading(38, waiting=5, dead=2), reading(20, waiting=10)])
    assert first.eta == pytest.approx(60 / 19)
    assert second.eta == 1.0
    (first, _) = pace.observe(3.0, [reading(120), reading(0)])
    assert first.eta == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (125, "2:05"),
        (10_921, "3:02:01"),
        (4 * 86_400 + 6 * 3600, "4 d 6 h"),
    ],
)
def test_times_for_people(seconds, text):
    assert span(seconds) == text


def test_a_row_has_a_cell_for_each_column_and_leaves_the_unknown_blank():
    (row,) = Pace(0.0).observe(1.0, [reading(1234, running=1, failed=3)])
    assert dict(zip(HEADER, cells(row), strict=True)) == {
        "stage": "a", "waiting": "", "running": "1/2", "done": "1,234", "failed": "3", "dead": "0",
        "per s": "1,234", "ETA": "", "busy": "0%",
    }  # fmt: skip


def test_a_line_of_the_log_leaves_out_what_is_nothing():
    (row,) = Pace(0.0).observe(10.0, [reading(25, waiting=100, busy=5.0, dead=1)])
    assert line(row) == "a 25 done, 2.5 per s, busy 25%, 100 waiting, ETA 40 s, 1 dead"
    (row,) = Pace(0.0).observe(10.0, [reading(0, waiting=0)])
    assert line(row) == "a 0 done, 0 per s, busy 0%"


def test_a_narrow_terminal_gets_whole_columns() -> None:
    table = [HEADER, ("reduce", "1,234,567", "8/8", "7,654,321", "12", "3", "1,234", "16:40", "99%")]
    names = [[HEADER[number] for number in fitting(table, width)] for width in (140, 60, 40, 5)]
    assert names[0] == list(HEADER)
    assert names[1] == ["stage", "waiting", "running", "done", "failed", "dead", "ETA"]
    assert names[2] == ["stage", "waiting", "done", "dead"]
    assert names[3] == ["stage", "done", "dead"]
