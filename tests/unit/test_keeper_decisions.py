import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp.brokers.base import Depth, Handle
from sqspipes_mp.ipc.leases import Blame, Cause, Lease, LeaseState
from sqspipes_mp.keeper.extend import due
from sqspipes_mp.keeper.judge import judge
from sqspipes_mp.keeper.queue_counts import DrainWatch
from sqspipes_mp.messages.limits import MAX_VISIBILITY

_LEASE = Lease(
    index=0,
    generation=1,
    state=LeaseState.HELD,
    handle=Handle("q", "r", "m"),
    group=None,
    receives=1,
    charges=0,
    received_at=100.0,
    deadline=115.0,
    sent_at=0.0,
    started_at=0.0,
    extended=False,
    lost=False,
)


def _due(*leases, now, timeout=None, visibility=60.0, longest=MAX_VISIBILITY):
    return due(leases, now, visibility=visibility, first=15.0, timeout=timeout, longest=longest)


def test_a_fresh_lease_is_due_at_half_of_what_the_receive_asked_for():
    assert _due(_LEASE, now=107.0) == ([], 107.5)
    extensions, _ = _due(_LEASE, now=107.5)
    assert [(e.lease, e.seconds) for e in extensions] == [(_LEASE, 60)]


def test_an_extended_lease_is_due_at_half_of_the_visibility_timeout():
    lease = replace(_LEASE, deadline=200.0, extended=True)
    assert _due(lease, now=169.0)[0] == []
    assert len(_due(lease, now=170.0)[0]) == 1


def test_sent_closing_and_lost_leases_are_left_alone():
    for lease in (
        replace(_LEASE, state=LeaseState.SENT),
        replace(_LEASE, state=LeaseState.CLOSING),
        replace(_LEASE, state=LeaseState.CHARGING),
        replace(_LEASE, lost=True),
    ):
        assert _due(lease, now=114.0)[0] == []


def test_computed_messages_are_kept_until_they_are_sent():
    assert len(_due(replace(_LEASE, state=LeaseState.DONE), now=110.0)[0]) == 1
    assert len(_due(replace(_LEASE, state=LeaseState.FAILED), now=110.0)[0]) == 1


def test_a_running_lease_does_not_outlive_its_timeout():
    lease = replace(_LEASE, state=LeaseState.RUNNING, started_at=101.0)
    (extension,), _ = _due(lease, now=110.0, timeout=5.0)
    assert extension.seconds == 101 + 5 + 30 - 110
    # One of a batch, whose results wait for their caller one by one.
    (extension,), _ = _due(replace(lease, company=True), now=110.0, timeout=5.0)
    assert extension.seconds == 60
    # A generator that waits until what it gave is sent.
    (extension,), _ = _due(replace(lease, started_at=math.inf), now=110.0, timeout=5.0)
    assert extension.seconds == 60


def test_a_timeout_does_not_cap_what_has_not_started():
    (extension,), _ = _due(_LEASE, now=110.0, timeout=1.0)
    assert extension.seconds == 60


def test_nothing_is_extended_past_twelve_hours():
    old = replace(_LEASE, received_at=0.0, deadline=MAX_VISIBILITY - 20, extended=True)
    assert _due(old, now=MAX_VISIBILITY - 50)[0] == []
    # That limit is SQS's alone.
    assert len(_due(old, now=MAX_VISIBILITY - 50, longest=None)[0]) == 1


@given(
    st.lists(st.tuples(st.sampled_from(LeaseState), st.floats(90, 130), st.booleans(), st.booleans()), max_size=20),
    st.floats(90, 130),
)
def test_the_next_look_is_never_later_than_the_next_lease_that_falls_due(entries, now):
    leases = [
        replace(_LEASE, index=n, state=state, deadline=deadline, extended=extended, lost=lost)
        for n, (state, deadline, extended, lost) in enumerate(entries)
        if state is not LeaseState.FREE
    ]
    extensions, again = _due(*leases, now=now)
    chosen = {extension.lease.index for extension in extensions}
    for lease in leases:
        if lease.state in {LeaseState.SENT, LeaseState.CLOSING, LeaseState.CHARGING} or lease.lost:
            assert lease.index not in chosen
        elif lease.index not in chosen:
            assert again <= lease.deadline - (30.0 if lease.extended else 7.5)
    assert again <= now + 15


def test_only_the_running_message_is_charged():
    held, done = replace(_LEASE, index=1), replace(_LEASE, index=2, state=LeaseState.DONE)
    running = replace(_LEASE, index=3, state=LeaseState.RUNNING)
    verdict = judge([held, done, running], Cause.CRASH, None)
    assert verdict.charge == (running,)
    assert set(verdict.release) == {held, done}


@pytest.mark.parametrize("cause", Cause)
def test_what_had_failed_is_charged_whatever_its_worker_died_of(cause):
    failed, held = replace(_LEASE, index=1, state=LeaseState.FAILED), replace(_LEASE, index=2)
    verdict = judge([held, failed, replace(failed, index=3, lost=True)], cause, None)
    assert (verdict.charge, verdict.release) == ((failed,), (held,))


def test_where_several_ran_nobody_is_charged():
    running = [replace(_LEASE, index=n, state=LeaseState.RUNNING) for n in range(2)]
    verdict = judge(running, Cause.CRASH, None)
    assert verdict.charge == ()
    assert set(verdict.release) == set(running)


def test_a_timeout_charges_the_late_one():
    running = [replace(_LEASE, index=n, state=LeaseState.RUNNING) for n in range(3)]
    verdict = judge(running, Cause.TIMEOUT, Blame(1, running[1].generation, Cause.TIMEOUT))
    assert verdict.charge == (running[1],)
    assert set(verdict.release) == {running[0], running[2]}
    # It is known who is to blame, so the others need not run alone.
    assert verdict.alone == ()
    # Also where the late call came back just before the kill, and its worker has charged it.
    verdict = judge(running[:1] + running[2:], Cause.TIMEOUT, None, known=True)
    assert (len(verdict.release), verdict.charge, verdict.alone) == (len(running) - 1, (), ())


@pytest.mark.parametrize("cause", [Cause.TIMEOUT, Cause.MEMORY, Cause.FULL])
def test_whom_a_worker_is_killed_for_pays_though_its_call_came_back_and_nobody_pays_in_its_place(cause):
    blamed, following = replace(_LEASE, index=1), replace(_LEASE, index=2, state=LeaseState.RUNNING)
    blame = Blame(1, blamed.generation, cause)
    for state in (LeaseState.DONE, LeaseState.FAILED):
        back = replace(blamed, state=state)
        verdict = judge([back, following], cause, blame)
        assert (verdict.charge, verdict.release) == ((back,), (following,))
    # Accepted downstream it is done, and in the same entry another message may run by now.
    for other in (
        replace(blamed, state=LeaseState.SENT),
        replace(following, index=1, generation=blamed.generation + 1),
    ):
        assert judge([other], cause, blame).charge == ()
    # Where no single call could be told guilty, the only one left is no proof.
    assert judge([following], cause, None).charge == ()


def test_a_worker_cut_off_by_shutdown_charges_nobody():
    running = replace(_LEASE, state=LeaseState.RUNNING)
    for cause in (Cause.CUT, Cause.CLEAN):
        assert judge([running], cause, None).charge == ()


def test_what_was_sent_is_deleted_and_not_released():
    sent = replace(_LEASE, state=LeaseState.SENT)
    verdict = judge([sent], Cause.CRASH, None)
    assert (verdict.delete, verdict.release) == ((sent,), ())


def test_a_lost_lease_is_somebody_elses():
    verdict = judge([replace(_LEASE, state=LeaseState.RUNNING, lost=True)], Cause.CRASH, None)
    assert (verdict.release, verdict.delete, verdict.charge) == ((), (), ())


def test_waiting_for_queues_to_settle_is_said_once(caplog):
    depths = {"in": Depth(1, 0, 0)}
    plan: Any = SimpleNamespace(source=None, selected=(), inputs={}, idle=60.0, idle_given=False, watched=("in",))
    unused: Any = None
    watch = DrainWatch(plan, unused, SimpleNamespace(settle=0.0, depth=depths.get), lambda: None)
    with caplog.at_level("INFO", "sqspipes_mp.keeper"):
        assert not watch.drained(0.0)
        assert caplog.messages == []
        depths["in"] = Depth(0, 0, 0)
        assert [watch.drained(now) for now in (1.0, 30.0, 61.0)] == [False, False, True]
    assert caplog.messages == ["every queue is empty; the run ends when they stay so for 60 s (idle=60)"]
