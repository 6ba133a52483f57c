"""What every broker promises about messages."""

import time
import uuid

import pytest

from sqspipes_mp.brokers.base import Completion, DeadLetter, Output
from sqspipes_mp.errors import QueueMissing
from sqspipes_mp.messages.limits import MAX_BODY, MAX_BYTES
from tests.contract.conftest import Bench, dead_of


def test_sent_comes_once_and_is_gone_when_deleted(bench: Bench, fifo: bool) -> None:
    queue = bench.queue(fifo=fifo)
    before = time.time()
    bench.send(queue, "hello")
    (message,) = bench.receive(queue)
    assert message.body == "hello"
    assert message.receives == 1
    assert message.charges == 0
    assert message.handle.queue == queue
    assert before - 5 < message.sent_at < time.time() + 5
    assert bench.finish([message]) == []
    assert bench.connection.depth(queue).empty


def test_receive_hides(bench: Bench, fifo: bool) -> None:
    queue = bench.queue(fifo=fifo)
    bench.send(queue, "hello")
    bench.receive(queue)
    assert bench.empty(queue)
    assert bench.connection.depth(queue).in_flight == 1


def test_expired_shows_again_with_one_more_receive(bench: Bench, fifo: bool) -> None:
    queue = bench.queue(fifo=fifo)
    bench.send(queue, "hello")
    (first,) = bench.receive(queue, visibility=1)
    (second,) = bench.receive(queue)
    assert second.body == "hello"
    assert second.receives == first.receives + 1
    assert second.handle.message_id == first.handle.message_id


def test_extend_keeps_hidden(bench: Bench) -> None:
    for _ in range(20):
        queue = bench.queue()
        bench.send(queue, "kept", "expires")
        began = time.monotonic()
        messages = {message.body: message for message in bench.receive(queue, count=2, visibility=2)}
        stale = bench.connection.extend([messages["kept"].handle], 30)
        if time.monotonic() - began < 2:
            # Else it may have expired before.
            break
    assert stale == []
    assert bench.receive(queue)[0].body == "expires"
    assert bench.empty(queue)


def test_extend_to_zero_releases(bench: Bench, fifo: bool) -> None:
    queue = bench.queue(fifo=fifo)
    bench.send(queue, "hello")
    (first,) = bench.receive(queue)
    assert bench.connection.extend([first.handle], 0) == []
    assert bench.receive(queue)[0].receives == 2


def test_extend_beyond_twelve_hours_takes_what_is_left(bench: Bench) -> None:
    queue = bench.queue()
    bench.send(queue, "hello")
    (message,) = bench.receive(queue)
    assert bench.connection.extend([message.handle], 43_200) == []
    assert bench.empty(queue)


def test_charge_counts_a_failed_attempt(bench: Bench) -> None:
    bench.needs("charges")
    queue = bench.queue()
    bench.send(queue, "hello")
    (first,) = bench.receive(queue)
    bench.connection.extend([first.handle], 0, attempts=1)
    # Whoever finds it unsaid that this was done does it again.
    bench.connection.extend([first.handle], 0, attempts=1)
    (second,) = bench.receive(queue)
    assert second.charges == 1
    bench.connection.extend([second.handle], 0)
    (third,) = bench.receive(queue)
    assert third.charges == 1
    bench.connection.extend([third.handle], 0, attempts=2)
    assert bench.receive(queue)[0].charges == 2


def test_deleted_is_stale_to_extend(bench: Bench, fifo: bool) -> None:
    queue = bench.queue(fifo=fifo)
    bench.send(queue, "hello", "there")
    messages = bench.receive(queue, count=2)
    bench.finish(messages[:1])
    assert bench.connection.extend([message.handle for message in messages], 30) == [messages[0].handle]


def test_receipt_of_an_earlier_delivery_is_stale(bench: Bench, fifo: bool) -> None:
    bench.needs("stale")
    queue = bench.queue(fifo=fifo)
    bench.send(queue, "hello")
    (first,) = bench.receive(queue)
    bench.connection.extend([first.handle], 0)
    (second,) = bench.receive(queue)
    assert bench.connection.extend([first.handle], 0) == [first.handle]
    told = [first.handle] if fifo or bench.can("stale delete") else []
    assert bench.finish([first]) == told
    assert bench.connection.depth(queue).in_flight == 1
    assert bench.finish([second]) == []


def test_stale_input_sends_nothing(bench: Bench) -> None:
    bench.needs("stale")
    bench.needs("stale before sending")
    source, sink = bench.queue(), bench.queue()
    bench.send(source, "hello")
    (first,) = bench.receive(source)
    bench.connection.extend([first.handle], 0)
    bench.receive(source)
    assert bench.connection.complete([Completion(first.handle, (Output(sink, "x", "hop"),))]) == [first.handle]
    assert bench.connection.depth(sink).empty


def test_max_messages_is_a_limit(bench: Bench) -> None:
    queue = bench.queue()
    bench.send(queue, *map(str, range(15)))
    assert 1 <= len(bench.connection.receive([queue], 3, 1, 30)) <= 3
    assert 1 <= len(bench.connection.receive([queue], 50, 1, 30)) <= 15


def test_highest_level_comes_first(bench: Bench) -> None:
    high, middle, low = bench.queue(), bench.queue(), bench.queue()
    bench.send(low, "low")
    bench.send(high, "high")
    bench.send(middle, "middle")
    assert [bench.receive(high, middle, low)[0].body for _ in range(3)] == ["high", "middle", "low"]


def test_every_level_wakes_a_waiting_receive(bench: Bench) -> None:
    levels = [bench.queue() for _ in range(3)]
    for level in levels:
        bench.send(level, level, delay=1)
    found = [bench.connection.receive(levels, 1, 15, 30)[0] for _ in levels]
    assert {message.body for message in found} == set(levels)
    assert all(message.handle.queue == message.body for message in found)


def test_delayed_comes_later(bench: Bench) -> None:
    queue = bench.queue()
    started = time.monotonic()
    bench.send(queue, "later", delay=2)
    depth = bench.connection.depth(queue)
    if time.monotonic() - started < 1.5:
        assert (depth.visible, depth.in_flight, depth.delayed) == (0, 0, 1)
    assert bench.receive(queue)[0].body == "later"
    assert time.monotonic() - started > 1


def test_empty_receive_waits_and_returns_nothing(bench: Bench) -> None:
    queue = bench.queue()
    started = time.monotonic()
    assert bench.connection.receive([queue], 10, 1, 30) == []
    assert 0.8 < time.monotonic() - started < 15


def test_completion_sends_outputs_and_deletes_its_input(bench: Bench, fifo: bool) -> None:
    source, sink, other = bench.queue(fifo=fifo), bench.queue(fifo=fifo), bench.queue()
    bench.send(source, "in")
    (message,) = bench.receive(source)
    outputs = (Output(sink, "a", uuid.uuid4().hex), Output(other, "b", uuid.uuid4().hex))
    assert bench.connection.complete([Completion(message.handle, outputs)]) == []
    assert bench.receive(sink)[0].body == "a"
    assert bench.receive(other)[0].body == "b"
    assert bench.connection.depth(source).empty


def test_input_stays_until_its_last_completion(bench: Bench) -> None:
    source, sink = bench.queue(), bench.queue()
    bench.send(source, "in")
    (message,) = bench.receive(source)
    bench.connection.complete([Completion(message.handle, (Output(sink, "a", "hop-a"),), last=False)])
    assert bench.connection.depth(source).in_flight == 1
    bench.connection.complete([Completion(message.handle, (Output(sink, "b", "hop-b"),))])
    assert bench.connection.depth(source).empty
    assert {found.body for found in bench.receive(sink, count=2)} == {"a", "b"}


def test_dead_letter_keeps_the_body_and_removes_the_original(bench: Bench, fifo: bool) -> None:
    queue = bench.queue(fifo=fifo, dead=True)
    hop = uuid.uuid4().hex
    bench.connection.complete([Completion(None, (Output(queue, "poison", hop),))])
    (message,) = bench.receive(queue)
    letter = DeadLetter(message.handle, dead_of(queue), "poison", hop, failure='{"error": "ValueError"}')
    assert bench.connection.dead_letter([letter]) == []
    assert bench.connection.depth(queue).empty
    assert bench.receive(dead_of(queue))[0].body == "poison"


def test_dead_letter_of_the_longest_body(bench: Bench) -> None:
    queue = bench.queue(dead=True)
    body, too_long = "x" * MAX_BODY, "y" * MAX_BYTES
    bench.send(queue, body)
    bench.send(queue, too_long)
    letters = [
        DeadLetter(
            message.handle,
            dead_of(queue),
            message.body,
            uuid.uuid4().hex,
            failure="f" * 16_000 if message.body == body else None,
        )
        for message in bench.receive(queue, count=2)
    ]
    assert bench.connection.dead_letter(letters) == []
    assert {message.body for message in bench.receive(dead_of(queue), count=2)} == {body, too_long}


@pytest.mark.parametrize(
    "body", ["é", "日本語 😀", '{"a": "\\u0000"}', "tab\tand\nline\rend", " ", "\ud7ff\ue000\U0010ffff"]
)
def test_body_travels_unchanged(bench: Bench, body: str) -> None:
    queue = bench.queue()
    bench.send(queue, body)
    assert bench.receive(queue)[0].body == body


def test_many_and_large_messages_in_one_call(bench: Bench) -> None:
    queue = bench.queue()
    small = [f"small {n}" for n in range(23)]
    large = [letter * 400_000 for letter in "abcde"]
    bench.send(queue, *small, *large)
    messages = bench.receive(queue, count=28)
    assert sorted(message.body for message in messages) == sorted(small + large)
    assert bench.finish(messages) == []
    assert bench.connection.depth(queue).empty


def test_group_is_in_order_and_blocks_while_in_flight(bench: Bench) -> None:
    queue = bench.queue(fifo=True)
    bench.send(queue, "1", "2", "3", "4", group="g")
    (first,) = bench.receive(queue)
    assert (first.body, first.group) == ("1", "g")
    assert bench.empty(queue)
    bench.finish([first])
    assert [message.body for message in bench.receive(queue, count=3)] == ["2", "3", "4"]


def test_released_message_of_a_group_comes_before_later_ones(bench: Bench) -> None:
    queue = bench.queue(fifo=True)
    bench.send(queue, "1", "2", group="g")
    (first,) = bench.receive(queue)
    bench.connection.extend([first.handle], 0)
    assert [message.body for message in bench.receive(queue, count=2)] == ["1", "2"]


def test_groups_do_not_block_each_other(bench: Bench) -> None:
    queue = bench.queue(fifo=True)
    bench.send(queue, "a1", "a2", group="a")
    bench.send(queue, "b1", group="b")
    assert bench.receive(queue)[0].body == "a1"
    assert bench.receive(queue)[0].body == "b1"


def test_same_hop_is_accepted_but_comes_once(bench: Bench) -> None:
    queue = bench.queue(fifo=True)
    twice = Completion(None, (Output(queue, "x", "same"),))
    bench.connection.complete([twice])
    bench.connection.complete([twice])
    bench.finish(bench.receive(queue))
    assert bench.empty(queue)


def test_same_hop_is_dropped_after_the_first_was_deleted(bench: Bench) -> None:
    bench.needs("dedup after delete")
    source, sink = bench.queue(fifo=True), bench.queue(fifo=True)
    bench.send(source, "in")
    (message,) = bench.receive(source)
    once = Completion(message.handle, (Output(sink, "x", "same"),), last=False)
    bench.connection.complete([once])
    bench.finish(bench.receive(sink))
    bench.connection.complete([once])
    assert bench.empty(sink)


def test_depth_counts(bench: Bench) -> None:
    queue = bench.queue()
    bench.send(queue, "1", "2", "3")
    bench.receive(queue)
    depth = bench.connection.depth(queue)
    assert (depth.visible, depth.in_flight, depth.empty) == (2, 1, False)


def test_completing_into_a_missing_queue_keeps_the_input(bench: Bench) -> None:
    source = bench.queue()
    bench.send(source, "in")
    (message,) = bench.receive(source)
    missing = f"t-{uuid.uuid4().hex}"
    with pytest.raises(QueueMissing, match=missing):
        bench.connection.complete([Completion(message.handle, (Output(missing, "x", "hop"),))])
    assert bench.connection.depth(source).in_flight == 1
