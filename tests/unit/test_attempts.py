import pytest

from sqspipes_mp.messages.attempts import is_last, pause


@pytest.mark.parametrize(
    ("attempt", "receives", "last"),
    [(1, 1, False), (2, 2, False), (3, 3, True), (1, 29, False), (1, 30, True), (1, 0, False), (3, 0, True)],
)
def test_the_last_attempt_is_that_of_max_attempts_or_of_ten_times_as_many_deliveries(attempt, receives, last):
    assert is_last(attempt, receives, 3) is last


def test_only_in_the_one_group_for_everything_the_pause_is_short():
    assert [pause(5, group, max, None) for group in (None, "-", "other")] == [32.0, 1.0, 32.0]
    assert [pause(5, group, max, 7.0) for group in (None, "-")] == [7.0, 1.0]
    assert pause(5, "-", max, 0.0) == 0.0
