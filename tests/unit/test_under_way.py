"""How many requests are under way, what a carrier takes, and which calls of a source were accepted."""

import math
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp.brokers.base import Completion, Handle, Output, Received
from sqspipes_mp.brokers.sqs.connection import _behind, requests_at_once
from sqspipes_mp.host.clock import lease_now
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import ACCEPTED, FINISHED
from sqspipes_mp.messages.envelope import Message
from sqspipes_mp.worker.context import Delivery
from sqspipes_mp.worker.fifo_order import Busy
from sqspipes_mp.worker.receive.intake import Intake
from sqspipes_mp.worker.receive.prefetch import another
from sqspipes_mp.worker.request_limit import Limit
from sqspipes_mp.worker.send.accepted_calls import SPAN, Accepted
from sqspipes_mp.worker.send.backlog import Backlog, Batch
from sqspipes_mp.worker.send.outgoing import Done, Item, Release

# --- the limit ---


def test_a_throttled_request_halves_what_may_be_under_way_once_a_second():
    limit = Limit(24)
    assert limit.allowed(12, 0, 100.0) == 24
    assert limit.allowed(12, 1, 100.0) == 6
    # Others that were under way then are throttled as well.
    assert limit.allowed(12, 5, 100.5) == 6
    assert limit.allowed(6, 6, 101.5) == 3
    assert limit.allowed(3, 7, 102.6) == 1
    assert limit.allowed(1, 8, 104.0) == 1


def test_it_grows_again_by_one_a_second():
    limit = Limit(4)
    limit.allowed(4, 1, 100.0)
    assert [limit.allowed(1, 1, 100.0 + seconds) for seconds in (0.5, 1, 1.5, 2, 3, 60)] == [2, 3, 3, 4, 4, 4]


def test_a_further_receive_needs_a_backlog_short_calls_and_room_for_its_reply():
    def may(**changed: Any) -> bool:
        return another(**{"under_way": 3, "mean": 0.001, "backlog": True, "reply": 10_000, **changed})

    assert may()
    assert may(under_way=0, mean=None, backlog=False)
    assert not may(mean=None)
    assert not may(mean=1.0)
    assert not may(backlog=False)
    # 64 MiB in all.
    assert may(reply=16 << 20)
    assert not may(reply=17 << 20)


def test_few_descriptors_mean_few_requests():
    assert [requests_at_once(limit) for limit in (16, 64, 100, 160, 1024, -1)] == [1, 1, 9, 24, 24, 24]


class Asked:
    """An intake's context and connection: a call that was longer than a quarter of the lease has just ended."""

    fifo, left, backlog, stage = False, None, False, SimpleNamespace(name="work", index=0)
    slot, board = 0, SimpleNamespace(put=lambda *_: None)

    def __init__(self, *, long: bool, stale: list[str]) -> None:
        self.long, self.stale = long, stale
        self.extended: list[str] = []
        self.connection = self

    def long_call_since(self, then: float, seconds: float) -> bool:
        assert seconds == 15.0 / 4
        return self.long

    def extend(self, handles: list[Handle], seconds: float) -> list[Handle]:
        self.extended += [handle.message_id for handle in handles]
        return [handle for handle in handles if handle.message_id in self.stale]

    def count(self, field: int, amount: int) -> None:
        pass


@pytest.mark.parametrize(
    ("long", "leased_at", "extended", "begun"),
    [(True, None, ["a", "b"], ["a"]), (False, None, [], ["a", "b"]), (True, 0.0, [], ["a", "b"])],
    ids=["unread for long", "read at once", "the file's own word"],
)
def test_a_reply_that_a_long_call_may_have_kept_unread_is_confirmed(
    long: bool, leased_at: float | None, extended: list[str], begun: list[str]
) -> None:
    context = Asked(long=long, stale=["b"])
    known = None if leased_at is None else lease_now()
    batch = [Received(Handle("q", name, name), "{}", 1, 0, None, 0.0, leased_at=known) for name in "ab"]
    ready: list[str] = []
    one: Any = SimpleNamespace(
        _context=context,
        _lease=15.0,
        _fetch=lambda *_: batch,
        _came=lambda *_: None,
        _lock=threading.Lock(),
        _asked=2,
        _full=None,
        _pause=SimpleNamespace(paused=False, give_back=lambda: None),
        _open=lambda received, leased_at: received.handle.message_id,
        _ready=SimpleNamespace(put=ready.extend),
    )
    for name in ("_leased_at", "_confirmed", "_take_in", "_excess"):
        setattr(one, name, getattr(Intake, name).__get__(one))
    Intake._receive(one, ["q"], 2, 0.0)
    assert (context.extended, ready) == (extended, begun)


def test_a_further_receive_reserves_nothing_once_the_backlog_is_over():
    one: Any = SimpleNamespace(
        _lock=threading.Lock(), _full=None, _another=lambda: True, _ask=lambda **_: 10, _asked=0, _under_way=0
    )
    assert Intake._reserve(one, first=False) == (0, None)
    assert (one._asked, one._under_way) == (0, 0)


def message_of(level: str) -> Received:
    return Received(Handle(level, "receipt", "id"), "{}", 1, 0, None, 0.0)


@pytest.mark.parametrize(
    ("full", "asked", "replied", "expected"),
    [
        (None, ["high", "mid", "low"], "low", "low"),
        (None, ["high", "mid", "low"], None, None),
        ("low", ["low"], None, None),
        ("low", ["high"], "high", "high"),
        # A late reply of a lower level says nothing of the higher one.
        ("high", ["low"], "low", "high"),
        ("high", ["low"], None, "high"),
        # The thread that looks at every level has found the higher ones empty.
        ("high", ["high", "mid", "low"], "mid", "mid"),
        ("mid", ["high", "mid", "low"], "high", "high"),
    ],
)
def test_further_receives_go_to_the_highest_level_with_a_backlog(
    full: str | None, asked: list[str], replied: str | None, expected: str | None
) -> None:
    one: Any = SimpleNamespace(
        _lock=threading.Lock(), _queues=("high", "mid", "low"), _full=full, _under_way=1, _round_trip=0.02, _reply=None
    )
    one._context = SimpleNamespace()
    one._place = Intake._place.__get__(one)
    Intake._came(one, asked, [message_of(replied)] if replied else [], 1, 0.02)
    assert one._full == expected


@pytest.mark.parametrize(
    ("level", "full", "waiting", "expected"),
    [
        ("low", "high", 10, True),
        ("low", "high", 3, False),
        ("high", "high", 10, False),
        ("high", "low", 10, False),
        ("low", None, 10, False),
    ],
)
def test_what_a_lower_level_brings_beyond_need_is_released(level: str, full: str, waiting: int, expected: bool) -> None:
    one: Any = SimpleNamespace(
        _queues=("high", "low"), _full=full, _ready=SimpleNamespace(waiting=waiting, idle=1), _depth=lambda: 5
    )
    one._place = Intake._place.__get__(one)
    assert Intake._excess(one, [message_of(level)]) is expected


# --- what a carrier takes ---


def done(group: str | None = None, at: float = 0.0, name: str = "", hop: str = "") -> Done:
    received = Received(Handle("in", name, name), "{}", 1, 0, group, 0.0)
    delivery = Delivery(received, Message(None, {}, "", hop, 0), 0, 1, math.inf)
    return Done(Completion(received.handle), delivery, at=at)


def release(*groups: str) -> Release:
    deliveries = [each.delivery for each in map(done, groups)]
    return Release(tuple(each for each in deliveries if each is not None), 0.0)


def put_into(backlog: Backlog, item: Item) -> None:
    backlog.last += 1
    backlog.items.append((backlog.last, item))


def picked(batch: Batch | None) -> list[Item]:
    assert batch is not None
    return batch.items


def test_on_a_standard_queue_ten_go_together_or_what_has_waited_long_enough():
    backlog = Backlog(batch=10, linger=0.15, by_group=False)
    items = [done("same", at=5.0) for _ in range(13)]
    for item in items:
        put_into(backlog, item)
    assert picked(backlog.pick(5.0, 0)) == items[:10]
    assert backlog.pick(5.1, 0) is None
    assert backlog.patience(5.1) == pytest.approx(0.05)
    assert picked(backlog.pick(5.15, 0)) == items[10:]
    assert backlog.under_way == 2
    assert backlog.patience(6.0) == math.inf


def test_a_release_goes_alone_and_holds_nothing_up():
    backlog = Backlog(batch=10, linger=0.15, by_group=False)
    first, back = done(at=5.0), release("a", "b")
    put_into(backlog, first)
    put_into(backlog, back)
    # The items before it cannot get more company.
    assert picked(backlog.pick(5.0, 0)) == [first]
    assert picked(backlog.pick(5.0, 0)) == [back]


def test_what_was_hurried_waits_for_nothing_and_what_came_after_does():
    backlog = Backlog(batch=10, linger=0.15, by_group=False)
    items = [done(at=5.0), done(at=5.0)]
    put_into(backlog, items[0])
    assert picked(backlog.pick(5.0, backlog.last)) == [items[0]]
    hurried = backlog.last
    put_into(backlog, items[1])
    assert backlog.pick(5.0, hurried) is None


def test_a_group_has_one_batch_under_way_and_keeps_its_order():
    backlog = Backlog(batch=10, linger=0.15, by_group=True)
    a, b, late_a = done("a", at=5.0), done("b", at=5.0), done("a", at=5.0)
    put_into(backlog, a)
    first = backlog.pick(5.0, 0)
    assert picked(first) == [a]
    for item in (late_a, release("a"), b):
        put_into(backlog, item)
    # Beside a batch that is under way others linger for company.
    assert backlog.pick(5.1, 0) is None
    second = backlog.pick(5.2, 0)
    assert picked(second) == [b]
    assert backlog.pick(9.0, math.inf) is None
    assert first is not None
    backlog.carried(first)
    assert picked(backlog.pick(9.0, 0)) == [late_a]


def test_a_message_alone_in_its_group_waits_for_company_and_no_other_does():
    backlog = Backlog(batch=10, linger=0.15, by_group=True)
    put_into(backlog, done("its own hop", at=5.0, hop="its own hop"))
    assert backlog.pick(5.1, 0) is None
    put_into(backlog, done("a", at=5.1, hop="another hop"))
    assert len(picked(backlog.pick(5.1, 0))) == 2


def test_whatever_follows_a_blocked_item_of_its_group_is_blocked_too():
    backlog = Backlog(batch=10, linger=0.0, by_group=True)
    put_into(backlog, done("a"))
    backlog.pick(0.0, math.inf)
    both, later = release("a", "b"), done("b")
    put_into(backlog, both)
    put_into(backlog, later)
    assert backlog.pick(9.0, math.inf) is None


def test_a_source_keeps_the_order_of_the_groups_it_sends_to():
    def made(group: str | None, hop: str) -> Done:
        return Done(Completion(None, (Output("out.fifo", "{}", hop, group),)), at=0.0)

    backlog = Backlog(batch=2, linger=0.0, by_group=True)
    items = [made("a", "1"), made("b", "2"), made("a", "3"), made(None, "4"), made(None, "5")]
    for item in items:
        put_into(backlog, item)
    assert picked(backlog.pick(0.0, math.inf)) == items[:2]
    assert picked(backlog.pick(0.0, math.inf)) == items[3:]
    assert backlog.pick(0.0, math.inf) is None


@given(st.data(), st.booleans())
def test_any_order_of_picks_keeps_each_group_and_loses_nothing(data: st.DataObject, by_group: bool):
    backlog = Backlog(batch=3, linger=0.15, by_group=by_group)
    put: list[Item] = []
    under_way: list[Batch] = []
    carried: list[Item] = []
    for number in range(data.draw(st.integers(0, 40))):
        if data.draw(st.booleans()):
            group = data.draw(st.sampled_from(["a", "b", None]))
            item: Item = release(group) if group and data.draw(st.booleans()) else done(group, name=str(number))
            put.append(item)
            put_into(backlog, item)
        elif under_way and bool(data.draw(st.booleans())):
            ended = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            carried += ended.items
            backlog.carried(ended)
        elif (some := backlog.pick(9.0, math.inf if data.draw(st.booleans()) else 0)) is not None:
            if by_group:
                assert all(some.groups.isdisjoint(other.groups) for other in under_way)
            under_way.append(some)
        gone = set(map(id, carried))
        waiting = [number for number, item in enumerate(put, 1) if id(item) not in gone]
        assert backlog.passed(min(waiting, default=len(put) + 1) - 1)
        assert not waiting or not backlog.passed(waiting[0])
    while under_way or len(backlog.items):
        for batch in under_way:
            carried += batch.items
            backlog.carried(batch)
        under_way = [some] if (some := backlog.pick(9.0, math.inf)) is not None else []
    assert sorted(map(id, carried)) == sorted(map(id, put))
    if by_group:
        for group in "ab":
            order = [id(item) for item in put if group in backlog._groups(item)]
            assert [id(item) for item in carried if group in backlog._groups(item)] == order


def test_only_on_fifo_queues_a_group_keeps_calls_apart():
    first, second = (each.delivery for each in (done("a"), done("a")))
    assert first is not None
    assert second is not None
    for fifo in (True, False):
        busy = Busy(fifo=fifo)
        busy.enter(first)
        assert busy.has(second) is fifo
        assert busy.idle_groups([second]) == (0 if fifo else 1)
        busy.leave(first)
        assert not busy.has(second)


def test_what_follows_an_incomplete_one_of_its_input_group_is_not_done():
    handle = Handle("in.fifo", "r", "m")
    completions = [Completion(handle, group=group) for group in ("a", "b", "a", None, "b")]
    assert _behind(completions, {0}) == {2}
    assert _behind(completions, {1, 2}) == {4}
    # On a standard queue a group is no promise.
    assert _behind([Completion(Handle("in", "r", "m"), group="a")] * 2, {0}) == set()


# --- a source's accepted calls ---


@dataclass
class Calls:
    """What a window has to say of calls, kept the simple way."""

    accepted: set[int] = field(default_factory=set)

    @property
    def prefix(self) -> int:
        return next(number for number in range(10_000) if number not in self.accepted)


@given(st.lists(st.tuples(st.integers(0, SPAN - 1), st.booleans()), max_size=60), st.integers(0, 3))
def test_the_window_tells_each_accepted_call_from_the_others(steps: list[tuple[int, bool]], far: int):
    board = Scoreboard.create(1, 1)
    try:
        known, window = Calls(), Accepted(board, 0, goes_on=True)
        for number in range(far * SPAN // 2):
            known.accepted.add(number)
            window.add(number)
        for beyond, restarts in steps:
            number = known.prefix + beyond
            known.accepted.add(number)
            window.add(number)
            if restarts:
                window = Accepted(board, 0, goes_on=True)
            assert window.prefix == board.get(0, ACCEPTED) == known.prefix
        assert [window.has(n) for n in range(known.prefix + SPAN)] == [
            n in known.accepted for n in range(known.prefix + SPAN)
        ]
        assert not window.has(known.prefix + SPAN)
    finally:
        board.close()


def test_a_generator_has_finished_once_all_before_its_end_is_accepted():
    board = Scoreboard.create(1, 1)
    window = Accepted(board, 0, goes_on=True)
    window.add(1)
    window.end(2)
    assert not board.get(0, FINISHED)
    window.add(0)
    assert board.get(0, FINISHED)
    board.close()


def test_a_successor_goes_on_though_the_prefix_was_never_written():
    board = Scoreboard.create(1, 1)
    window = Accepted(board, 0, goes_on=True)
    for number in range(SPAN):
        window._put(number, accepted=True)
    successor = Accepted(board, 0, goes_on=True)
    assert (successor.prefix, board.get(0, ACCEPTED)) == (SPAN, SPAN)
    assert successor.wait_for_room(SPAN, threading.Event())
    successor.end(SPAN)
    assert board.get(0, FINISHED)
    board.close()


def test_a_function_takes_no_call_of_its_predecessor_for_its_own():
    board = Scoreboard.create(1, 1)
    first = Accepted(board, 0, goes_on=False)
    first.add(0)
    first.add(2)
    second = Accepted(board, 0, goes_on=False)
    assert (second.prefix, second.has(2)) == (1, False)
    second.add(1)
    assert second.prefix == 2
    board.close()


def test_a_call_waits_for_room_in_the_window():
    board = Scoreboard.create(1, 1)
    window, over = Accepted(board, 0, goes_on=True), threading.Event()
    assert window.wait_for_room(SPAN - 1, over)
    threading.Thread(target=window.add, args=(0,)).start()
    assert window.wait_for_room(SPAN, over)
    over.set()
    assert not window.wait_for_room(SPAN + 1, over)
    board.close()
