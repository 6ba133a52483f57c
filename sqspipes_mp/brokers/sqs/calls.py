"""Single SQS calls, repeated until they succeed or cannot succeed (any process with a connection open).

botocore, and the lean path like it, tries each call twice within a second; the loops here repeat that for as long as it
takes.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sqspipes_mp.brokers.base import ASKED_EVERY, ATTENDED, TOLD_EVERY, Meter
from sqspipes_mp.brokers.shown import shown
from sqspipes_mp.brokers.sqs.faults import (
    LONGEST_BACKOFF,
    REFUSED_BACKOFF,
    CallFailed,
    Fault,
    Kind,
    classify_error,
    counted_as,
    gives_up,
    make_error,
    malformed_reply,
    no_keys,
    retry_delay,
)
from sqspipes_mp.brokers.sqs.http import OPERATIONS, Keys, Lean, TooLong, Unsure
from sqspipes_mp.brokers.sqs.http_connect import refuses_certificate
from sqspipes_mp.brokers.sqs.http_fit import log_once
from sqspipes_mp.brokers.sqs.long_polls import Cut, LongPolls
from sqspipes_mp.errors import BrokerBusy, BrokerError, SqsPipesError
from sqspipes_mp.host import descriptors

T = TypeVar("T")

log = logging.getLogger("sqspipes_mp.brokers.sqs")

#: Seconds between two warnings about calls that are tried again.
WARN_EVERY = 60.0
#: Batches in a row with failed entries after which a connection with patience, and an attended one, raises
#: ``BrokerBusy``.
_IMPATIENT_FAILURES, _ATTENDED_FAILURES = 3, 30
#: Longest pause of an attended connection between two tries, seconds.
_ATTENDED_PAUSE = 5.0
#: Seconds between two looks for other credentials while these are refused or cannot be had.
RENEW_EVERY = 4.0
#: Longest wait of a receive, seconds, for which the client with the short read timeout is used.
SHORT_WAIT = 1

#: Code of a fault for a certificate that one side does not trust.
_CERTIFICATE = "CertificateError"
#: boto3's methods by operations.
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
#: The operations that are counted by names of their own.
_COUNTED = {
    "ChangeMessageVisibilityBatch": "extend",
    "DeleteMessageBatch": "delete",
    "GetQueueAttributes": "count",
    "ReceiveMessage": "receive",
    "SendMessageBatch": "send",
}
#: A URL in botocore's text, up to its closing quotation mark.
_URL = re.compile(r'https?://[^"]*')
#: Exceptions of reading a reply of another shape.
_WRONG_SHAPE = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


def _as_it_is(reply: dict[str, Any]) -> Any:
    return reply


@dataclass(frozen=True, slots=True)
class Clients:
    """The two boto3 SQS clients of one process, and their settings."""

    #: Client for all calls but long polls.
    hot: Any
    #: Client for long polls: its read timeout is longer than the longest of them.
    poll: Any
    region: str
    #: URL of the endpoint.
    endpoint: str
    #: Returns the credentials. Raises ``CallFailed`` where they cannot be had.
    keys: Callable[[], Keys]
    #: Whether the endpoint is on this machine.
    loopback: bool
    #: Read timeout of ``hot``, seconds.
    hot_timeout: float = 10.0
    #: Read timeout of ``poll``, seconds.
    poll_timeout: float = 30.0


@dataclass(slots=True)
class _Trouble:
    """The failures of one call so far. Times are monotonic seconds."""

    #: Time of the first try.
    since: float
    #: Failures in a row.
    failures: int = 0
    #: Time of the first failure for refused credentials.
    refused_at: float | None = None


class Calls:
    """Makes calls for any thread: tries again, backs off, warns, and gives up where that is right.

    ``patience``, ``attended``: see ``Broker.open``; ``lean``: the lean path, None: boto3 makes all calls. ``renew``
    looks for other credentials: it returns clients and lean path with them, None where there are none.
    """

    def __init__(
        self,
        clients: Clients,
        patience: float | None = None,
        lean: Lean | None = None,
        renew: Callable[[], tuple[Clients, Lean | None] | None] | None = None,
        *,
        attended: bool = False,
    ) -> None:
        self.clients = clients
        self._lean = lean
        self._renew = renew
        #: When other credentials may be looked for next, monotonic seconds; held by the thread that looks.
        self._renew_at = 0.0
        self._renewing = threading.Lock()
        self._patience = ATTENDED if attended else patience
        self._attended = attended
        self.interrupted = threading.Event()
        #: The receives that an interrupt cuts off.
        self._polls = LongPolls()
        self.closed = threading.Event()
        #: Set while a pause is in vain: the connection is closed, or its caller was interrupted.
        self._no_pauses = threading.Event()
        #: Whether SQS has ever taken these credentials.
        self._known = False
        #: Monotonic time of the first call whose credentials were refused since the last answer.
        self._refused_at: float | None = None
        self._warned_at: float | None = None
        #: Requests that were throttled so far.
        self.throttles = 0
        self._warning = threading.Lock()
        #: Counts requests; None: nobody does.
        self.meter: Meter | None = None

    def __call__(
        self,
        operation: str,
        queue: str,
        params: Mapping[str, Any],
        read: Callable[[dict[str, Any]], T] = _as_it_is,
        *,
        boot: bool = False,
    ) -> T:
        """Make a call; return what ``read`` makes of the reply.

        Raises the ``BrokerError`` of a fault that no further try cures. ``queue``: for the error's text; ``boot``: an
        endpoint that does not answer is given up early.
        """
        result = self.attempt(operation, queue, params, read, boot=boot)
        if isinstance(result, Fault):
            raise self.error(result, operation, queue)
        return result

    def attempt(
        self,
        operation: str,
        queue: str,
        params: Mapping[str, Any],
        read: Callable[[dict[str, Any]], T] = _as_it_is,
        *,
        boot: bool = False,
        worthwhile: Callable[[], bool] | None = None,
    ) -> T | Fault:
        """Make a call until it succeeds; return what ``read`` makes of the reply, or a fault that no further try cures.

        ``worthwhile`` is asked before each try but the first; once False, the last fault is returned as a transient
        one. Raises ``BrokerBusy`` after ``patience``, ``BrokerError`` once the connection is closed.
        """
        trouble = _Trouble(time.monotonic())
        while True:
            self._check_open()
            result = self._once(operation, params, read)
            if not isinstance(result, Fault):
                return result
            if self._count_failure(result, trouble, boot=boot):
                return result
            self._look_for_keys(result)
            self._check_patience(result, operation, queue, trouble.since)
            if not self.pause(self.plan_retry(result, operation, queue, trouble.failures), worthwhile):
                return replace(result, kind=Kind.TRANSIENT)

    def receive(self, queue: str, params: Mapping[str, Any], read: Callable[[dict[str, Any]], list[T]]) -> list[T]:
        """Poll a queue until there is an answer; return what ``read`` makes of it.

        ``interrupt`` ends the pause between two tries. Raises the ``BrokerError`` of a fault that no further try cures.
        """
        long = params["WaitTimeSeconds"] > SHORT_WAIT
        trouble = _Trouble(time.monotonic())
        while not self.interrupted.is_set():
            self._check_open()
            try:
                result = self._once("ReceiveMessage", params, read, long=long)
            except Cut:
                # It was a request all the same.
                if self.meter is not None:
                    self.meter.request(_COUNTED["ReceiveMessage"], None)
                    self.meter.empty()
                return []
            if not isinstance(result, Fault):
                if self.meter is not None and not result:
                    self.meter.empty()
                return result
            if _is_full(result):
                return []
            if self._count_failure(result, trouble):
                raise self.error(result, "ReceiveMessage", queue)
            self._look_for_keys(result)
            self._check_patience(result, "ReceiveMessage", queue, trouble.since)
            self.interrupted.wait(self.plan_retry(result, "ReceiveMessage", queue, trouble.failures))
        return []

    def _count_failure(self, fault: Fault, trouble: _Trouble, *, boot: bool = False) -> bool:
        """Count a failure; tell whether its call is to be given up."""
        trouble.failures += 1
        refused = 0.0
        if fault.kind is Kind.CREDENTIALS:
            now = time.monotonic()
            # The time counts for the connection: after one call has given up, the next does not wait as long again.
            since = self._refused_at = self._refused_at or now
            trouble.refused_at = trouble.refused_at or now
            refused = now - min(since, trouble.refused_at)
        # A certificate that was good before may be replaced; one that never was is a wrong setting.
        boot = boot or ((fault.code == _CERTIFICATE or self._attended) and not self._known)
        return gives_up(
            fault.kind, trouble.failures, boot=boot, refused=refused, known=self._known, passes=fault.passes
        )

    def _check_patience(self, fault: Fault, operation: str, queue: str, since: float) -> None:
        """Raise ``BrokerBusy``, or ``BrokerUnreachable`` to those who attend, once the patience is over."""
        if self._patience is None or time.monotonic() - since < self._patience:
            return
        if self._attended and fault.kind is Kind.UNREACHABLE:
            raise self.error(fault, operation, queue)
        raise BrokerBusy(f"{operation} on queue {queue}: no answer for {self._patience:g} s ({fault})")

    def check_failures(self, fault: Fault, operation: str, queue: str, failures: int) -> None:
        """Raise ``BrokerBusy`` for entries that failed ``failures`` times in a row, on a connection with patience."""
        most = _ATTENDED_FAILURES if self._attended else _IMPATIENT_FAILURES
        if self._patience is not None and failures >= most:
            raise BrokerBusy(f"{operation} on queue {queue}: failed {failures} times ({fault})")

    def plan_retry(self, fault: Fault, operation: str, queue: str, failures: int) -> float:
        """Return the seconds to wait before another try; log a warning of it, at most one a minute (attended: 10 s)."""
        seconds = min(retry_delay(failures), _ATTENDED_PAUSE if self._attended else LONGEST_BACKOFF)
        self.throttles += fault.throttled
        if fault.kind is Kind.CREDENTIALS and not fault.passes:
            seconds = min(seconds, REFUSED_BACKOFF)
        with self._warning:
            now = time.monotonic()
            if self._warned_at is not None and now - self._warned_at < (TOLD_EVERY if self._attended else WARN_EVERY):
                return seconds
            self._warned_at = now
        log.warning("%s on queue %s at %s: %s; trying again", operation, queue, self.clients.endpoint, fault)
        return seconds

    def pause(self, seconds: float, worthwhile: Callable[[], bool] | None = None) -> bool:
        """Wait, as long as it is ``worthwhile``; tell whether it still is. Raises ``BrokerError`` once closed."""
        until = time.monotonic() + seconds
        while worthwhile is not None and (left := until - time.monotonic()) > ASKED_EVERY:
            self._no_pauses.wait(min(left, ASKED_EVERY))
            self._check_open()
            if not worthwhile():
                return False
            if self._no_pauses.is_set():
                break
        self._no_pauses.wait(max(0.0, until - time.monotonic()))
        self._check_open()
        return worthwhile is None or worthwhile()

    @contextlib.contextmanager
    def without_pauses(self) -> Iterator[None]:
        """End all pauses within the block, for those who stop trying."""
        self._no_pauses.set()
        try:
            yield
        finally:
            if not self.closed.is_set():
                self._no_pauses.clear()

    def count_requests(self, meter: Meter) -> None:
        """Have every request from now on counted."""
        self.meter = meter
        self._tell_transport()

    def _tell_transport(self) -> None:
        if self.meter is not None:
            self.meter.transport("boto3" if self._lean is None else "fast")

    def error(self, fault: Fault, operation: str, queue: str) -> BrokerError:
        """Return the error to raise for a fault."""
        return make_error(fault, operation, queue, self.clients.endpoint)

    def interrupt(self) -> None:
        """Make receives return soon, until ``receive_again``; a long poll of boto3's ends by itself."""
        self.interrupted.set()
        self._polls.cut_off()

    def receive_again(self) -> None:
        """Undo ``interrupt``."""
        self._polls.go_on()
        self.interrupted.clear()

    def close(self) -> None:
        """End all calls and close the sockets."""
        self.interrupted.set()
        self.closed.set()
        self._no_pauses.set()
        _close(self.clients, self._lean)

    def _look_for_keys(self, fault: Fault) -> None:
        """Look for other credentials after a fault of these: a file may have been rotated, a role's session ended."""
        if fault.kind is not Kind.CREDENTIALS or self._renew is None or not self._renewing.acquire(blocking=False):
            return
        try:
            now = time.monotonic()
            if now < self._renew_at:
                return
            self._renew_at = now + RENEW_EVERY
            found = self._renew()
            if found is None:
                return
            log.info("other credentials were found for %s", self.clients.endpoint)
            old, lean = self.clients, self._lean
            self.clients, self._lean = found
            self._tell_transport()
            _close(old, lean)
        except (SqsPipesError, CallFailed) as error:
            log.debug("no other credentials: %s", error)
        finally:
            self._renewing.release()

    def _once(
        self,
        operation: str,
        params: Mapping[str, Any],
        read: Callable[[dict[str, Any]], T] = _as_it_is,
        *,
        long: bool = False,
    ) -> T | Fault:
        """Make one call; return what ``read`` makes of the reply, or the fault. Other exceptions are bugs and pass.

        Raises ``Cut`` for a long poll that was cut off.
        """
        try:
            reply = self._ask(operation, params, long=long)
        except Cut:
            raise
        except Exception as error:
            # botocore may look for credentials in the middle of its call.
            of_others = getattr(error, "operation_name", operation) != operation
            fault = no_keys(error) if of_others else classify_error(error)
            if fault is None and _came_of_parsing(error):
                return malformed_reply(f"{type(error).__name__}: {error}")
            if fault is None:
                raise
            if "@" in fault.message:
                # botocore quotes the URL of the endpoint, of which the environment may have put a password into.
                fault = replace(fault, message=_URL.sub(lambda url: shown(url[0]), fault.message))
            if fault.kind is Kind.UNREACHABLE and descriptors.none_left():
                descriptors.relieve()
            if self.meter is not None:
                self.meter.request(_COUNTED.get(operation, "other"), counted_as(fault))
            if fault.kind is Kind.UNREACHABLE and refuses_certificate(error):
                return replace(fault, code=_CERTIFICATE)
            return fault
        try:
            told = read(reply)
        except _WRONG_SHAPE as error:
            return malformed_reply(f"{type(error).__name__}: {error}")
        self._known, self._refused_at = True, None
        if self.meter is not None:
            self.meter.request(_COUNTED.get(operation, "other"), None)
        return told

    def _ask(self, operation: str, params: Mapping[str, Any], *, long: bool) -> dict[str, Any]:
        """Make one call by the lean path where it serves the operation, else by boto3; return the reply.

        ``long``: it is a long poll.
        """
        clients, lean = self.clients, self._lean
        if lean is not None and operation in OPERATIONS:
            try:
                if long:
                    return lean(operation, params, clients.poll_timeout, self._polls)
                return lean(operation, params, clients.hot_timeout)
            except TooLong:
                # A receive takes other messages: those of the long reply are visible again when their time is over.
                pass
            except Unsure as why:
                log_once("boto3 makes all calls to %s from here on: %s", clients.endpoint, str(why))
                self._lean = None
                self._tell_transport()
                lean.close()
        # Credentials first: an exception out of the call itself is SQS's.
        clients.keys()
        client = clients.poll if long else clients.hot
        reply: dict[str, Any] = getattr(client, _METHODS[operation])(**params)
        return reply

    def _check_open(self) -> None:
        if self.closed.is_set():
            raise BrokerError(f"the connection to SQS at {self.clients.endpoint} was closed meanwhile")


def _came_of_parsing(error: BaseException) -> bool:
    """Tell whether an exception comes out of botocore's parsers: the reply has another shape than SQS's."""
    frames = error.__traceback__
    while frames is not None:
        if frames.tb_frame.f_globals.get("__name__") == "botocore.parsers":
            return True
        frames = frames.tb_next
    return False


def _close(clients: Clients, lean: Lean | None) -> None:
    """Close the sockets; those in use are closed when their calls end."""
    clients.hot.close()
    clients.poll.close()
    if lean is not None:
        lean.close()


def _is_full(fault: Fault) -> bool:
    """Tell whether a poll failed because the queue has its most messages in flight.

    SQS answers so to short polls of standard queues only; to a long poll such a queue is empty. ``receive`` takes both
    as empty: else a full queue would keep the lower levels from being polled.
    """
    return fault.code.rpartition("#")[2] == "OverLimit"
