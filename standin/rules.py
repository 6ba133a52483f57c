"""SQS's limits (Amazon SQS API Reference: SendMessage, SendMessageBatch, CreateQueue). Pure."""

import json
import re
from base64 import b64decode
from collections.abc import Mapping, Sequence
from typing import Any

from standin.errors import SqsError, invalid, missing

MAX_BYTES = 1_048_576
MAX_ENTRIES = 10

_BAD = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ALLOWED = "#x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF"
_ENTRY_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
_TOKEN = re.compile(r"[!-~]{1,128}")
_ATTRIBUTE_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_TYPE = re.compile(r"(String|Number|Binary)(\..+)?")
_QUEUE_NAME = re.compile(r"[A-Za-z0-9_-]+")

_NO_ATTRIBUTES: dict[str, dict[str, str]] = {}

#: Queue attributes that are numbers: lowest, highest, default.
NUMBERS = {
    "DelaySeconds": (0, 900, 0),
    "MaximumMessageSize": (1024, MAX_BYTES, MAX_BYTES),
    "MessageRetentionPeriod": (60, 1_209_600, 345_600),
    "ReceiveMessageWaitTimeSeconds": (0, 20, 0),
    "VisibilityTimeout": (0, 43_200, 30),
    "KmsDataKeyReusePeriodSeconds": (60, 86_400, None),
}
_TEXTS = ("Policy", "RedrivePolicy", "RedriveAllowPolicy", "KmsMasterKeyId")
_CHOICES = {"SqsManagedSseEnabled": ("true", "false")}
_FIFO_CHOICES = {
    "FifoQueue": ("true", "false"),
    "ContentBasedDeduplication": ("true", "false"),
    "DeduplicationScope": ("messageGroup", "queue"),
    "FifoThroughputLimit": ("perMessageGroupId", "perQueue"),
}


def check_entries(entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a batch as a whole for its number of entries or their ids."""
    if not entries:
        raise SqsError("EmptyBatchRequest", "There should be at least one entry in the request.")
    if len(entries) > MAX_ENTRIES:
        text = f"Maximum number of entries per request are {MAX_ENTRIES}. You have sent {len(entries)}."
        raise SqsError("TooManyEntriesInBatchRequest", text)
    seen = set()
    for entry in entries:
        name = entry.get("Id")
        if not isinstance(name, str) or not _ENTRY_ID.fullmatch(name):
            text = "A batch entry id can only contain alphanumeric characters, hyphens and underscores. "
            raise SqsError("InvalidBatchEntryId", text + "It can be at most 80 letters long.")
        if name in seen:
            raise SqsError("BatchEntryIdsNotDistinct", f"Id {name} repeated.")
        seen.add(name)


def size_of(entry: Mapping[str, Any]) -> int:
    """Return a message's size in bytes: body, and names, types and values of its attributes."""
    body = entry["MessageBody"]
    size = len(body) if body.isascii() else len(body.encode("utf-8", "surrogatepass"))
    for name, value in (entry.get("MessageAttributes") or _NO_ATTRIBUTES).items():
        size += len(name.encode()) + len(value.get("DataType", "").encode())
        size += len(value.get("StringValue", "").encode("utf-8", "surrogatepass"))
        size += len(value.get("BinaryValue", "")) * 3 // 4 - value.get("BinaryValue", "")[-2:].count("=")
    return size


def check_total(sizes: Sequence[int]) -> None:
    """Refuse a batch as a whole for its size."""
    if sum(sizes) > MAX_BYTES:
        text = f"Batch requests cannot be longer than {MAX_BYTES} bytes. You have sent {sum(sizes)} bytes."
        raise SqsError("BatchRequestTooLong", text)


def check_present(entry: Mapping[str, Any], *, fifo: bool, content_based: bool) -> None:
    """Refuse a send for a missing parameter; of a batch, all entries."""
    if not entry.get("MessageBody"):
        raise missing("MessageBody")
    if fifo and not entry.get("MessageGroupId"):
        raise missing("MessageGroupId")
    if fifo and not content_based and not entry.get("MessageDeduplicationId"):
        text = "The queue should either have ContentBasedDeduplication enabled or MessageDeduplicationId provided "
        raise SqsError("InvalidParameterValueException", text + "explicitly")


def check_message(entry: Mapping[str, Any], size: int, *, fifo: bool, longest: int) -> None:
    """Refuse one message for its size, characters, ids, delay or attributes; ``longest``: bytes."""
    if size > longest:
        text = f"One or more parameters are invalid. Reason: Message must be shorter than {longest} bytes."
        raise SqsError("InvalidParameterValueException", text)
    body = entry["MessageBody"]
    # Most bodies are printable ASCII, which is faster to check.
    bad = None if body.isascii() and body.isprintable() else _BAD.search(body)
    if bad:
        text = f"Invalid binary character '#x{ord(bad[0]):X}' was found in the message body, the set of allowed "
        raise SqsError("InvalidMessageContents", f"{text}characters is {_ALLOWED}")
    group = entry.get("MessageGroupId")
    if group is not None:
        check_token("MessageGroupId", group)
    dedup = entry.get("MessageDeduplicationId")
    if dedup is not None:
        check_token("MessageDeduplicationId", dedup)
        if not fifo:
            raise _of_another_type("MessageDeduplicationId", dedup)
    delay = entry.get("DelaySeconds")
    if delay is not None:
        check_number("DelaySeconds", delay, 0, 900, "DelaySeconds must be >= 0 and <= 900.")
        if fifo and delay:
            raise _of_another_type("DelaySeconds", delay)
    if entry.get("MessageAttributes"):
        _check_attributes(entry["MessageAttributes"])
    for name, value in (entry.get("MessageSystemAttributes") or _NO_ATTRIBUTES).items():
        if name != "AWSTraceHeader" or value.get("DataType") != "String" or not value.get("StringValue"):
            raise invalid("MessageSystemAttributes", name, "Only AWSTraceHeader, a String, is supported.")


def check_token(parameter: str, value: str) -> None:
    """Refuse a value that is no id of a group, a message or a receive."""
    if not _TOKEN.fullmatch(value):
        reason = f"{parameter} can only include alphanumeric and punctuation characters. 1 to 128 in length."
        raise invalid(parameter, value, reason)


def check_number(parameter: str, value: object, lowest: int, highest: int, reason: str = "") -> int:
    """Return a number; refuse a value out of range."""
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise invalid(parameter, value, reason or f"Must be between {lowest} and {highest}, if provided.")
    return value


def check_receive(attempt: object, *, fifo: bool) -> None:
    """Refuse a wrong ReceiveRequestAttemptId, and any on a standard queue."""
    if attempt is not None:
        check_token("ReceiveRequestAttemptId", str(attempt))
        if not fifo:
            raise _of_another_type("ReceiveRequestAttemptId", attempt)


def check_name(name: object, *, fifo: bool) -> None:
    """Refuse a queue name."""
    stem = name.removesuffix(".fifo") if fifo and isinstance(name, str) else name
    bad = not isinstance(name, str) or not isinstance(stem, str) or not _QUEUE_NAME.fullmatch(stem) or len(name) > 80
    if bad or (fifo and stem == name):
        text = "Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length"
        raise SqsError("InvalidParameterValueException", text + (", and must end with .fifo" if fifo else ""))


def check_queue_attributes(attributes: Mapping[str, str], *, fifo: bool) -> None:
    """Refuse names and values of queue attributes."""
    for name, value in attributes.items():
        choices = _CHOICES.get(name) or _FIFO_CHOICES.get(name)
        if name in NUMBERS:
            lowest, highest, _ = NUMBERS[name]
            good = isinstance(value, str) and value.isdecimal() and lowest <= int(value) <= highest
        elif name in _TEXTS:
            good = isinstance(value, str)
        elif choices is None or (name in _FIFO_CHOICES and not fifo):
            raise SqsError("InvalidAttributeName", f"Unknown Attribute {name}.")
        else:
            good = value in choices
        if not good:
            raise SqsError("InvalidAttributeValue", f"Invalid value for the parameter {name}.")
    merged = {"DeduplicationScope": "queue", **attributes}
    if merged.get("FifoThroughputLimit") == "perMessageGroupId" and merged["DeduplicationScope"] != "messageGroup":
        raise SqsError("InvalidAttributeValue", "perMessageGroupId needs the DeduplicationScope messageGroup.")


def redrive(policy: str) -> tuple[str, int]:
    """Return the target's ARN and the maxReceiveCount of a RedrivePolicy."""
    try:
        read = json.loads(policy)
        arn, most = str(read["deadLetterTargetArn"]), int(read.get("maxReceiveCount", 10))
    except (ValueError, KeyError, TypeError):
        raise invalid("RedrivePolicy", policy, "Redrive policy is not a valid JSON map.") from None
    if not 1 <= most <= 1000:
        raise invalid("RedrivePolicy", policy, "Invalid value for maxReceiveCount: must be between 1 and 1000.")
    return arn, most


def _check_attributes(attributes: Mapping[str, Mapping[str, str]]) -> None:
    if len(attributes) > 10:
        text = f"Number of message attributes [{len(attributes)}] exceeds the allowed maximum [10]."
        raise SqsError("InvalidParameterValueException", text)
    for name, value in attributes.items():
        reserved = name.lower().startswith(("aws.", "amazon."))
        if len(name) > 256 or reserved or not _ATTRIBUTE_NAME.fullmatch(name):
            raise SqsError("InvalidParameterValueException", f"Message (user) attribute name '{name}' is invalid.")
        kind = value.get("DataType", "")
        if len(kind) > 256 or not _TYPE.fullmatch(kind):
            text = f"The message attribute '{name}' has an invalid message attribute type."
            raise SqsError("InvalidParameterValueException", text)
        content = value.get("BinaryValue" if kind.startswith("Binary") else "StringValue", "")
        if not content:
            text = f"Message (user) attribute '{name}' must contain a non-empty value of type '{kind}'."
            raise SqsError("InvalidParameterValueException", text)
        if not _valid(kind, content):
            raise SqsError("InvalidParameterValueException", f"Message (user) attribute '{name}' is no valid {kind}.")


def _valid(kind: str, content: str) -> bool:
    try:
        if kind.startswith("Binary"):
            b64decode(content, validate=True)
        elif kind.startswith("Number"):
            float(content)
    except ValueError:
        return False
    return not _BAD.search(content)


def _of_another_type(parameter: str, value: object) -> SqsError:
    return invalid(parameter, value, "The request include parameter that is not valid for this queue type.")
