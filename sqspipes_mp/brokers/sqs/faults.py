"""What an SQS failure means and what to do about it (any process that has a connection open).

Pure: looks at codes and class names, and imports no boto3. Codes: Amazon SQS API Reference, "Common Errors" and each
action's "Errors"; botocore's own exceptions are told by the names in their class hierarchy.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from sqspipes_mp.errors import AccessDenied, BrokerError, MessageError, MessageTooLarge, OutputError, QueueMissing

#: First and longest wait between two tries of our own, in seconds; botocore has tried before each of them.
FIRST_BACKOFF = 0.1
LONGEST_BACKOFF = 20.0
#: Seconds for which credentials may be refused before they are taken to be wrong: new and rotated ones take seconds to
#: be known everywhere. Less where this connection never had an answer with any, as at boot: most are then mistyped.
REFUSED_PATIENCE, UNKNOWN_PATIENCE = 15.0, 5.0
#: Longest wait between two tries while they are refused, seconds.
REFUSED_BACKOFF = 1.0


class Kind(Enum):
    """What a fault asks for."""

    TRANSIENT = "try again, for as long as it takes"
    UNREACHABLE = "the endpoint does not answer (as SQS does): try again, but give up early while booting"
    CREDENTIALS = "try for some seconds (new credentials take as long to be known everywhere), then give up"
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
    code: str
    message: str = ""

    def __str__(self) -> str:
        return f"{self.code} ({self.message})" if self.message else self.code

    @property
    def throttled(self) -> bool:
        """Whether SQS asks for fewer requests."""
        return "hrottl" in self.code or self.code in _TOO_MANY


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

_KIND_OF_CLASS = {
    "NoCredentialsError": Kind.CREDENTIALS,
    "PartialCredentialsError": Kind.CREDENTIALS,
    "RefreshWithMFAUnsupportedError": Kind.CREDENTIALS,
    "SSOError": Kind.CREDENTIALS,
    "LoginError": Kind.CREDENTIALS,
    "TokenRetrievalError": Kind.CREDENTIALS,
    "NoAuthTokenError": Kind.CREDENTIALS,
    "CredentialRetrievalError": Kind.TRANSIENT,
    "CredentialsPending": Kind.TRANSIENT,
    "MetadataRetrievalError": Kind.TRANSIENT,
    "ReadTimeoutError": Kind.UNREACHABLE,
    "ConnectionClosedError": Kind.UNREACHABLE,
    "ResponseStreamingError": Kind.UNREACHABLE,
    "IncompleteReadError": Kind.UNREACHABLE,
    "ResponseParserError": Kind.UNREACHABLE,
    "ConnectionError": Kind.UNREACHABLE,
    "HTTPClientError": Kind.UNREACHABLE,
}

#: Codes with which SQS refuses one message for what it is (Amazon SQS API Reference, SendMessageBatch): its size, its
#: characters. A queue's own MaximumMessageSize is answered with the first.
_UNSENDABLE = frozenset(
    ("InvalidParameterValue", "InvalidParameterValueException", "BatchRequestTooLong", "InvalidMessageContents")
)

_KMS = "the caller needs kms:Decrypt to receive, and kms:GenerateDataKey as well to send, on the queue's key"


def judge(code: str, message: str = "", *, status: int = 400, sender_fault: bool = True) -> Kind:
    """Tell what an error code of SQS asks for; ``status`` is HTTP's, ``sender_fault`` a batch entry's."""
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


def unsendable(fault: Fault) -> bool:
    """Tell whether a send was refused because of this one message; others may be sent there all the same."""
    return fault.kind is Kind.REFUSED and _short(fault.code) in _UNSENDABLE


def refusal(fault: Fault, queue: str, size: int) -> MessageError:
    """Turn the fault of an unsendable message of ``size`` bytes into its error."""
    tried = f"queue {queue!r} refused an output of {size:,} bytes: {fault}"
    if _short(fault.code) == "InvalidMessageContents":
        return OutputError(f"{tried}. {_cure(fault.code)}")
    return MessageTooLarge(
        f"{tried}. Most likely the queue's MaximumMessageSize is smaller than that: raise it (up to 1 MiB), or return "
        "less, such as the key of an object stored elsewhere"
    )


def classify(error: BaseException) -> Fault | None:
    """Tell what a failed call asks for; None for what is no failure of a call (a bug, say)."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and isinstance(response.get("Error"), dict):
        code = str(response["Error"].get("Code", "Unknown"))
        message = str(response["Error"].get("Message", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400))
        return Fault(judge(code, message, status=status), code, message)
    names = [cls.__name__ for cls in type(error).__mro__]
    for name in names:
        if name in _KIND_OF_CLASS:
            return Fault(_KIND_OF_CLASS[name], names[0], str(error))
    if isinstance(error, RuntimeError) and "refreshed credentials" in str(error):
        return Fault(Kind.CREDENTIALS, "ExpiredToken", str(error))
    return Fault(Kind.REFUSED, names[0], str(error)) if "BotoCoreError" in names else None


def gives_up(
    kind: Kind, failures: int, *, patience: int = 3, boot: bool = False, refused: float = 0.0, known: bool = True
) -> bool:
    """Tell whether a call that failed ``failures`` times in a row is to be given up.

    ``refused``: seconds since its credentials were first refused; ``known``: whether they were taken before.
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


def backoff(failures: int, draw: Callable[[float, float], float] = random.uniform) -> float:
    """Return the seconds to wait after the ``failures``-th failure in a row: exponential, capped, fully jittered."""
    return draw(FIRST_BACKOFF, max(2 * FIRST_BACKOFF, min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(failures, 12))))


def action(operation: str) -> str:
    """Name the IAM action an API operation needs (Amazon SQS: a batch is allowed by its single action)."""
    return f"sqs:{operation.removesuffix('Batch')}"


def explain(fault: Fault, operation: str, queue: str, endpoint: str) -> BrokerError:
    """Turn a fault into the error to raise: what was tried, what came back, and what to do."""
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
            return BrokerError(
                f"{tried}. Nothing usable answers there: check the region, endpoint_url (AWS_ENDPOINT_URL_SQS), "
                "name resolution, proxy and certificates"
            )
        case _:
            cure = _KMS if "kms" in fault.code.lower() else _cure(fault.code)
            return BrokerError(f"{tried}. {cure}")


def _short(code: str) -> str:
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
