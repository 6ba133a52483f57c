"""The benchmarks' harness: rounds, ratios, tables."""

import pytest

from benchmarks.harness import Spread, bars, interleave, table
from benchmarks.page import rewrite


def test_each_subject_is_measured_once_per_round_and_every_other_round_backwards():
    order = []

    def subject(name):
        return lambda: order.append(name) or float(len(order))

    spreads = interleave({"a": subject("a"), "b": subject("b")}, rounds=3)
    assert "".join(order) == "abbaab"
    assert spreads["a"].samples == (1.0, 4.0, 5.0)


def test_ratios_are_taken_within_a_round():
    ours, theirs = Spread((1.0, 20.0, 3.0)), Spread((2.0, 40.0, 3.0))
    assert ours.over(theirs).samples == (0.5, 0.5, 1.0)
    assert ours.over(theirs).text() == "0.50 (0.50-1.00)"
    assert Spread((1.0,)).text() == "1.00"


def test_a_table_is_an_rst_table():
    assert table(["task", "ms"], [["python", 1], ["zlib", 100]]).splitlines() == [
        "======  ===",
        "task     ms",
        "======  ===",
        "python    1",
        "zlib    100",
        "======  ===",
    ]


def test_bars_are_grouped_and_show_median_and_spread():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    series = {"a": [Spread((1.0, 2.0, 4.0)), Spread((3.0,))], "b": [Spread((5.0,)), Spread((6.0,))]}
    bars(axes, ["1 ms", "10 ms"], series)
    assert [bar.get_height() for bar in axes.patches] == [2.0, 3.0, 5.0, 6.0]
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx([-0.2, 0.8, 0.2, 1.2])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 ms", "10 ms"]
    least, greatest = axes.collections[0].get_segments()[0][:, 1]
    assert (least, greatest) == (1.0, 4.0)


def test_the_page_keeps_what_is_around_the_table(tmp_path):
    file = tmp_path / "processes.rst"
    file.write_text("before\n\n.. measured: begins\nold\n.. measured: ends\n\nafter\n")
    rewrite("then, there", "=====\ntable\n=====", file)
    again = file.read_text()
    assert "old" not in again
    assert again.startswith("before\n\n.. measured: begins\n\nMeasured then, there")
    assert again.endswith("\n\n.. measured: ends\n\nafter\n")
    rewrite("then, there", "=====\ntable\n=====", file)
    assert file.read_text() == again
