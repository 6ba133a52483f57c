import contextlib
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp import ConfigError, Reject, Retry
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.receive.prefetch import ask, wanted
from sqspipes_mp.worker.recycle import drawn
from sqspipes_mp.worker.run.function import Function, Late
from sqspipes_mp.worker.send.policy import Decision, decide


def _decide(error=None, *, attempt=1, receives=1, max_attempts=5, on_error="raise", group=None, jitter=max):
    return decide(
        error or ValueError("x"),
        attempt=attempt,
        receives=receives,
        max_attempts=max_attempts,
        on_error=on_error,
        group=group,
        jitter=jitter,
    )


def test_raise_gives_the_message_back_and_reports():
    assert _decide()[0] == Decision("retry", 0.0, report=True)


def test_raise_dead_letters_the_last_attempt_and_reports_once_more():
    assert _decide(attempt=5)[0] == Decision("dead", report=True)


def test_retry_backs_off_exponentially_with_jitter_up_to_the_limit():
    assert [_decide(on_error="retry", attempt=n, max_attempts=99)[0].delay for n in (1, 2, 5, 9, 10, 40)] == [
        2, 4, 32, 512, 900, 900,
    ]  # fmt: skip
    assert _decide(on_error="retry", jitter=min)[0] == Decision("retry", 0.0)


def test_retry_dead_letters_after_the_last_attempt_and_goes_on():
    assert _decide(on_error="retry", attempt=5)[0] == Decision("dead")


def test_reject_dead_letters_at_once():
    assert _decide(on_error="reject")[0] == Decision("dead")


def test_a_task_that_raises_retry_or_reject_decides_in_every_mode():
    for mode in ("raise", "retry", "reject", lambda error, attempt: "raise"):
        assert _decide(Retry(7), on_error=mode)[0] == Decision("retry", 7.0)
        assert _decide(Reject("no"), on_error=mode)[0] == Decision("dead")


def test_retry_counts_attempts_too():
    assert _decide(Retry(7), attempt=5)[0] == Decision("dead")


def test_a_callable_decides_by_exception_and_attempt():
    seen = []

    def policy(error, attempt):
        seen.append((type(error), attempt))
        return Retry(3)

    assert _decide(KeyError("k"), on_error=policy, attempt=2)[0] == Decision("retry", 3.0)
    assert seen == [(KeyError, 2)]


def test_a_callable_that_raises_is_reported_with_the_original_as_context():
    def policy(error, attempt):
        raise LookupError("policy")

    original = ValueError("original")
    decision, error = _decide(original, on_error=policy)
    assert decision.report
    assert isinstance(error, LookupError)
    assert error.__context__ is original


def test_a_callable_that_returns_nonsense_is_a_config_error():
    decision, error = _decide(on_error=lambda error, attempt: "perhaps")
    assert decision.report
    assert isinstance(error, ConfigError)
    assert "perhaps" in str(error)


def test_the_one_group_of_sqspipes_is_not_held_up():
    assert _decide(Retry(600), group="-")[0].delay == 1.0
    assert _decide(Retry(600), group="mine")[0].delay == 600


def test_too_many_deliveries_make_a_failure_the_last():
    assert _decide(on_error="retry", receives=50)[0] == Decision("dead")
    assert _decide(on_error="retry", receives=49)[0].action == "retry"


@given(st.integers(1, 2000), st.integers(0, 2**32))
def test_backoff_is_never_over_fifteen_minutes(attempt, seed):
    decision, _ = _decide(
        on_error="retry", attempt=attempt, receives=1, max_attempts=5000, jitter=random.Random(seed).uniform
    )
    assert 0 <= decision.delay <= 900


def _ask(**changes):
    given = {
        "waiting": 0,
        "idle": True,
        "mean": 0.01,
        "round_trip": 0.01,
        "limit": None,
        "room": 100,
        "batch": 10,
        "ahead": 0.5,
    }
    return ask(**{**given, **changes})


def test_the_first_receive_asks_for_one():
    assert _ask(mean=None) == 1
    assert _ask(mean=None, idle=False) == 0


def test_short_tasks_ask_for_full_batches_before_they_run_out():
    assert _ask(mean=0.001, waiting=15, idle=False, round_trip=0.01) == 10
    assert _ask(mean=0.001, waiting=20, idle=False, round_trip=0.01) == 0


def test_tasks_over_a_second_hold_nothing_while_one_runs():
    assert _ask(mean=1.0, idle=False) == 0
    assert _ask(mean=1.0, idle=True) == 1


def test_a_receive_brings_at_most_half_a_second_of_work():
    assert _ask(mean=0.1) == 5
    assert _ask(mean=0.3) == 1


def test_where_a_receive_costs_little_it_brings_what_is_soon_done():
    assert _ask(mean=0.001, batch=40, ahead=0.05) == 40
    assert _ask(mean=0.0, batch=40, ahead=0.05) == 40
    assert _ask(mean=0.01, batch=40, ahead=0.05) == 5
    # Longer ones are left for other workers.
    assert _ask(mean=0.1, batch=40, ahead=0.05) == 1


def test_the_users_prefetch_is_what_is_held_beside_the_running_one():
    assert _ask(limit=0, idle=False, mean=0.001) == 0
    assert _ask(limit=0, idle=True, mean=0.001) == 1
    assert _ask(limit=3, idle=False, waiting=1, mean=5.0) == 2
    assert _ask(limit=50, idle=False, waiting=1, mean=5.0) == 10


def test_threads_are_fed_all_at_once_and_share_the_time() -> None:
    assert _ask(mean=None, idle=8, at_once=8) == 8
    assert _ask(mean=None, idle=16, at_once=16, batch=10) == 10
    assert _ask(mean=None, idle=3, waiting=2, at_once=8) == 1
    # Long calls: what can begin, and nothing more.
    assert _ask(mean=2.0, idle=5, waiting=1, at_once=8) == 4
    assert _ask(mean=2.0, idle=0, at_once=8) == 0
    # 0.1 s on 8 threads is one message each 12.5 ms.
    assert _ask(mean=0.1, idle=0, waiting=1, round_trip=0.01, at_once=8) == 10
    assert wanted(0.1, 0.01, 8) == 2


def test_a_worker_ends_up_to_a_tenth_before_its_limit():
    assert [drawn(100, lambda below: below - 1), drawn(100, lambda below: 0)] == [90, 100]
    assert {drawn(20, random.Random(seed).randrange) for seed in range(50)} == {18, 19, 20}
    # Meant to the letter: one message per process, say.
    assert [drawn(most, lambda below: below - 1) for most in (1, 9)] == [1, 9]


def test_no_more_than_the_leases_that_fit():
    assert _ask(mean=0.001, room=3) == 3
    assert _ask(room=0) == 0


@given(st.floats(0, 100), st.floats(0, 10), st.integers(0, 100), st.booleans(), st.integers(0, 192), st.integers(1, 10))
def test_what_is_asked_for_is_bounded_by_time_room_and_batch(mean, round_trip, waiting, idle, room, batch):
    count = _ask(mean=mean, round_trip=round_trip, waiting=waiting, idle=idle, room=room, batch=batch)
    assert 0 <= count <= min(room, batch)
    assert count <= 1 or count * mean <= 0.5
    assert wanted(mean, round_trip) <= 300


def test_a_worker_that_got_its_first_message_without_waiting_is_not_idle_while_it_runs():
    ready = Ready(threading.Event())
    assert ready.idle
    first: Any = "first"
    ready.put([first])
    assert ready.take() == first
    assert ready.take() is None
    # Else a second message would wait unstarted behind a long call, whatever prefetch says.
    assert not ready.idle


@pytest.mark.parametrize(
    ("milliseconds", "credit", "late"), [(499, 0, False), (501, 0, True), (900, 500, False), (1001, 500, True)]
)
def test_a_call_is_late_from_the_first_millisecond_after_its_timeout(milliseconds, credit, late):
    function = Function.__new__(Function)
    function._limit = 0.5 * 1e9
    board: Any = SimpleNamespace(credit=lambda started: credit * 1_000_000)
    function._board = board
    # A call that the supervisor has marked is known to it: no word of a stop is waited for.
    context: Any = SimpleNamespace(leases=SimpleNamespace(blamed=True))
    function._context = context
    with pytest.raises(Late) if late else contextlib.nullcontext():
        function._check_late(1, milliseconds * 1_000_000)
