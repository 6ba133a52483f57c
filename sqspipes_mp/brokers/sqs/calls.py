"""One SQS call at a time, tried until it succeeds or cannot (any process that has a connection open).

botocore tries each call twice within a second; the loop here goes on after that for as long as it takes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqspipes_mp.brokers.sqs.faults import REFUSED_BACKOFF, Fault, Kind, backoff, classify, explain, gives_up
from sqspipes_mp.brokers.sqs.http import OPERATIONS, Lean
from sqspipes_mp.brokers.sqs.http_reply import Unsure
from sqspipes_mp.errors import BrokerBusy, BrokerError

logger = logging.getLogger("sqspipes_mp.brokers.sqs")

#: Seconds between two warnings about calls that are being tried again.
WARN_EVERY = 60.0
#: Failures of entries in a row that an impatient connection bears.
_IMPATIENT_FAILURES = 3
#: Waits this long and shorter use the client with the short read timeout.
SHORT_WAIT = 1

_METHODS = {
    "ChangeMessageVisibilityBatch": "change_message_visibility_batch",
    "CreateQueue": "create_queue",
    "DeleteMessageBatch": "delete_message_batch",
    "DeleteQueue": "delete_queue",
    "GetQueueAttributes": "get_queue_attributes",
    "GetQueueUrl": "get_queue_url",
    "PurgeQueue": "purge_queue",
    "ReceiveMessage": "receive_message",
    "SendMessageBatch": "send_message_batch",
}


@dataclass(frozen=True, slots=True)
class Clients:
    """Two boto3 SQS clients of one process: ``poll`` has a read timeout longer than the longest long poll."""

    hot: Any
    poll: Any
    region: str
    endpoint: str
    loopback: bool
    #: Seconds each of the two waits for an answer.
    hot_timeout: float = 10.0
    poll_timeout: float = 30.0


@dataclass(slots=True)
class _Trouble:
    """What one call has met with so far; times are monotonic."""

    since: float
    failures: int = 0
    refused_at: float | None = None


class Calls:
    """Makes calls, safe from several threads: retries, backs off, warns, and gives up where that is right."""

    def __init__(self, clients: Clients, patience: float | None = None, lean: Lean | None = None) -> None:
        self.clients = clients
        self._lean = lean
        self._patience = patience
        self.interrupted = threading.Event()
        self.closed = threading.Event()
        #: Whether these credentials were ever taken, and since when they are not.
        self._known = False
        self._refused_at: float | None = None
        self._warned_at: float | None = None
        #: Requests that were throttled so far.
        self.throttles = 0
        self._warning = threading.Lock()

    def __call__(self, operation: str, queue: str, params: Mapping[str, Any], *, boot: bool = False) -> dict[str, Any]:
        """Make a call; raise what cannot be cured by trying again."""
        result = self.attempt(operation, queue, params, boot=boot)
        if isinstance(result, Fault):
            raise self.error(result, operation, queue)
        return result

    def attempt(
        self,
        operation: str,
        queue: str,
        params: Mapping[str, Any],
        *,
        boot: bool = False,
        worthwhile: Callable[[], bool] | None = None,
    ) -> dict[str, Any] | Fault:
        """Make a call until it succeeds; return the fault that cannot be cured by trying again.

        ``worthwhile``: asked before each try but the first; False: the last fault is returned, as a transient one.
        """
        trouble = _Trouble(time.monotonic())
        while True:
            self._check_open()
            result = self._once(self.clients.hot, operation, params)
            if not isinstance(result, Fault):
                return result
            if self._is_hopeless(result, trouble, boot=boot):
                return result
            self._check_patience(result, operation, queue, trouble.since)
            self.pause(self.retrying(result, operation, queue, trouble.failures))
            if worthwhile is not None and not worthwhile():
                return replace(result, kind=Kind.TRANSIENT)

    def receive(self, queue: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Poll a queue until there is an answer; ``interrupt`` ends the waiting between two tries."""
        client = self.clients.hot if params["WaitTimeSeconds"] <= SHORT_WAIT else self.clients.poll
        trouble = _Trouble(time.monotonic())
        while not self.interrupted.is_set():
            self._check_open()
            result = self._once(client, "ReceiveMessage", params)
            if not isinstance(result, Fault):
                messages: list[dict[str, Any]] = result.get("Messages", [])
                return messages
            if _is_full(result):
                return []
            if self._is_hopeless(result, trouble):
                raise self.error(result, "ReceiveMessage", queue)
            self.interrupted.wait(self.retrying(result, "ReceiveMessage", queue, trouble.failures))
        return []

    def _is_hopeless(self, fault: Fault, trouble: _Trouble, *, boot: bool = False) -> bool:
        trouble.failures += 1
        refused = 0.0
        if fault.kind is Kind.CREDENTIALS:
            now = time.monotonic()
            # Of the connection, too: what is called once one call has given up does not wait as long again.
            since = self._refused_at = self._refused_at or now
            trouble.refused_at = trouble.refused_at or now
            refused = now - min(since, trouble.refused_at)
        return gives_up(fault.kind, trouble.failures, boot=boot, refused=refused, known=self._known)

    def _check_patience(self, fault: Fault, operation: str, queue: str, since: float) -> None:
        if self._patience is not None and time.monotonic() - since >= self._patience:
            raise BrokerBusy(f"{operation} on queue {queue}: no answer for {self._patience:g} s ({fault})")

    def check_failures(self, fault: Fault, operation: str, queue: str, failures: int) -> None:
        """Give up on entries that keep failing, where this connection has its patience. Raises ``BrokerBusy``."""
        if self._patience is not None and failures >= _IMPATIENT_FAILURES:
            raise BrokerBusy(f"{operation} on queue {queue}: failed {failures} times ({fault})")

    def retrying(self, fault: Fault, operation: str, queue: str, failures: int) -> float:
        """Warn that a call is going to be tried again, at most once a minute; return the seconds to wait first."""
        seconds = backoff(failures)
        self.throttles += fault.throttled
        if fault.kind is Kind.CREDENTIALS:
            seconds = min(seconds, REFUSED_BACKOFF)
        with self._warning:
            now = time.monotonic()
            if self._warned_at is not None and now - self._warned_at < WARN_EVERY:
                return seconds
            self._warned_at = now
        logger.warning("%s on queue %s at %s: %s; trying again", operation, queue, self.clients.endpoint, fault)
        return seconds

    def pause(self, seconds: float) -> None:
        """Wait, unless the connection is closed meanwhile."""
        self.closed.wait(seconds)
        self._check_open()

    def error(self, fault: Fault, operation: str, queue: str) -> BrokerError:
        """Make the error to raise for a fault."""
        return explain(fault, operation, queue, self.clients.endpoint)

    def interrupt(self) -> None:
        """End receives soon, for good."""
        self.interrupted.set()

    def close(self) -> None:
        """End everything and close the sockets."""
        self.interrupted.set()
        self.closed.set()
        self.clients.hot.close()
        self.clients.poll.close()
        if self._lean is not None:
            self._lean.close()

    def _once(self, client: Any, operation: str, params: Mapping[str, Any]) -> dict[str, Any] | Fault:
        try:
            reply = self._ask(client, operation, params)
        except Exception as error:
            fault = classify(error)
            if fault is None:
                raise
            return fault
        self._known, self._refused_at = True, None
        return reply

    def _ask(self, client: Any, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        lean = self._lean
        if lean is not None and operation in OPERATIONS:
            timeout = self.clients.poll_timeout if client is self.clients.poll else self.clients.hot_timeout
            try:
                return lean(operation, params, timeout)
            except Unsure as why:
                logger.info("boto3 makes all calls to %s from here on: %s", self.clients.endpoint, why)
                self._lean = None
                lean.close()
        reply: dict[str, Any] = getattr(client, _METHODS[operation])(**params)
        return reply

    def _check_open(self) -> None:
        if self.closed.is_set():
            raise BrokerError(f"the connection to SQS at {self.clients.endpoint} was closed meanwhile")


def _is_full(fault: Fault) -> bool:
    """Tell whether a queue has as many messages in flight as it may.

    SQS says so to short polls of standard queues only; to a long poll such a queue is empty. It is to a short one here,
    or it would hold up the lower levels.
    """
    return fault.code.rpartition("#")[2] == "OverLimit"
