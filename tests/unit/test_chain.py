"""Chains of continuations: which are believed, and when they are held back."""

import math
from dataclasses import replace

import pytest

from sqspipes_mp.ipc.leases import asked_after
from sqspipes_mp.messages.chain import MOST_PAUSE, UNPAUSED, Chain, chain_of, continued, due_of
from sqspipes_mp.messages.envelope import Message, outgoing_meta
from sqspipes_mp.messages.ids import token

MESSAGE = Message(1, {"id": "root", "x-mine": 1}, "root", "f" * 64, 3)
CHAIN = Chain(MESSAGE.parent, 7, 2, 0)


def goes_on(chain: Chain = CHAIN, due: float | None = None) -> Message:
    hop, meta = continued(MESSAGE, "work", chain, due=due)
    return Message(2, meta, "root", hop, 3)


def test_a_chain_is_believed_by_its_own_stage_and_in_its_own_message_alone() -> None:
    message = goes_on()
    assert chain_of(message, "work") == CHAIN
    assert chain_of(message, "other") is None
    # A program that copies meta and gives its output an id of its own.
    assert chain_of(replace(message, parent="e" * 64), "work") is None
    assert chain_of(MESSAGE, "work") is None


@pytest.mark.parametrize("wrong", [None, 1, "x", [], {"yielded": "1"}, {"count": -1}, {"first": 3}, {"quick": True}])
def test_what_is_no_chain_is_not_believed(wrong: object) -> None:
    message = goes_on()
    chain = message.meta["chain"] | wrong if isinstance(wrong, dict) else wrong
    assert chain_of(replace(message, meta={**message.meta, "chain": chain}), "work") is None


def test_it_stays_behind_and_the_users_meta_travels_on() -> None:
    message = goes_on(due=5.0)
    assert outgoing_meta(message, "root", 0, "h") == {"id": "root", "x-mine": 1, "priority": 0, "hop": "h"}
    assert message.meta["not_before"] == 5.0
    # The next one is not as early as this one was.
    assert "not_before" not in continued(message, "work", CHAIN)[1]


def test_a_due_time_is_believed_in_a_chain_and_in_what_is_fed() -> None:
    assert due_of(goes_on(due=5.0), CHAIN, is_fed=False) == 5.0
    assert due_of(goes_on(due=5.0), None, is_fed=True) is None
    fed = Message(1, {"not_before": 7}, "root", token("root"), 0)
    assert due_of(fed, None, is_fed=True) == 7
    assert due_of(fed, None, is_fed=False) is None
    assert due_of(replace(fed, meta={"not_before": True}), None, is_fed=True) is None


def test_quick_ones_are_held_back_more_and_more() -> None:
    pauses = [replace(CHAIN, quick=quick).pause for quick in range(UNPAUSED + 10)]
    assert pauses[: UNPAUSED + 1] == [0.0] * (UNPAUSED + 1)
    assert pauses[UNPAUSED + 1 :] == [1.0, 2.0, 4.0, 8.0, 16.0] + [MOST_PAUSE] * 4


def test_calls_are_asked_to_end_ten_minutes_before_the_longest_time_in_flight() -> None:
    assert asked_after(43_200.0) == 43_200.0 - 600.0
    assert asked_after(8.0) == 6.0
    assert asked_after(None) == math.inf
