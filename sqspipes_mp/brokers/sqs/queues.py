"""Queues themselves at SQS: finding, making, counting, emptying and deleting them (keeper and caller, mostly)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sqspipes_mp.brokers.base import Depth, QueueSpec
from sqspipes_mp.brokers.sqs.attributes import address, differences, wanted
from sqspipes_mp.brokers.sqs.calls import Calls, logger
from sqspipes_mp.brokers.sqs.faults import Fault, Kind
from sqspipes_mp.errors import BrokerError, QueueMissing

#: Queues looked at side by side by ``ensure``.
ENSURE_THREADS = 8
#: Seconds until a new queue may be used (Amazon SQS API Reference, CreateQueue).
NEW_QUEUE_WAIT = 1.0

_COUNTS = (
    "ApproximateNumberOfMessages",
    "ApproximateNumberOfMessagesNotVisible",
    "ApproximateNumberOfMessagesDelayed",
)


@dataclass(frozen=True, slots=True)
class Making:
    """What new queues get besides what their spec says. ``retention`` in seconds."""

    retention: int
    kms_key: str | None
    tags: Mapping[str, str]


class Queues:
    """Knows the URLs of queues by name, URL or ARN; each is asked for once."""

    def __init__(self, calls: Calls, making: Making) -> None:
        self._calls = calls
        self._making = making
        self._urls: dict[str, str] = {}
        self._arns: dict[str, str] = {}

    def url(self, queue: str) -> str:
        """Return a queue's URL; raise what keeps it from being known."""
        found = self.find(queue)
        if isinstance(found, Fault):
            raise self._calls.error(found, "GetQueueUrl", queue)
        return found

    def find(self, queue: str, *, boot: bool = False) -> str | Fault:
        """Return a queue's URL, or the fault of asking for it."""
        url = self._urls.get(queue)
        return url if url is not None else self._look_up(queue, boot=boot)

    def ensure(self, specs: Sequence[QueueSpec], *, create: bool) -> None:
        """Create or check queues, dead-letter queues first."""
        redriving = [spec for spec in specs if spec.dead is not None]
        plain = [spec for spec in specs if spec.dead is None]
        for level in (plain, redriving):
            made = self._side_by_side(lambda spec: self._ensure(spec, create=create), level)
            if any(made) and not self._calls.clients.loopback:
                self._calls.pause(NEW_QUEUE_WAIT)

    def depth(self, queue: str) -> Depth:
        """Count a queue's messages, approximately."""
        params = {"QueueUrl": self.url(queue), "AttributeNames": list(_COUNTS)}
        counts = self._calls("GetQueueAttributes", queue, params).get("Attributes", {})
        visible, in_flight, delayed = (int(counts.get(name, 0)) for name in _COUNTS)
        return Depth(visible, in_flight, delayed)

    def purge(self, queues: Iterable[str]) -> None:
        """Ask for queues to be emptied, missing ones are fine; SQS allows it once a minute, the calls wait that out."""
        for queue in queues:
            try:
                self._calls("PurgeQueue", queue, {"QueueUrl": self.url(queue)})
            except QueueMissing:
                logger.debug("queue %s was not there to purge", queue)

    def delete(self, queues: Iterable[str]) -> None:
        """Delete queues; missing ones are fine."""
        for queue in queues:
            try:
                self._calls("DeleteQueue", queue, {"QueueUrl": self.url(queue)})
            except QueueMissing:
                logger.debug("queue %s was not there to delete", queue)
            self._urls.pop(queue, None)
            self._arns.pop(queue, None)

    def _look_up(self, queue: str, *, boot: bool) -> str | Fault:
        where = address(queue)
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
            result = self._calls.attempt("GetQueueUrl", queue, params, boot=boot)
            if isinstance(result, Fault):
                return result
            url = str(result["QueueUrl"])
        self._urls[queue] = url
        return url

    def _side_by_side(self, ensure: Callable[[QueueSpec], bool], specs: Sequence[QueueSpec]) -> list[bool]:
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
            found = self._attributes(spec.name)
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
        return False

    def _create(self, spec: QueueSpec) -> bool:
        params: dict[str, object] = {"QueueName": spec.name, "Attributes": self._wanted(spec)}
        if self._making.tags:
            params["tags"] = dict(self._making.tags)
        result = self._calls.attempt("CreateQueue", spec.name, params, boot=True)
        if not isinstance(result, Fault):
            self._urls[spec.name] = str(result["QueueUrl"])
            return True
        if result.kind is not Kind.EXISTS:
            raise self._calls.error(result, "CreateQueue", spec.name)
        # Somebody else created it, otherwise, since we looked.
        self._compare(spec, self._attributes(spec.name))
        return False

    def _wanted(self, spec: QueueSpec) -> dict[str, str]:
        dead_arn = None if spec.dead is None else self._arn(spec.dead)
        return wanted(spec, retention=self._making.retention, kms_key=self._making.kms_key, dead_arn=dead_arn)

    def _compare(self, spec: QueueSpec, found: Mapping[str, str]) -> None:
        texts = differences(self._wanted(spec), found)
        if texts:
            logger.warning("queue %s exists and is used as it is: %s%s", spec.name, "; ".join(texts), _suspicion(spec))

    def _attributes(self, queue: str) -> dict[str, str]:
        url = self.find(queue, boot=True)
        if isinstance(url, Fault):
            raise self._calls.error(url, "GetQueueUrl", queue)
        params = {"QueueUrl": url, "AttributeNames": ["All"]}
        found: dict[str, str] = self._calls("GetQueueAttributes", queue, params, boot=True).get("Attributes", {})
        if "QueueArn" in found:
            self._arns[queue] = found["QueueArn"]
        return found

    def _arn(self, queue: str) -> str:
        """Return a dead-letter queue's ARN. A queue just created may not be known everywhere for a moment."""
        failures = 0
        while queue not in self._arns:
            try:
                self._attributes(queue)
            except QueueMissing:
                failures += 1
                if failures > 5:
                    raise
                self._calls.pause(NEW_QUEUE_WAIT)
        return self._arns[queue]


def _suspicion(spec: QueueSpec) -> str:
    """Say what else a queue that differs may be than an older one of this pipeline; SQS does not know whose it is."""
    if spec.domain is None:
        return ""
    return (
        f". If it is another pipeline's, rename this one's domain ({spec.domain!r}) or task: two pairs of domain and "
        "task may join to the same name, and purge would empty both"
    )
