import hashlib
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp.brokers.base import DeadLetter, Handle, Output
from sqspipes_mp.brokers.sqs.entries import (
    MAX_ENTRIES,
    Entry,
    by_queue,
    handle_batches,
    of_letter,
    of_output,
    shorter,
    take_batch,
    visibility,
)
from sqspipes_mp.messages.limits import FAILURE_ATTRIBUTE, MAX_BYTES

SIZES = st.sampled_from([1, 1000, 120_000, 400_000, MAX_BYTES])
GROUPS = st.sampled_from([None, "a", "b", "c"])


def entries(shapes: Sequence[tuple[int, str | None]]) -> deque[Entry]:
    return deque(
        Entry(key, "q", "x" * size, dedup=group and str(key), group=group) for key, (size, group) in enumerate(shapes)
    )


@given(st.lists(st.tuples(SIZES, GROUPS), max_size=40))
def test_batches_respect_the_limits_and_lose_nothing(shapes: list[tuple[int, str | None]]) -> None:
    pending, taken = entries(shapes), []
    while pending:
        batch = take_batch(pending)
        groups = [entry.group for entry in batch if entry.group is not None]
        assert 1 <= len(batch) <= MAX_ENTRIES
        assert sum(entry.size for entry in batch) <= MAX_BYTES
        assert len(groups) == len(set(groups))
        taken += batch
    assert sorted(entry.key for entry in taken) == list(range(len(shapes)))
    for group in ("a", "b", "c"):
        keys = [entry.key for entry in taken if entry.group == group]
        assert keys == sorted(keys)


@given(st.lists(SIZES, max_size=40))
def test_standard_queues_keep_the_order_too(sizes: list[int]) -> None:
    pending, taken = entries([(size, None) for size in sizes]), []
    while pending:
        taken += [entry.key for entry in take_batch(pending)]
    assert taken == list(range(len(sizes)))


def test_full_batches_are_made() -> None:
    pending = entries([(1, None)] * 25)
    assert [len(take_batch(pending)) for _ in range(3)] == [10, 10, 5]


def test_long_group_does_not_starve_the_next() -> None:
    pending = entries([(1, "a")] * 30 + [(1, "b")] * 2)
    assert [entry.key for entry in take_batch(pending)] == [0, 30]
    assert [entry.key for entry in take_batch(pending)] == [1, 31]


def test_size_counts_bytes_and_the_attribute() -> None:
    assert Entry(0, "q", "é").size == 2
    assert Entry(0, "q", "é", failure="{}").size == 2 + len(FAILURE_ATTRIBUTE) + len("String") + 2


def test_standard_output_has_a_delay_a_tenant_and_no_ids() -> None:
    wire = of_output(0, Output("q", "x", "hop", delay=1.2)).wire(3)
    assert wire == {"Id": "3", "MessageBody": "x", "DelaySeconds": 2}
    tenants = of_output(0, Output("q", "x", "hop", group="g"))
    assert tenants.wire(0) == {"Id": "0", "MessageBody": "x", "MessageGroupId": "g"}
    # Tenants have no order, so many of one may be in a batch.
    assert len(take_batch(deque([tenants, tenants, tenants]))) == 3
    assert of_output(0, Output("q", "x", "hop", delay=5000)).delay == 900


def test_fifo_output_has_ids_and_no_delay() -> None:
    wire = of_output(0, Output("q.fifo", "x", "hop", delay=5)).wire(0)
    assert wire == {"Id": "0", "MessageBody": "x", "MessageDeduplicationId": "hop", "MessageGroupId": "hop"}
    assert of_output(0, Output("q.fifo", "x", "hop", group="g")).group == "g"


def test_dead_letter_has_a_deduplication_id_of_its_own() -> None:
    handle = Handle("q.fifo", "receipt", "id")
    entry = of_letter(0, DeadLetter(handle, "d.fifo", "x", "hop", failure="{}"))
    assert entry.dedup == hashlib.sha256(b"hop\ndead\nid").hexdigest()
    assert entry.group == "hop"
    assert entry.wire(0)["MessageAttributes"] == {FAILURE_ATTRIBUTE: {"DataType": "String", "StringValue": "{}"}}


@pytest.mark.parametrize("failure", [None, ""])
def test_dead_letter_without_a_reason_has_no_attribute(failure: str | None) -> None:
    entry = of_letter(0, DeadLetter(Handle("q", "receipt", "id"), "d", "x", "hop", failure=failure))
    assert entry.wire(0) == {"Id": "0", "MessageBody": "x"}


def test_entries_are_sorted_by_queue_in_order() -> None:
    mixed = [Entry(0, "b", "x"), Entry(1, "a", "x"), Entry(2, "b", "x")]
    assert {queue: [entry.key for entry in found] for queue, found in by_queue(mixed).items()} == {
        "b": [0, 2],
        "a": [1],
    }


def test_handles_go_by_queue_in_tens_with_the_last_receipt() -> None:
    handles = [Handle(f"q{n % 2}", f"r{n}", f"m{n}") for n in range(24)]
    batches = list(handle_batches([Handle("q0", "older", "m0"), *handles]))
    assert [(queue, len(batch)) for queue, batch in batches] == [("q0", 10), ("q0", 2), ("q1", 10), ("q1", 2)]
    assert batches[0][1][0].receipt == "r0"


@pytest.mark.parametrize(("seconds", "whole"), [(0, 0), (0.01, 1), (1, 1), (29.5, 30), (1e9, 43_200), (-3, 0)])
def test_visibility_is_whole_seconds_and_only_zero_releases(seconds: float, whole: int) -> None:
    assert visibility(seconds) == whole


def test_shorter_asks_for_less_and_never_releases() -> None:
    assert shorter(60) == [57, 30]
    assert shorter(43_200) == [41_040, 21_600]
    assert shorter(1) == []
    assert shorter(0) == []
