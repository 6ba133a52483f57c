"""SQS replies as our messages and faults, entry by entry; both boto3 and ``http`` use it. Pure."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from typing import Any

from sqspipes_mp.brokers.base import Handle, Received
from sqspipes_mp.brokers.sqs.faults import Fault, Kind, judge
from sqspipes_mp.messages.attributes import Attribute
from sqspipes_mp.messages.limits import FAILURE_ATTRIBUTE

_UNANSWERED = Fault(Kind.TRANSIENT, "NoAnswer", "the reply does not mention this entry")


def received(queue: str, message: Mapping[str, Any]) -> Received:
    """Return one message of a ReceiveMessage reply."""
    attributes = message.get("Attributes", {})
    told = message.get("MessageAttributes", {})
    return Received(
        handle=Handle(queue, message["ReceiptHandle"], message["MessageId"]),
        body=message["Body"],
        # Some emulators do not count; taking that for a first delivery would forget every attempt there was.
        receives=int(attributes.get("ApproximateReceiveCount", 0)),
        charges=0,
        group=attributes.get("MessageGroupId"),
        sent_at=int(attributes.get("SentTimestamp", 0)) / 1000,
        failure=told.get(FAILURE_ATTRIBUTE, {}).get("StringValue"),
        attributes=_attributes(told) if told else (),
    )


def _attributes(told: Mapping[str, Mapping[str, Any]]) -> tuple[Attribute, ...]:
    """Return those of the sender."""
    return tuple(
        Attribute(name, value.get("DataType", "String"), _value(value))
        for name, value in told.items()
        if name != FAILURE_ATTRIBUTE
    )


def _value(told: Mapping[str, Any]) -> str | bytes:
    binary = told.get("BinaryValue")
    if binary is None:
        return str(told.get("StringValue", ""))
    # Off the wire it is Base64, which boto3 has decoded.
    return b64decode(binary) if isinstance(binary, str) else bytes(binary)


def faults_of(entries: Sequence[Mapping[str, Any]], reply: Mapping[str, Any]) -> dict[int, Fault]:
    """Return which entries of a batch failed, by position; one that the reply does not mention failed for now."""
    faults = dict.fromkeys(range(len(entries)), _UNANSWERED)
    position = {entry["Id"]: i for i, entry in enumerate(entries)}
    for success in reply.get("Successful", ()):
        del faults[position[success["Id"]]]
    for failed in reply.get("Failed", ()):
        code, message = str(failed.get("Code", "Unknown")), str(failed.get("Message", ""))
        kind = judge(code, message, sender_fault=bool(failed.get("SenderFault", False)))
        faults[position[failed["Id"]]] = Fault(kind, code, message)
    return faults
