from functools import partial
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp.supervisor.restart import (
    BOOT_FAILURES,
    CRASHES,
    FIRST_BACKOFF,
    LONGEST_BACKOFF,
    WINDOW,
    GiveUp,
    RestartAt,
    RestartPolicy,
)


def _crash(policy, now, *, done=0, charged=False, lived=1.0, ready=True):
    return policy.died(now, ready=ready, lived=lived, done=done, charged=charged)


def test_backoff_doubles_up_to_the_longest():
    policy = RestartPolicy()
    delays = [_crash(policy, 100.0 * n, charged=True).delay for n in range(9)]
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_restart_is_due_after_the_backoff():
    decision = _crash(RestartPolicy(), 7.0)
    assert decision == RestartAt(7.0 + FIRST_BACKOFF, FIRST_BACKOFF)


def test_ten_deaths_within_the_window_spend_the_budget():
    policy = RestartPolicy()
    decisions = [_crash(policy, float(n)) for n in range(CRASHES)]
    assert [type(d) for d in decisions] == [RestartAt] * (CRASHES - 1) + [GiveUp]
    assert decisions[-1] == GiveUp(booting=False, deaths=CRASHES)


def test_deaths_spread_over_more_than_the_window_do_not():
    policy = RestartPolicy()
    assert all(isinstance(_crash(policy, n * WINDOW / 5), RestartAt) for n in range(100))


def test_progress_of_the_stage_resets_budget_and_backoff():
    policy = RestartPolicy()
    for n in range(CRASHES - 1):
        _crash(policy, float(n), done=0)
    assert _crash(policy, 9.5, done=1) == RestartAt(9.5 + FIRST_BACKOFF, FIRST_BACKOFF)
    assert isinstance(_crash(policy, 9.9, done=1), RestartAt)


def test_a_long_life_resets_the_backoff():
    policy = RestartPolicy()
    for n in range(5):
        _crash(policy, float(n))
    assert _crash(policy, 100.0, lived=WINDOW).delay == FIRST_BACKOFF


def test_without_memory_for_messages_workers_are_replaced_at_once_only_while_the_stage_gets_on():
    policy = RestartPolicy()
    starved = partial(policy.starved, lived=1.0)
    assert starved(0.0, done=3) is None
    assert [starved(at, done=3) for at in (1.0, 5.0)] == [RestartAt(1.5, 0.5), RestartAt(6.0, 1.0)]
    assert starved(9.0, done=4) is None
    assert [starved(9.0, done=4, lived=lived) for lived in (1.0, WINDOW)] == [RestartAt(9.5, 0.5)] * 2
    # None of it counts towards the budget of deaths.
    assert policy.crashes == []


def test_progress_that_a_starved_worker_leaves_behind_resets_the_budget_of_deaths():
    policy = RestartPolicy()
    assert all(isinstance(_crash(policy, float(n)), RestartAt) for n in range(CRASHES - 1))
    assert policy.starved(20.0, lived=1.0, done=1) is None
    assert _crash(policy, 21.0, done=1) == RestartAt(21.0 + FIRST_BACKOFF, FIRST_BACKOFF)


def test_charged_deaths_cost_no_budget():
    policy = RestartPolicy()
    assert all(isinstance(_crash(policy, float(n), charged=True), RestartAt) for n in range(100))


def test_boot_failures_in_a_row_give_up():
    policy = RestartPolicy()
    decisions = [_crash(policy, float(n), ready=False) for n in range(BOOT_FAILURES)]
    assert decisions[-1] == GiveUp(booting=True, deaths=BOOT_FAILURES)
    assert all(isinstance(d, RestartAt) for d in decisions[:-1])


def test_a_boot_that_works_forgets_those_that_did_not():
    policy = RestartPolicy()
    for n in range(BOOT_FAILURES - 1):
        _crash(policy, float(n), ready=False)
    policy.booted()
    assert isinstance(_crash(policy, 9.0, ready=False), RestartAt)


@given(
    st.lists(
        st.tuples(st.floats(0, 30), st.booleans(), st.floats(0, 100), st.integers(0, 3), st.booleans()), max_size=60
    )
)
def test_any_history_keeps_backoff_bounded_and_gives_up_only_over_budget(history):
    policy, now, done, boots = RestartPolicy(), 0.0, 0, 0
    uncharged: list[Any] = []
    for step, ready, lived, more, charged in history:
        now, done = now + step, done + more
        decision = policy.died(now, ready=ready, lived=lived, done=done, charged=charged)
        if not ready:
            boots += 1
            assert isinstance(decision, GiveUp) == (boots >= BOOT_FAILURES)
        else:
            boots = 0
            if policy.crashes == []:
                uncharged = []
            elif not charged:
                uncharged = [at for at in uncharged if now - at < WINDOW] + [now]
            assert isinstance(decision, GiveUp) == (not charged and len(uncharged) >= CRASHES)
        if isinstance(decision, RestartAt):
            assert FIRST_BACKOFF <= decision.delay <= LONGEST_BACKOFF
            assert decision.when == now + decision.delay
