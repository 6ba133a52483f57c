"""Messages as entries of SQS's requests, and entries of its replies as messages and faults. Pure.

Any process that has a connection open; both boto3 and ``http`` use it. A batch has at most 10 entries and 1 MiB in all
(Amazon SQS API Reference, SendMessageBatch).
"""

from __future__ import annotations

import math
from base64 import b64decode
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqspipes_mp.brokers.base import DeadLetter, Handle, Output, Received
from sqspipes_mp.brokers.sqs.faults import Fault, Kind, classify_code
from sqspipes_mp.messages.attributes import Attribute, size_of
from sqspipes_mp.messages.ids import moved_id
from sqspipes_mp.messages.limits import FAILURE_ATTRIBUTE, MAX_BYTES, MAX_VISIBILITY

#: Entries per batch (Amazon SQS API Reference, SendMessageBatch).
MAX_ENTRIES = 10
#: Longest DelaySeconds of one message (Amazon SQS API Reference, SendMessage).
MAX_DELAY = 900
#: Most messages that a batch passes over in search of other groups: packing one long group stays linear.
LOOK_AHEAD = 100

#: Bytes of the failure attribute's name and type.
_ATTRIBUTE_OVERHEAD = len(FAILURE_ATTRIBUTE) + len("String")
_UNANSWERED = Fault(Kind.TRANSIENT, "NoAnswer", "the reply does not mention this entry")


@dataclass(frozen=True, slots=True)
class Entry:
    """A message to send, on its way into a batch."""

    #: Number that the caller knows the message by.
    key: int
    #: Name, URL or ARN.
    queue: str
    body: str
    #: MessageDeduplicationId; None on a standard queue.
    dedup: str | None = None
    #: MessageGroupId; on a standard queue the tenant (Amazon SQS Developer Guide, "Amazon SQS fair queues"), or None.
    group: str | None = None
    #: DelaySeconds.
    delay: int = 0
    #: Text of the failure attribute; None: there is none.
    failure: str | None = None
    attributes: tuple[Attribute, ...] = ()

    @property
    def line(self) -> str | None:
        """The FIFO group, in which entries keep their order; None on a standard queue."""
        return None if self.dedup is None else self.group

    @property
    def size(self) -> int:
        """Size in bytes as SQS counts it: the body, and name, type and value of the attributes."""
        size = utf8_length(self.body) + (_ATTRIBUTE_OVERHEAD + utf8_length(self.failure) if self.failure else 0)
        return size + size_of(self.attributes) if self.attributes else size

    def wire(self, position: int) -> dict[str, Any]:
        """Return the SendMessageBatchRequestEntry, whose Id is its position in the batch."""
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
    """Return the number of bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def is_fifo(queue: str) -> bool:
    """Tell whether a queue's name, URL or ARN is a FIFO queue's."""
    return queue.endswith(".fifo")


def of_output(key: int, output: Output) -> Entry:
    """Return the entry of an output; without its delay on a FIFO queue, which takes none for single messages."""
    if is_fifo(output.queue):
        group = output.group or output.hop
        return Entry(key, output.queue, output.body, output.hop, group, attributes=output.attributes)
    delay = min(MAX_DELAY, math.ceil(output.delay))
    return Entry(key, output.queue, output.body, group=output.group, delay=delay, attributes=output.attributes)


def of_letter(key: int, letter: DeadLetter) -> Entry:
    """Return the entry of a dead letter.

    Its deduplication id is its own: SQS would accept and then drop a copy with the original's.
    """
    if not is_fifo(letter.queue):
        return Entry(
            key, letter.queue, letter.body, group=letter.group, failure=letter.failure, attributes=letter.attributes
        )
    dedup = moved_id(letter.hop, "dead", letter.handle.message_id)
    # A hop id of the engine can be a group; another sender's id may have characters, or a length, that SQS refuses.
    ours = letter.hop.isascii() and letter.hop.isalnum() and len(letter.hop) <= len(dedup)
    group = letter.group or (letter.hop if ours else dedup)
    return Entry(key, letter.queue, letter.body, dedup, group, 0, letter.failure, letter.attributes)


def by_queue(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Return the entries of each queue, in their order."""
    queues: dict[str, list[Entry]] = {}
    for entry in entries:
        queues.setdefault(entry.queue, []).append(entry)
    return queues


def take_batch(pending: deque[Entry]) -> list[Entry]:
    """Remove the next batch from the left of ``pending``: at most 10 entries and 1 MiB, one entry per FIFO group.

    Entries of one batch fail singly: of two of a group, the later one could overtake the earlier one.
    """
    batch: list[Entry] = []
    passed: list[Entry] = []
    groups: set[str] = set()
    room = MAX_BYTES
    while pending and len(batch) < MAX_ENTRIES and len(passed) < LOOK_AHEAD:
        entry = pending.popleft()
        if entry.line is not None and entry.line in groups:
            passed.append(entry)
            continue
        size = entry.size
        if batch and size > room:
            pending.appendleft(entry)
            break
        room -= size
        batch.append(entry)
        if entry.line is not None:
            groups.add(entry.line)
    pending.extendleft(reversed(passed))
    return batch


def waves(entries: Iterable[Entry], at_once: int) -> Iterator[list[list[Entry]]]:
    """Yield runs of at most ``at_once`` batches that may be under way at once: a FIFO group is in one of them only."""
    for queued in by_queue(entries).values():
        pending = deque(queued)
        while pending:
            wave: list[list[Entry]] = []
            groups: set[str] = set()
            while pending and len(wave) < at_once:
                batch = take_batch(pending)
                members = {entry.line for entry in batch if entry.line is not None}
                if not groups.isdisjoint(members):
                    pending.extendleft(reversed(batch))
                    break
                groups |= members
                wave.append(batch)
            yield wave


def handle_batches(handles: Iterable[Handle]) -> Iterator[tuple[str, Sequence[Handle]]]:
    """Yield (queue, at most 10 handles), in order; of several handles of one message only the last."""
    queues: dict[str, dict[str, Handle]] = {}
    for handle in handles:
        queues.setdefault(handle.queue, {})[handle.message_id] = handle
    for queue, messages in queues.items():
        unique = list(messages.values())
        for start in range(0, len(unique), MAX_ENTRIES):
            yield queue, unique[start : start + MAX_ENTRIES]


def visibility(seconds: float) -> int:
    """Return a visibility timeout in whole seconds: rounded up, so that only 0 releases, and at most 12 hours."""
    return min(int(MAX_VISIBILITY), max(0, math.ceil(seconds)))


def shorter(seconds: int) -> list[int]:
    """Return the visibility timeouts to try, longest first, when ``seconds`` would pass the 12 hours of one delivery.

    SQS does not say how much of the 12 hours is left.
    """
    return sorted({seconds * 19 // 20, seconds // 2} - {0, seconds}, reverse=True)


def all_received(queue: str, reply: Mapping[str, Any]) -> list[Received]:
    """Return the deliveries of a ReceiveMessage reply; of several deliveries of one message only the last.

    Raises an exception of reading where it is no such reply.
    """
    deliveries = (received(queue, message) for message in reply.get("Messages") or ())
    return list({delivery.handle.message_id: delivery for delivery in deliveries}.values())


def received(queue: str, message: Mapping[str, Any]) -> Received:
    """Return the delivery of one message of a ReceiveMessage reply."""
    attributes = message.get("Attributes") or {}
    told = message.get("MessageAttributes") or {}
    receipt, ident, body = message["ReceiptHandle"], message["MessageId"], message["Body"]
    if not (type(receipt) is str and type(ident) is str and type(body) is str):
        raise TypeError("receipt, id and body must be texts")
    return Received(
        handle=Handle(queue, receipt, ident),
        body=body,
        # An emulator may not count. A 1 would say "first delivery", and hide every earlier attempt.
        receives=int(attributes.get("ApproximateReceiveCount", 0)),
        charges=0,
        group=_text(attributes.get("MessageGroupId")),
        sent_at=int(attributes.get("SentTimestamp", 0)) / 1000,
        failure=_text(told.get(FAILURE_ATTRIBUTE, {}).get("StringValue")),
        attributes=_attributes(told) if told else (),
    )


def _attributes(told: Mapping[str, Mapping[str, Any]]) -> tuple[Attribute, ...]:
    """Return the sender's attributes: all but the failure."""
    return tuple(
        Attribute(name, value.get("DataType", "String"), _value(value))
        for name, value in told.items()
        if name != FAILURE_ATTRIBUTE
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _value(told: Mapping[str, Any]) -> str | bytes:
    binary = told.get("BinaryValue")
    if binary is None:
        return str(told.get("StringValue", ""))
    # ``http`` gives the wire's Base64, boto3 the decoded bytes.
    return b64decode(binary) if isinstance(binary, str) else bytes(binary)


def faults_of(entries: Sequence[Mapping[str, Any]], reply: Mapping[str, Any]) -> dict[int, Fault]:
    """Return the faults of a batch by position; an entry that the reply does not mention has a transient one.

    Ids that were not asked about are passed over. Raises an exception of reading where it is no such reply.
    """
    faults = dict.fromkeys(range(len(entries)), _UNANSWERED)
    position = {entry["Id"]: i for i, entry in enumerate(entries)}
    for success in reply.get("Successful") or ():
        faults.pop(position.get(success["Id"], -1), None)
    for failed in reply.get("Failed") or ():
        code, message = str(failed.get("Code", "Unknown")), str(failed.get("Message", ""))
        kind = classify_code(code, message, sender_fault=bool(failed.get("SenderFault", False)))
        if (place := position.get(failed["Id"])) is not None:
            faults[place] = Fault(kind, code, message)
    return faults
