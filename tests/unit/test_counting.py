"""The ledger of ``map``: each result goes out once and none is missed, in any order, however often it is said."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp.caller.ledger import Ledger
from sqspipes_mp.ipc.channel import Frame, Kind
from sqspipes_mp.messages.ids import mark
from tests.gates import present

#: Kind, token, hop, and what is said of it.
Word = tuple[str, str, int, Any]


class World:
    """Values that become trees of messages; what workers would say of them."""

    def __init__(self, shapes: list[list[int]], chance: random.Random) -> None:
        self.said: dict[str, list[Word]] = {}
        for number, shape in enumerate(shapes):
            name = f"v{number}"
            said: list[Word] = []
            self.said[name] = said
            # shape: results (or none) of each of the messages that the value became.
            children = [f"{name}/{place}" for place in range(len(shape))]
            said.append(("step", name, mark(name), [mark(child) for child in children]))
            for child, results in zip(children, shape, strict=True):
                if results < 0:
                    said.append(("buried", name, mark(child), ValueError(child)))
                elif results == 0:
                    said.append(("step", name, mark(child), []))
                else:
                    said.append(("results", name, mark(child), [f"{child}.{one}" for one in range(results)]))
        self.chance = chance

    def words(self) -> list[Word]:
        """All of it in any order, some of it twice."""
        words = [word for said in self.said.values() for word in said]
        words += self.chance.sample(words, len(words) // 3)
        self.chance.shuffle(words)
        return words


def say(ledger: Ledger, word: Word) -> list[Frame]:
    """Tell the ledger; returns the results that it does not know any more."""
    kind, name, hop, what = word
    if kind == "step":
        ledger.step(name, hop, what)
    elif kind == "buried":
        ledger.dead_lettered(name, hop, what)
    else:
        frames = [
            Frame(Kind.RESULT, {"token": name, "hop": hop, "id": ident, "last": ident == what[-1]}) for ident in what
        ]
        return [frame for frame in frames if ledger.result(frame) is False]
    return []


shapes = st.lists(st.lists(st.integers(-1, 3), max_size=4), max_size=8)


@given(shapes, st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_each_result_goes_out_once_and_every_value_ends(shapes, ordered, inputs, chance):
    world = World(shapes, chance)
    ledger = Ledger(ordered=ordered, inputs=inputs)
    given_out: list[tuple[str, object]] = []

    def hand_out() -> None:
        while (hand := ledger.next()) is not None:
            if ledger.is_new(hand):
                ledger.given(hand)
                what = hand.error if hand.frame is None else hand.frame.header["id"]
                given_out.append((hand.entry.token, what))
                assert hand.entry.value == hand.entry.token
            ledger.acknowledged(hand)

    for name in world.said:
        ledger.fed(name, name)
    for word in world.words():
        say(ledger, word)
        if chance.random() < 0.5:
            hand_out()
    hand_out()
    wanted = [ident for said in world.said.values() for word in said if word[0] == "results" for ident in word[3]]
    assert sorted(what for _, what in given_out if isinstance(what, str)) == sorted(wanted)
    failed = [name for name, said in world.said.items() if any(word[0] == "buried" for word in said)]
    assert sorted(name for name, what in given_out if isinstance(what, ValueError)) == sorted(failed)
    if ordered:
        assert [name for name, _ in given_out] == sorted(name for name, _ in given_out)
    assert (len(ledger), ledger.holding, ledger.unacknowledged) == (0, 0, 0)


@given(shapes, st.booleans(), st.randoms(use_true_random=False))
def test_what_was_left_waits_for_its_value(shapes, ordered, chance):
    world = World(shapes, chance)
    ledger = Ledger(ordered=ordered, inputs=True)
    for name in world.said:
        ledger.left(name, [name])
    words = world.words()
    for word in words[: len(words) // 2]:
        say(ledger, word)
    assert ledger.next() is None
    for name in world.said:
        ledger.met(name, name)
    for word in words[len(words) // 2 :]:
        say(ledger, word)
    ledger.exhausted()
    while (hand := ledger.next()) is not None:
        ledger.given(hand)
        assert hand.entry.value == hand.entry.token
        ledger.acknowledged(hand)
    assert (len(ledger), ledger.holding, ledger.unacknowledged) == (0, 0, 0)


@given(st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_a_dead_letter_is_told_once_and_with_its_value(ordered, inputs, left, early):
    ledger = Ledger(ordered=ordered, inputs=inputs)
    if left:
        # A sibling's message is still there; its letter may come before the iterable does.
        ledger.left("a", ["a/1"])
    ledger.dead("a", "a/0", ValueError("a/0"))
    ledger.dead("never met", "b", ValueError("b"))
    if left and early:
        ledger.dead_lettered("a", mark("a/1"), ValueError("a/1"))
    assert ledger.met("a", "value")
    if left and not early:
        ledger.dead_lettered("a", mark("a/1"), ValueError("a/1"))
    assert not ledger.met("a", "value")
    ledger.exhausted()
    hand = present(ledger.next())
    assert (type(hand.error), hand.entry.value) == (ValueError, "value")
    ledger.acknowledged(hand)
    assert (ledger.next(), len(ledger)) == (None, 0)


def test_a_result_that_comes_after_its_value_is_told_from_a_strangers():
    ledger = Ledger(ordered=False, inputs=False)
    ledger.fed("a", 1)
    word = ("results", "a", mark("a"), ["a.0"])
    assert say(ledger, word) == []
    hand = present(ledger.next())
    assert ledger.is_new(hand)
    ledger.given(hand)
    # Still to be acknowledged: a second copy waits its turn, and is not given again.
    assert say(ledger, word) == []
    ledger.acknowledged(hand)
    again = present(ledger.next())
    assert not ledger.is_new(again)
    ledger.acknowledged(again)
    assert len(say(ledger, word)) == 1
    assert ledger.result(Frame(Kind.RESULT, {"token": "b", "hop": 1, "id": "b.0", "last": True})) is None
    # Of an ended value of ours, but nobody has it: a dead letter that was redriven, say.
    assert ledger.result(Frame(Kind.RESULT, {"token": "a", "hop": 2, "id": "a.1", "last": True})) is None


def test_results_handed_out_long_ago_are_forgotten_as_unknown_and_never_as_handed_out(monkeypatch):
    monkeypatch.setattr("sqspipes_mp.caller.ledger._HANDED", 10)
    ledger = Ledger(ordered=False, inputs=False)
    for n in range(100):
        ledger.fed(f"v{n}", n)
        say(ledger, ("results", f"v{n}", mark(f"v{n}"), [f"v{n}.0"]))
        hand = present(ledger.next())
        ledger.given(hand)
        ledger.acknowledged(hand)
    found = [
        ledger.result(Frame(Kind.RESULT, {"token": f"v{n}", "hop": mark(f"v{n}"), "id": f"v{n}.0", "last": True}))
        for n in range(100)
    ]
    assert found[-10:] == [False] * 10
    assert set(found) == {False, None}


def frame(token: str, hop: str, ident: str, child: int = 1) -> Frame:
    return Frame(Kind.RESULT, {"token": token, "hop": mark(hop), "id": ident, "last": True, "child": child})


def taken(ledger: Ledger) -> list[object]:
    """Take all that the ledger gives out: ids of results, and texts of errors."""
    found: list[object] = []
    while (hand := ledger.next()) is not None:
        if ledger.is_new(hand):
            ledger.given(hand)
            found.append(str(hand.error) if hand.frame is None else hand.frame.header["id"])
        ledger.acknowledged(hand)
    return found


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("second", [[], ["a/1"], ["a/2"]], ids=["none", "fewer", "other"])
def test_the_report_of_the_last_delivery_counts(ordered: bool, second: list[str]):
    ledger = Ledger(ordered=ordered, inputs=False)
    ledger.fed("a", 1)
    # Its worker died before any output was accepted, and the second call made others.
    ledger.step("a", mark("a"), [mark("a/0"), mark("a/1")], 1)
    ledger.step("a", mark("a"), map(mark, second), 2)
    # A worker that was only slow says what it would have sent.
    ledger.step("a", mark("a"), [mark("a/9")], 1)
    for child in second:
        assert ledger.result(frame("a", child, child))
    assert taken(ledger) == second
    assert len(ledger) == 0


def test_a_child_that_is_announced_again_is_awaited_again():
    ledger = Ledger(ordered=False, inputs=False)
    ledger.fed("a", 1)
    ledger.fed("b", 2)
    for number, children in enumerate([["a/0", "a/1"], ["a/0"], ["a/1"]], 1):
        ledger.step("a", mark("a"), map(mark, children), number)
    assert len(ledger) == 2
    assert ledger.result(frame("a", "a/1", "r"))
    assert taken(ledger) == ["r"]
    assert len(ledger) == 1


@pytest.mark.parametrize("ordered", [False, True])
def test_what_a_dead_letter_had_announced_is_not_awaited_and_is_handed_out_if_it_comes(ordered: bool):
    ledger = Ledger(ordered=ordered, inputs=False)
    ledger.fed("a", 1)
    ledger.step("a", mark("a"), [mark("a/0")], 1)
    ledger.dead_lettered("a", mark("a"), ValueError("given up"))
    assert taken(ledger) == ["given up"]
    assert len(ledger) == 0
    # SQS had accepted it all the same. Nothing is lost, and nothing comes twice.
    for _ in range(2):
        assert ledger.result(frame("a", "a/0", "r")) in {True, False}
    assert taken(ledger) == ["r"]
    assert ledger.result(frame("a", "a/0", "r")) is False
    assert len(ledger) == 0
    assert ledger.unacknowledged == 0


def test_a_result_that_waits_is_acknowledged_with_its_copies():
    ledger = Ledger(ordered=True, inputs=False)
    ledger.fed("slow", 0)
    ledger.fed("a", 1)
    copies = [frame("a", "a", "r", child) for child in (1, 2, 3)]
    for copy in copies:
        assert ledger.result(copy)
    assert ledger.waiting_on() == {1, 2, 3}
    assert ledger.result(frame("slow", "slow", "s"))
    assert present(ledger.next()).copies == ()
    hand = present(ledger.next())
    assert [*hand.copies, hand.frame] == copies


def test_a_value_that_gave_its_result_has_no_error():
    ledger = Ledger(ordered=True, inputs=False)
    ledger.fed("slow", 0)
    ledger.fed("a", 1)
    assert ledger.result(frame("a", "a", "r"))
    # Its worker was killed with the result, which nobody had acknowledged, and the second call was given up.
    ledger.dead_lettered("a", mark("a"), ValueError("given up"))
    assert ledger.result(frame("slow", "slow", "s"))
    assert taken(ledger) == ["s", "r"]
    assert len(ledger) == 0


def test_few_values_are_kept_for_results_that_may_follow(monkeypatch):
    monkeypatch.setattr("sqspipes_mp.caller.ledger._FOLLOWED", 2)
    ledger = Ledger(ordered=False, inputs=False)
    for name in ("a", "b", "c"):
        ledger.fed(name, name)
        ledger.dead_lettered(name, mark(name), ValueError(name))
    assert taken(ledger) == ["a", "b", "c"]
    assert [ledger.result(frame(name, f"{name}/0", f"{name}.0")) for name in ("a", "b", "c")] == [None, True, True]
