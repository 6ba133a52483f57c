import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp.ipc.histogram import BUCKETS, bucket, duration, percentile
from sqspipes_mp.ipc.scoreboard import Scoreboard
from tests.gates import present


@given(st.integers(0, 10**15))
def test_buckets_are_in_order_and_in_range(nanoseconds):
    assert 0 <= bucket(nanoseconds) <= bucket(nanoseconds + 1) < BUCKETS


@given(st.integers(1_100, 10**13))
def test_one_call_is_told_rounded_up_by_a_quarter_at_most(nanoseconds):
    counts = [0] * BUCKETS
    counts[bucket(nanoseconds)] = 1
    assert 1.0 <= percentile(counts, 0.5) / (nanoseconds / 1e9) <= 1.2501


def test_percentiles_of_many():
    board = Scoreboard.create(1, 2)
    times = [random.lognormvariate(-4, 1) for _ in range(20_000)]
    for place, seconds in enumerate(times):
        board.took(place % 2, int(seconds * 1e9))
    counts = board.run_times([0, 1])
    board.close()
    assert sum(counts) == len(times)
    times.sort()
    for share in (0.5, 0.95):
        assert 0.99 <= present(percentile(counts, share)) / times[int(share * len(times))] <= 1.26


def test_none_before_the_first_call():
    assert percentile([0] * BUCKETS, 0.5) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (2e-6, "2 us"), (0.00123, "1.23 ms"), (0.5, "500 ms"), (12.34, "12.3 s"), (3600, "3,600 s")],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text
