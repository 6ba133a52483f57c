"""Queues at SQS: find, create, compare, count, purge and delete them (keeper and caller, mostly).

Names and values of attributes: Amazon SQS API Reference, CreateQueue and GetQueueAttributes.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqspipes_mp.brokers.base import Depth, QueueSpec, Unwanted
from sqspipes_mp.brokers.sqs.calls import Calls
from sqspipes_mp.brokers.sqs.entries import visibility
from sqspipes_mp.brokers.sqs.faults import Fault, Kind
from sqspipes_mp.errors import BrokerError, QueueMissing
from sqspipes_mp.messages.limits import MAX_BYTES
from sqspipes_mp.messages.plain import one_line

log = logging.getLogger("sqspipes_mp.brokers.sqs")

#: Receives after which SQS itself moves a message to the dead-letter queue: its highest maxReceiveCount (Amazon SQS API
#: Reference, SetQueueAttributes, RedrivePolicy).
MAX_RECEIVES = 1000
#: Receives below which a queue's redrive may take messages that were never begun: each drain or death may cost one.
FEW_RECEIVES = 10
#: Longest long poll, seconds (Amazon SQS API Reference, ReceiveMessage, WaitTimeSeconds).
MAX_WAIT = 20
#: Most queues that ``ensure`` asks about at once.
ENSURE_THREADS = 8
#: Seconds until a new queue may be used (Amazon SQS API Reference, CreateQueue).
NEW_QUEUE_WAIT = 1.0

_DAY = 86_400

#: The attributes that count a queue's messages.
COUNTS = (
    "ApproximateNumberOfMessages",
    "ApproximateNumberOfMessagesNotVisible",
    "ApproximateNumberOfMessagesDelayed",
)


@dataclass(frozen=True, slots=True)
class Making:
    """Attributes of new queues that their specs do not have."""

    #: MessageRetentionPeriod, seconds.
    retention: int
    #: Id, ARN or alias of a KMS key; None: SQS's own encryption.
    kms_key: str | None
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a queue's name, URL or ARN."""

    name: str
    #: Account id of a queue of others, as an ARN has it.
    account: str | None = None
    #: Region, where URL or ARN have it.
    region: str | None = None
    #: None: to be asked for.
    url: str | None = None


def parse_address(queue: str) -> Address:
    """Return the parts of a queue's name, URL or ARN."""
    if queue.startswith(("https://", "http://")):
        parts = urlsplit(queue)
        labels = (parts.hostname or "").split(".")
        region = labels[1] if len(labels) >= 4 and labels[0] == "sqs" and "amazonaws" in labels else None
        return Address(parts.path.rpartition("/")[2], region=region, url=queue)
    if queue.startswith("arn:") and queue.count(":") == 5:
        _, _, _, region, account, name = queue.split(":")
        return Address(name, account=account or None, region=region or None)
    return Address(queue)


def wanted_attributes(spec: QueueSpec, *, retention: int, kms_key: str | None, dead_arn: str | None) -> dict[str, str]:
    """Return the attributes that a queue is created with.

    ``retention``: seconds; ``kms_key``: see ``Making``; ``dead_arn``: of its dead-letter queue, if it has one.
    """
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
    """Return one text for each attribute of an existing queue that differs from the wanted one."""
    texts = []
    for name, value in want.items():
        actual = found.get(name)
        if name == "RedrivePolicy":
            texts += _redrive_differences(value, actual)
        elif name == "MessageRetentionPeriod":
            if actual is not None and whole_number(actual) < int(value):
                texts.append(f"keeps messages {whole_number(actual) / _DAY:.3g} days, not {int(value) / _DAY:.3g}")
        elif actual != value:
            texts.append(f"{name} is {actual}, not {value}")
    size = found.get("MaximumMessageSize")
    if size is not None and whole_number(size) < MAX_BYTES:
        texts.append(f"MaximumMessageSize is {size} bytes, not {MAX_BYTES}: larger messages are refused")
    return texts


def redrive_of(policy: str | None) -> dict[str, Any]:
    """Return a RedrivePolicy's fields; none where it cannot be read."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(policy or "{}")
        if isinstance(found, dict):
            return found
    return {}


def whole_number(value: object) -> int:
    """Return a number as SQS tells it; 0 where it is none."""
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 20 else 0


def _redrive_differences(want: str, found: str | None) -> list[str]:
    if not found:
        return ["has no RedrivePolicy (backstop of the dead-letter queue)"]
    ours, theirs = json.loads(want), redrive_of(found)
    texts = []
    if theirs.get("deadLetterTargetArn") != ours["deadLetterTargetArn"]:
        texts.append(f"redrives to {theirs.get('deadLetterTargetArn')}, not {ours['deadLetterTargetArn']}")
    count = whole_number(theirs.get("maxReceiveCount"))
    if count < ours["maxReceiveCount"]:
        texts.append(f"maxReceiveCount is {count}, not {ours['maxReceiveCount']}: SQS itself may dead-letter earlier")
    return texts


class Queues:
    """Queues by name, URL or ARN; SQS is asked once for the URL of each."""

    def __init__(self, calls: Calls, making: Making) -> None:
        self._calls = calls
        self._making = making
        self._urls: dict[str, str] = {}
        self._arns: dict[str, str] = {}

    def url(self, queue: str, wanted: Callable[[], bool] | None = None) -> str:
        """Return a queue's URL. Raises ``QueueMissing`` and other ``BrokerError``; ``wanted``: see ``feed``."""
        found = self.find(queue, worthwhile=wanted)
        if isinstance(found, Fault):
            if wanted is not None and found.kind is Kind.TRANSIENT:
                raise Unwanted
            raise self._calls.error(found, "GetQueueUrl", queue)
        return found

    def find(self, queue: str, *, boot: bool = False, worthwhile: Callable[[], bool] | None = None) -> str | Fault:
        """Return a queue's URL, or the fault of the call that asked for it.

        Raises ``BrokerError`` for a queue of another region.
        """
        url = self._urls.get(queue)
        return url if url is not None else self._look_up(queue, boot=boot, worthwhile=worthwhile)

    def ensure(self, specs: Sequence[QueueSpec], *, create: bool) -> None:
        """Create missing queues (``create``) or raise ``QueueMissing``; warn of attributes that differ.

        Dead-letter queues come first: the others' attributes name them.
        """
        redriving = [spec for spec in specs if spec.dead is not None]
        plain = [spec for spec in specs if spec.dead is None]
        for level in (plain, redriving):
            made = self._side_by_side(lambda spec: self._ensure(spec, create=create), level)
            if any(made) and not self._calls.clients.loopback:
                self._calls.pause(NEW_QUEUE_WAIT)

    def depth(self, queue: str) -> Depth:
        """Return the approximate numbers of a queue's messages. Raises ``QueueMissing``."""
        params = {"QueueUrl": self.url(queue), "AttributeNames": list(COUNTS)}
        return self._calls("GetQueueAttributes", queue, params, _depth)

    def purge(self, queues: Iterable[str]) -> None:
        """Tell SQS to empty queues; missing ones are fine.

        SQS takes one purge of a queue a minute: the call tries until SQS takes it.
        """
        for queue in queues:
            try:
                self._calls("PurgeQueue", queue, {"QueueUrl": self.url(queue)})
            except QueueMissing:
                log.debug("queue %s was not there to purge", queue)

    def delete(self, queues: Iterable[str]) -> None:
        """Delete queues; missing ones are fine."""
        for queue in queues:
            try:
                self._calls("DeleteQueue", queue, {"QueueUrl": self.url(queue)})
            except QueueMissing:
                log.debug("queue %s was not there to delete", queue)
            self._urls.pop(queue, None)
            self._arns.pop(queue, None)

    def _look_up(self, queue: str, *, boot: bool, worthwhile: Callable[[], bool] | None) -> str | Fault:
        """Ask for a queue's URL; return it or the fault."""
        where = parse_address(queue)
        region = self._calls.clients.region
        if where.region is not None and where.region != region:
            raise BrokerError(
                f"queue {queue!r} is in region {where.region}, but this connection is to {region}: an SQS client "
                f"reaches the queues of its own region only. Use SQS({where.region!r}), or a queue in {region}"
            )
        url = where.url
        if url is None:
            params = {"QueueName": where.name}
            if where.account is not None:
                params["QueueOwnerAWSAccountId"] = where.account
            result = self._calls.attempt("GetQueueUrl", queue, params, _url, boot=boot, worthwhile=worthwhile)
            if isinstance(result, Fault):
                return result
            url = result
        self._urls[queue] = url
        return url

    def _side_by_side(self, ensure: Callable[[QueueSpec], bool], specs: Sequence[QueueSpec]) -> list[bool]:
        """Ensure queues in threads; return for each whether it was created."""
        if len(specs) <= 1:
            return [ensure(spec) for spec in specs]
        pool = ThreadPoolExecutor(min(ENSURE_THREADS, len(specs)), "sqspipes-ensure")
        try:
            return [future.result() for future in [pool.submit(ensure, spec) for spec in specs]]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ensure(self, spec: QueueSpec, *, create: bool) -> bool:
        """Create or check one queue; tell whether it was created."""
        try:
            found = self.attributes(spec.name)
        except QueueMissing:
            self._urls.pop(spec.name, None)
            if not spec.owned:
                raise QueueMissing(
                    spec.name, "It is a queue of others, so it is not created here: check name, region and account"
                ) from None
            if not create:
                raise QueueMissing(spec.name, "create_queues=False: create it, or let the engine do so") from None
            return self._create(spec)
        if spec.owned:
            self._compare(spec, found)
        elif spec.ahead:
            _warn_of_redrive(spec.name, found)
        return False

    def _create(self, spec: QueueSpec) -> bool:
        """Create a queue; tell whether it was created here, and not by somebody else at the same time."""
        params: dict[str, object] = {"QueueName": spec.name, "Attributes": self._complete(spec)}
        if self._making.tags:
            params["tags"] = dict(self._making.tags)
        result = self._calls.attempt("CreateQueue", spec.name, params, _url, boot=True)
        if not isinstance(result, Fault):
            self._urls[spec.name] = result
            return True
        if result.kind is not Kind.EXISTS:
            raise self._calls.error(result, "CreateQueue", spec.name)
        # Somebody else has created the queue since, with other attributes.
        self._compare(spec, self.attributes(spec.name))
        return False

    def wanted(self, spec: QueueSpec) -> dict[str, str]:
        """Return the attributes that a queue is created with, without its redrive while its target is not known."""
        dead_arn = None if spec.dead is None else self._arns.get(spec.dead)
        return wanted_attributes(
            spec, retention=self._making.retention, kms_key=self._making.kms_key, dead_arn=dead_arn
        )

    def _complete(self, spec: QueueSpec) -> dict[str, str]:
        """Return all attributes that a queue is created with; its dead-letter queue must be there."""
        if spec.dead is not None:
            self._arn(spec.dead)
        return self.wanted(spec)

    def _compare(self, spec: QueueSpec, found: Mapping[str, str]) -> None:
        """Log a warning of the attributes in which an existing queue differs."""
        texts = differences(self._complete(spec), found)
        if texts:
            log.warning("queue %s exists and is used as it is: %s%s", spec.name, "; ".join(texts), _suspicion(spec))

    def attributes(self, queue: str) -> dict[str, str]:
        """Return a queue's attributes. Raises ``QueueMissing``."""
        url = self.find(queue, boot=True)
        if isinstance(url, Fault):
            raise self._calls.error(url, "GetQueueUrl", queue)
        params = {"QueueUrl": url, "AttributeNames": ["All"]}
        found = self._calls("GetQueueAttributes", queue, params, _attributes, boot=True)
        if "QueueArn" in found:
            self._arns[queue] = found["QueueArn"]
        return found

    def _arn(self, queue: str) -> str:
        """Return a dead-letter queue's ARN; waits some seconds for a queue that was just created to be known."""
        failures = 0
        while queue not in self._arns:
            try:
                self.attributes(queue)
            except QueueMissing:
                failures += 1
                if failures > 5:
                    raise
                self._calls.pause(NEW_QUEUE_WAIT)
        return self._arns[queue]


# Readers of replies: each raises an exception of reading where the reply is no such one.


def _url(reply: Mapping[str, Any]) -> str:
    return str.strip(reply["QueueUrl"])


def _depth(reply: Mapping[str, Any]) -> Depth:
    counts = reply.get("Attributes") or {}
    visible, in_flight, delayed = (int(counts.get(name, 0)) for name in COUNTS)
    return Depth(visible, in_flight, delayed)


def _attributes(reply: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in (reply.get("Attributes") or {}).items()}


def _warn_of_redrive(queue: str, found: Mapping[str, str]) -> None:
    """Log a warning where the redrive of a queue of others may take messages that were never begun."""
    policy = redrive_of(found.get("RedrivePolicy"))
    count = whole_number(policy.get("maxReceiveCount"))
    if 0 < count < FEW_RECEIVES:
        log.warning(
            "queue %s has a redrive policy of its own: after %d receives SQS moves a message to %s, and a receive "
            "counts though its message was never begun (it was held ahead, and its worker ended). Set Task(prefetch=0) "
            "or a maxReceiveCount of %d and more",
            queue, count, one_line(policy.get("deadLetterTargetArn")), FEW_RECEIVES,
        )  # fmt: skip


def _suspicion(spec: QueueSpec) -> str:
    """Return the hint that a queue with other attributes may be another pipeline's; SQS does not know its owner."""
    if spec.domain is None:
        return ""
    return (
        f". If it is another pipeline's, rename this one's domain ({spec.domain!r}) or task: two pairs of domain and "
        "task may join to the same name, and purge would empty both"
    )
