"""One message, and its form on the wire."""

import hashlib
import json
import json.encoder
import struct
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

quoted = json.encoder.encode_basestring_ascii


class State(IntEnum):
    """State of a message."""

    DELAYED = 0
    VISIBLE = 1
    IN_FLIGHT = 2
    GONE = 3


@dataclass(slots=True, eq=False)
class Message:
    """A message and its history. Times ``..._ms`` are milliseconds since the epoch, others the clock's seconds."""

    id: str
    body: str
    md5: str
    #: Number of the send in its queue.
    number: int
    sent_ms: int
    attributes: Mapping[str, Mapping[str, str]] | None = None
    trace: str | None = None
    group: str | None = None
    dedup: str | None = None
    state: State = State.VISIBLE
    #: End of its delay or visibility timeout; 0 while it is visible.
    hidden_until: float = 0.0
    #: Whether a standard shelf has it in its row.
    listed: bool = False
    #: Deliveries in all.
    receives: int = 0
    #: Deliveries in this queue, which the redrive policy counts.
    receives_here: int = 0
    #: Changes of visibility in this delivery.
    changes: int = 0
    received_at: float = 0.0
    first_received_ms: int = 0
    #: ARN of the queue that redrove it.
    source_arn: str | None = None
    #: Number of its redrives.
    redriven: int = 0
    #: Number of its deletes.
    deletes: int = 0
    purged: bool = False
    #: The next delete is without effect: the message comes once more.
    revives: bool = False
    _fragment: str = ""

    def fragment(self) -> str:
        """Return the part of the wire form that all deliveries share."""
        if not self._fragment:
            self._fragment = f'{{"MessageId":"{self.id}","MD5OfBody":"{self.md5}","Body":{quoted(self.body)}'
        return self._fragment

    def forget(self) -> None:
        """Free the memory of body and attributes."""
        self.body = self._fragment = ""
        self.attributes = None

    def record(self) -> dict[str, Any]:
        """Return the message's record in the ledger."""
        return {
            "id": self.id,
            "body": self.body,
            "digest": self.md5,
            "group": self.group,
            "dedup": self.dedup,
            "sent_ms": self.sent_ms,
            "received": self.receives,
            "deleted": self.deletes,
            "redriven": self.redriven,
            "purged": self.purged,
            "state": self.state.name.lower(),
        }


def md5(text: str) -> str:
    """Return a text's MD5 digest in SQS's form."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def attributes_md5(attributes: Mapping[str, Mapping[str, str]]) -> str:
    """Return SQS's digest of attributes.

    Developer Guide, "Calculating the MD5 message digest for message attributes".
    """
    digest = hashlib.md5(usedforsecurity=False)
    for name, value in sorted(attributes.items()):
        binary = "BinaryValue" in value
        data = b64decode(value["BinaryValue"]) if binary else value["StringValue"].encode()
        for part in (name.encode(), value["DataType"].encode()):
            digest.update(struct.pack(">I", len(part)) + part)
        digest.update((b"\2" if binary else b"\1") + struct.pack(">I", len(data)) + data)
    return digest.hexdigest()


def rendered(message: Message, receipt: str, system: frozenset[str], wanted: Sequence[str]) -> str:
    """Return a message in the form of a ReceiveMessage reply.

    ``system``, ``wanted``: names of the system and message attributes that the request asks for.
    """
    text = f'{message.fragment()},"ReceiptHandle":"{receipt}"'
    if system:
        text += f',"Attributes":{{{_system(message, system)}}}'
    if wanted and message.attributes:
        chosen = {name: value for name, value in message.attributes.items() if _asked_for(name, wanted)}
        if chosen:
            text += f',"MD5OfMessageAttributes":"{attributes_md5(chosen)}","MessageAttributes":{json.dumps(chosen)}'
    return text + "}"


def _system(message: Message, names: frozenset[str]) -> str:
    every = "All" in names
    parts = []
    if every or "ApproximateReceiveCount" in names:
        parts.append(f'"ApproximateReceiveCount":"{message.receives}"')
    if every or "SentTimestamp" in names:
        parts.append(f'"SentTimestamp":"{message.sent_ms}"')
    if message.group is not None and (every or "MessageGroupId" in names):
        parts.append(f'"MessageGroupId":{quoted(message.group)}')
    if every or "ApproximateFirstReceiveTimestamp" in names:
        parts.append(f'"ApproximateFirstReceiveTimestamp":"{message.first_received_ms}"')
    if every or "SenderId" in names:
        parts.append('"SenderId":"AIDASTANDINSTANDINST"')
    if message.dedup is not None and (every or "MessageDeduplicationId" in names):
        parts.append(f'"MessageDeduplicationId":{quoted(message.dedup)}')
    if message.dedup is not None and (every or "SequenceNumber" in names):
        parts.append(f'"SequenceNumber":"{sequence(message)}"')
    if message.trace is not None and (every or "AWSTraceHeader" in names):
        parts.append(f'"AWSTraceHeader":{quoted(message.trace)}')
    if message.source_arn is not None and (every or "DeadLetterQueueSourceArn" in names):
        parts.append(f'"DeadLetterQueueSourceArn":{quoted(message.source_arn)}')
    return ",".join(parts)


def sequence(message: Message) -> str:
    """Return a FIFO message's sequence number: 20 digits."""
    return f"{18_849_496_460_467_696_128 + message.number:020d}"


def _asked_for(name: str, wanted: Sequence[str]) -> bool:
    return any(
        each in ("All", ".*") or each == name or (each.endswith(".*") and name.startswith(each[:-2])) for each in wanted
    )
