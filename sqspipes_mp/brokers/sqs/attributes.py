"""What queues are called and made of at SQS (any process that has a connection open). Pure.

Names and values: Amazon SQS API Reference, CreateQueue and GetQueueAttributes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from sqspipes_mp.brokers.base import QueueSpec
from sqspipes_mp.brokers.sqs.batches import visibility
from sqspipes_mp.messages.limits import MAX_BYTES

#: Receives after which SQS itself dead-letters, whatever the engine does: its longest (RedrivePolicy).
MAX_RECEIVES = 1000
#: Longest long poll, in seconds (ReceiveMessage, WaitTimeSeconds).
MAX_WAIT = 20

_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Address:
    """Where a queue is: ``url`` when it is known, else ``name`` and, for a queue of others, ``account``."""

    name: str
    account: str | None = None
    region: str | None = None
    url: str | None = None


def address(queue: str) -> Address:
    """Read a queue's name, URL or ARN."""
    if queue.startswith(("https://", "http://")):
        parts = urlsplit(queue)
        labels = (parts.hostname or "").split(".")
        region = labels[1] if len(labels) >= 4 and labels[0] == "sqs" and "amazonaws" in labels else None
        return Address(parts.path.rpartition("/")[2], region=region, url=queue)
    if queue.startswith("arn:") and queue.count(":") == 5:
        _, _, _, region, account, name = queue.split(":")
        return Address(name, account=account or None, region=region or None)
    return Address(queue)


def wanted(spec: QueueSpec, *, retention: int, kms_key: str | None, dead_arn: str | None) -> dict[str, str]:
    """Return the attributes to create a queue with."""
    attributes = {
        "VisibilityTimeout": str(visibility(spec.visibility)),
        "MessageRetentionPeriod": str(retention),
        "ReceiveMessageWaitTimeSeconds": str(MAX_WAIT),
    }
    if dead_arn is not None:
        attributes["RedrivePolicy"] = json.dumps(
            {"deadLetterTargetArn": dead_arn, "maxReceiveCount": MAX_RECEIVES}, separators=(",", ":")
        )
    if spec.fifo:
        attributes["FifoQueue"] = "true"
        attributes["DeduplicationScope"] = "messageGroup"
        attributes["FifoThroughputLimit"] = "perMessageGroupId"
    if kms_key is not None:
        attributes["KmsMasterKeyId"] = kms_key
    return attributes


def differences(want: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Say, one text each, what an existing queue has otherwise than we would have made it."""
    texts = []
    for name, value in want.items():
        actual = found.get(name)
        if name == "RedrivePolicy":
            texts += _redrive(value, actual)
        elif name == "MessageRetentionPeriod":
            if actual is not None and int(actual) < int(value):
                texts.append(f"keeps messages {int(actual) / _DAY:.3g} days, not {int(value) / _DAY:.3g}")
        elif actual != value:
            texts.append(f"{name} is {actual}, not {value}")
    size = found.get("MaximumMessageSize")
    if size is not None and int(size) < MAX_BYTES:
        texts.append(f"MaximumMessageSize is {size} bytes, not {MAX_BYTES}: larger messages are refused")
    return texts


def _redrive(want: str, found: str | None) -> list[str]:
    if not found:
        return ["has no RedrivePolicy (backstop of the dead-letter queue)"]
    ours, theirs = json.loads(want), json.loads(found)
    texts = []
    if theirs.get("deadLetterTargetArn") != ours["deadLetterTargetArn"]:
        texts.append(f"redrives to {theirs.get('deadLetterTargetArn')}, not {ours['deadLetterTargetArn']}")
    count = int(theirs.get("maxReceiveCount", 0))
    if count < ours["maxReceiveCount"]:
        texts.append(f"maxReceiveCount is {count}, not {ours['maxReceiveCount']}: SQS itself may dead-letter earlier")
    return texts
