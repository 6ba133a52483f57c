"""How messages are packed into SQS's batches (any process that has a connection open).

Pure. The limits are those of Amazon SQS API Reference, SendMessageBatch: 10 entries, 1 MiB in all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqspipes_mp.brokers.base import DeadLetter, Handle, Output
from sqspipes_mp.messages.attributes import Attribute, size_of
from sqspipes_mp.messages.ids import moved_id
from sqspipes_mp.messages.limits import FAILURE_ATTRIBUTE, MAX_BYTES, MAX_VISIBILITY

#: Entries per batch (Amazon SQS API Reference, SendMessageBatch).
MAX_ENTRIES = 10
#: Longest DelaySeconds of one message (Amazon SQS API Reference, SendMessage).
MAX_DELAY = 900
#: How far ahead a batch may look for messages of other groups: keeps packing one long group linear.
LOOK_AHEAD = 100

_ATTRIBUTE_OVERHEAD = len(FAILURE_ATTRIBUTE) + len("String")


@dataclass(frozen=True, slots=True)
class Entry:
    """A message on its way into a batch. ``key`` is its caller's; ``group`` and ``dedup`` are None off FIFO queues."""

    key: int
    queue: str
    body: str
    dedup: str | None = None
    group: str | None = None
    delay: int = 0
    failure: str | None = None
    attributes: tuple[Attribute, ...] = ()

    @property
    def size(self) -> int:
        """Bytes as SQS counts them: body, and name, type and value of the attributes."""
        size = utf8_length(self.body) + (_ATTRIBUTE_OVERHEAD + utf8_length(self.failure) if self.failure else 0)
        return size + size_of(self.attributes) if self.attributes else size

    def wire(self, position: int) -> dict[str, Any]:
        """Return the SendMessageBatchRequestEntry; its Id is the position in the batch."""
        entry: dict[str, Any] = {"Id": str(position), "MessageBody": self.body}
        if self.dedup is not None:
            entry["MessageDeduplicationId"] = self.dedup
        if self.group is not None:
            entry["MessageGroupId"] = self.group
        if self.delay:
            entry["DelaySeconds"] = self.delay
        if self.failure or self.attributes:
            entry["MessageAttributes"] = told = {each.name: _on_wire(each) for each in self.attributes}
            if self.failure:
                told[FAILURE_ATTRIBUTE] = {"DataType": "String", "StringValue": self.failure}
        return entry


def _on_wire(attribute: Attribute) -> dict[str, str | bytes]:
    field = "BinaryValue" if isinstance(attribute.value, bytes) else "StringValue"
    return {"DataType": attribute.kind, field: attribute.value}


def utf8_length(text: str) -> int:
    """Count the bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def is_fifo(queue: str) -> bool:
    """Tell whether a queue's name, URL or ARN is a FIFO queue's."""
    return queue.endswith(".fifo")


def of_output(key: int, output: Output) -> Entry:
    """Make the entry of an output. FIFO queues take no delay of single messages, so there it is left out."""
    if is_fifo(output.queue):
        group = output.group or output.hop
        return Entry(key, output.queue, output.body, output.hop, group, attributes=output.attributes)
    delay = min(MAX_DELAY, math.ceil(output.delay))
    return Entry(key, output.queue, output.body, delay=delay, attributes=output.attributes)


def of_letter(key: int, letter: DeadLetter) -> Entry:
    """Make the entry of a dead letter. With the original's deduplication id SQS would accept and then drop it."""
    if not is_fifo(letter.queue):
        return Entry(key, letter.queue, letter.body, failure=letter.failure, attributes=letter.attributes)
    dedup = moved_id(letter.hop, "dead", letter.handle.message_id)
    # Our hop ids can be groups; another sender's may have characters, or be of a length, that SQS refuses.
    ours = letter.hop.isascii() and letter.hop.isalnum() and len(letter.hop) <= len(dedup)
    group = letter.group or (letter.hop if ours else dedup)
    return Entry(key, letter.queue, letter.body, dedup, group, 0, letter.failure, letter.attributes)


def by_queue(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Sort entries by queue, in their order."""
    queues: dict[str, list[Entry]] = {}
    for entry in entries:
        queues.setdefault(entry.queue, []).append(entry)
    return queues


def take(pending: deque[Entry]) -> list[Entry]:
    """Take the next batch off the left of ``pending``: at most 10 entries and 1 MiB, one per FIFO group.

    One per group, because entries of one batch fail singly, and a later message of a group must not overtake.
    """
    batch: list[Entry] = []
    passed: list[Entry] = []
    groups: set[str] = set()
    room = MAX_BYTES
    while pending and len(batch) < MAX_ENTRIES and len(passed) < LOOK_AHEAD:
        entry = pending.popleft()
        if entry.group is not None and entry.group in groups:
            passed.append(entry)
            continue
        size = entry.size
        if batch and size > room:
            pending.appendleft(entry)
            break
        room -= size
        batch.append(entry)
        if entry.group is not None:
            groups.add(entry.group)
    pending.extendleft(reversed(passed))
    return batch


def handle_batches(handles: Iterable[Handle]) -> Iterator[tuple[str, Sequence[Handle]]]:
    """Yield (queue, at most 10 handles), in order; of several receipts of one message only the last."""
    queues: dict[str, dict[str, Handle]] = {}
    for handle in handles:
        queues.setdefault(handle.queue, {})[handle.message_id] = handle
    for queue, messages in queues.items():
        unique = list(messages.values())
        for start in range(0, len(unique), MAX_ENTRIES):
            yield queue, unique[start : start + MAX_ENTRIES]


def visibility(seconds: float) -> int:
    """Return whole seconds for SQS: rounded up, so that only 0 releases, at most 12 hours."""
    return min(int(MAX_VISIBILITY), max(0, math.ceil(seconds)))


def shorter(seconds: int) -> list[int]:
    """Return what to ask for when ``seconds`` would pass 12 hours of one delivery; SQS does not say what is left."""
    return sorted({seconds * 19 // 20, seconds // 2} - {0, seconds}, reverse=True)
