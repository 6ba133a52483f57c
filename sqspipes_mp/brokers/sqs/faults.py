"""Faults: failures of SQS calls, each of a kind that has a remedy (any process with a connection open).

Error codes are those of the Amazon SQS API Reference, "Common Errors" and each action's "Errors"; exceptions are judged
by their types. Pure: botocore is imported for its exceptions alone, once an error is to be judged.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache

from sqspipes_mp.errors import (
    AccessDenied,
    BrokerError,
    BrokerUnreachable,
    MessageError,
    MessageTooLarge,
    OutputError,
    QueueMissing,
)
from sqspipes_mp.messages.attempts import exponential

#: Shortest and longest wait before another try, seconds. Each of these tries is two of botocore's.
FIRST_BACKOFF = 0.1
LONGEST_BACKOFF = 20.0
#: Seconds after which refused credentials count as wrong: new and rotated ones take seconds to be known everywhere.
REFUSED_PATIENCE = 15.0
#: The same where this connection has never had an answer, as at boot: most credentials are mistyped then.
UNKNOWN_PATIENCE = 5.0
#: Longest wait before another try while credentials are refused, seconds.
REFUSED_BACKOFF = 1.0


class Kind(Enum):
    """Kinds of faults, each with its remedy."""

    TRANSIENT = "try again, for as long as it takes"
    UNREACHABLE = "no answer, or none of SQS's: try again, but give up early while booting"
    CREDENTIALS = "the credentials are refused: try again for some seconds, then give up"
    DENIED = "give up: not allowed"
    MISSING = "give up: no such queue"
    EXISTS = "the queue exists with other attributes"
    STALE = "the delivery is no longer ours"
    TOO_LONG = "the visibility timeout would pass the 12 hours of one delivery"
    REFUSED = "give up: the request itself is wrong"


@dataclass(frozen=True, slots=True)
class Fault:
    """One failed call, or one failed entry of a batch."""

    kind: Kind
    #: SQS's error code, or the name of an exception; for the log and for ``unsendable``.
    code: str
    message: str = ""

    def __str__(self) -> str:
        return f"{self.code} ({self.message})" if self.message else self.code

    @property
    def throttled(self) -> bool:
        """Whether SQS asks for fewer requests."""
        return "hrottl" in self.code or self.code in _TOO_MANY


class CallFailed(Exception):
    """A call that failed outside botocore (in ``http`` and ``credentials``), with its fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message or fault.code)
        self.fault = fault


#: Codes of throttling without that word in them.
_TOO_MANY = frozenset({"TooManyRequestsException", "RequestLimitExceeded", "BandwidthLimitExceeded", "SlowDown"})
_CODES: dict[Kind, frozenset[str]] = {
    Kind.TRANSIENT: frozenset(
        (
            "Throttling",
            "ThrottlingException",
            "ThrottledException",
            "RequestThrottled",
            "RequestThrottledException",
            "TooManyRequestsException",
            "RequestLimitExceeded",
            "BandwidthLimitExceeded",
            "LimitExceededException",
            "SlowDown",
            "ProvisionedThroughputExceededException",
            "PriorRequestNotComplete",
            "TransactionInProgressException",
            "OverLimit",
            "KmsThrottled",
            "KMS.ThrottlingException",
            "PurgeQueueInProgress",
            "QueueDeletedRecently",
            "InternalError",
            "InternalFailure",
            "InternalServerError",
            "ServiceUnavailable",
            "ServiceUnavailableException",
            "RequestTimeout",
            "RequestTimeoutException",
            "HttpTimeoutException",
            "NoAnswer",
        )
    ),
    Kind.CREDENTIALS: frozenset(
        (
            "InvalidClientTokenId",
            "UnrecognizedClientException",
            "UnrecognizedClient",
            "ExpiredToken",
            "ExpiredTokenException",
            "TokenRefreshRequired",
            "SignatureDoesNotMatch",
            "InvalidSignatureException",
            "IncompleteSignature",
            "RequestExpired",
            "RequestTimeTooSkewed",
            "MissingAuthenticationToken",
            "MissingAuthenticationTokenException",
            "InvalidSecurity",
        )
    ),
    Kind.DENIED: frozenset(
        (
            "AccessDenied",
            "AccessDeniedException",
            "UnauthorizedOperation",
            "NotAuthorized",
            "OptInRequired",
            "AccountProblem",
            "KmsAccessDenied",
            "KMS.AccessDeniedException",
        )
    ),
    Kind.MISSING: frozenset({"QueueDoesNotExist", "NonExistentQueue"}),
    Kind.EXISTS: frozenset({"QueueNameExists", "QueueAlreadyExists"}),
    Kind.STALE: frozenset({"ReceiptHandleIsInvalid", "MessageNotInflight"}),
}
_KIND_OF_CODE = {code: kind for kind, codes in _CODES.items() for code in codes}

#: Codes with which SQS refuses one message for its size or its characters (Amazon SQS API Reference, SendMessageBatch).
#: A message above a queue's MaximumMessageSize gets the first.
_UNSENDABLE = frozenset(
    ("InvalidParameterValue", "InvalidParameterValueException", "BatchRequestTooLong", "InvalidMessageContents")
)

_KMS = "the caller needs kms:Decrypt to receive, and kms:GenerateDataKey as well to send, on the queue's key"


def classify_code(code: str, message: str = "", *, status: int = 400, sender_fault: bool = True) -> Kind:
    """Return the kind of an error code of SQS.

    ``message``: the text beside the code; ``status``: of the HTTP reply; ``sender_fault``: of a batch entry.
    """
    short = _short(code)
    known = _KIND_OF_CODE.get(short)
    if known is not None:
        return known
    text = message.lower()
    if short in ("InvalidParameterValue", "InvalidParameterValueException"):
        if "visibilitytimeout" in text:
            return Kind.TOO_LONG
        if "receipthandle" in text or "receipt handle" in text:
            return Kind.STALE
    if status >= 500 or status == 429 or not sender_fault:
        return Kind.TRANSIENT
    if status in (401, 403):
        return Kind.DENIED
    return Kind.REFUSED


def counted_as(fault: Fault) -> str:
    """Return the kind under which a failed request is counted (``brokers.base.Meter``)."""
    if fault.throttled:
        return "throttled"
    return {Kind.CREDENTIALS: "credentials", Kind.UNREACHABLE: "network", Kind.TRANSIENT: "server"}.get(
        fault.kind, "refused"
    )


def unsendable(fault: Fault) -> bool:
    """Tell whether a send was refused because of this one message: the queue takes others."""
    return fault.kind is Kind.REFUSED and _short(fault.code) in _UNSENDABLE


def refusal(fault: Fault, queue: str, size: int) -> MessageError:
    """Return the error of an unsendable message of ``size`` bytes."""
    tried = f"queue {queue!r} refused an output of {size:,} bytes: {fault}"
    if _short(fault.code) == "InvalidMessageContents":
        return OutputError(f"{tried}. {_cure(fault.code)}")
    return MessageTooLarge(
        f"{tried}. Most likely the queue's MaximumMessageSize is smaller than that: raise it (up to 1 MiB), or return "
        "less, such as the key of an object stored elsewhere"
    )


def classify_error(error: BaseException) -> Fault | None:
    """Return the fault of an exception out of a call; None for an exception that is no failed call (a bug, say)."""
    if isinstance(error, CallFailed):
        return error.fault
    # botocore's ClientError has a response.
    response = getattr(error, "response", None)
    if isinstance(response, dict) and isinstance(response.get("Error"), dict):
        code = str(response["Error"].get("Code", "Unknown"))
        message = str(response["Error"].get("Message", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400))
        return Fault(classify_code(code, message, status=status), code, message)
    for kind, classes in _kinds_of_exceptions():
        if isinstance(error, classes):
            return Fault(kind, type(error).__name__, str(error))
    # botocore says so in words alone (RefreshableCredentials).
    if isinstance(error, RuntimeError) and "refreshed credentials" in str(error):
        return Fault(Kind.CREDENTIALS, "ExpiredToken", str(error))
    return None


@cache
def _kinds_of_exceptions() -> tuple[tuple[Kind, tuple[type[BaseException], ...]], ...]:
    """Return the kinds of botocore's exceptions and of the system's, the most general one last."""
    from botocore import exceptions, parsers  # noqa: PLC0415  (naming ``SQS`` must not cost botocore's import)

    credentials = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.RefreshWithMFAUnsupportedError,
        exceptions.SSOError,
        exceptions.TokenRetrievalError,
        exceptions.NoAuthTokenError,
        # Not in the oldest botocore that this package takes.
        *([exceptions.LoginError] if hasattr(exceptions, "LoginError") else []),
    )
    unreachable = (
        # HTTPClientError has ReadTimeoutError, ConnectionClosedError and ResponseStreamingError below it.
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        parsers.ResponseParserError,
        ConnectionError,
    )
    return (
        (Kind.CREDENTIALS, credentials),
        (Kind.TRANSIENT, (exceptions.CredentialRetrievalError, exceptions.MetadataRetrievalError)),
        (Kind.UNREACHABLE, unreachable),
        (Kind.REFUSED, (exceptions.BotoCoreError,)),
    )


def gives_up(
    kind: Kind, failures: int, *, patience: int = 3, boot: bool = False, refused: float = 0.0, known: bool = True
) -> bool:
    """Tell whether a call is to be given up after ``failures`` failures in a row.

    ``patience``: failures that an unreachable endpoint is allowed at ``boot``. ``refused``: seconds since the
    credentials were first refused; ``known``: whether SQS has taken them before.
    """
    match kind:
        case Kind.TRANSIENT:
            return False
        case Kind.UNREACHABLE:
            return boot and failures >= patience
        case Kind.CREDENTIALS:
            return refused >= (REFUSED_PATIENCE if known else UNKNOWN_PATIENCE)
        case _:
            return True


def retry_delay(failures: int, draw: Callable[[float, float], float] = random.uniform) -> float:
    """Return the seconds to wait after failure number ``failures`` in a row: exponential, capped, fully jittered."""
    return draw(FIRST_BACKOFF, max(2 * FIRST_BACKOFF, exponential(FIRST_BACKOFF, failures, LONGEST_BACKOFF)))


def action(operation: str) -> str:
    """Return the IAM action that allows an operation (Amazon SQS: a batch needs its single action)."""
    return f"sqs:{operation.removesuffix('Batch')}"


def make_error(fault: Fault, operation: str, queue: str, endpoint: str) -> BrokerError:
    """Return the error to raise for a fault: the call, the answer and the cure in its text."""
    tried = f"{operation} on queue {queue!r} at {endpoint} failed: {fault}"
    match fault.kind:
        case Kind.MISSING:
            cure = "Create it (create_queues=True), or check the region, the account and sqs:GetQueueUrl"
            return QueueMissing(queue, f"{operation} at {endpoint} answered {fault.code}. {cure}")
        case Kind.DENIED:
            cure = _KMS if "kms" in fault.code.lower() else f"Allow {action(operation)} on this queue to the caller"
            return AccessDenied(f"{tried}. {cure}")
        case Kind.CREDENTIALS:
            return AccessDenied(
                f"{tried}. Check that the credentials are complete, meant for this endpoint and not expired "
                "(aws sts get-caller-identity), and that this machine's clock is right"
            )
        case Kind.UNREACHABLE:
            return BrokerUnreachable(
                f"{tried}. Nothing usable answers there: check the region, endpoint_url (AWS_ENDPOINT_URL_SQS), "
                "name resolution, proxy and certificates. A service that starts at the same time is waited for with "
                "--wait-for-broker SECONDS, run(wait_for_broker=)"
            )
        case _:
            cure = _KMS if "kms" in fault.code.lower() else _cure(fault.code)
            return BrokerError(f"{tried}. {cure}")


def _short(code: str) -> str:
    """Return an error code without its prefixes."""
    return code.rpartition("#")[2].removeprefix("AWS.SimpleQueueService.")


def _cure(code: str) -> str:
    match _short(code):
        case "InvalidMessageContents":
            return "The body has characters SQS does not carry (NUL and most control characters): encode them"
        case "InvalidAddress":
            return "The queue's address is not valid at this endpoint: check its URL or ARN, and the region"
        case "BatchRequestTooLong":
            return "Send less at once: a message with its attributes is limited to 1 MiB"
        case _:
            return "Retrying cannot help: change what the message says"
