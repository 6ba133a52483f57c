"""Faults: failures of SQS calls, each of a kind that has a remedy (any process with a connection open).

Error codes are those of the Amazon SQS API Reference, "Common Errors" and each action's "Errors"; exceptions are judged
by their types. Pure: botocore is imported for its exceptions alone, once an error is to be judged.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any

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
from sqspipes_mp.messages.plain import one_line

#: Shortest and longest wait before another try, seconds. Each of these tries is two of botocore's.
FIRST_BACKOFF = 0.1
LONGEST_BACKOFF = 20.0
#: Seconds after which refused credentials count as wrong: new and rotated ones take seconds to be known everywhere.
REFUSED_PATIENCE = 15.0
#: The same where this connection has never had an answer, as at boot: most credentials are mistyped then.
UNKNOWN_PATIENCE = 5.0
#: Longest wait before another try while credentials are refused, seconds.
REFUSED_BACKOFF = 1.0
#: Most characters of an exception's text in a fault.
_MOST_TOLD = 500
#: Most characters of a fault in a log or an error.
_MOST_SHOWN = 2000


class Kind(Enum):
    """Kinds of faults, each with its remedy."""

    TRANSIENT = "try again, for as long as it takes"
    UNREACHABLE = "no answer, or none of SQS's: try again, but give up early while booting"
    CREDENTIALS = "no credentials, or refused ones: look for others and try again for some seconds, then give up"
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
    #: For credentials that could not be had: who gives them out, such as "AssumeRole"; "": SQS itself answered.
    source: str = ""
    #: Whether ``source`` may be back by itself: it is waited for as SQS is.
    passes: bool = False

    def __str__(self) -> str:
        told = f"{self.code} ({self.message})" if self.message else self.code
        return one_line(told, _MOST_SHOWN)

    @property
    def throttled(self) -> bool:
        """Whether SQS asks for fewer requests."""
        return "hrottl" in self.code or self.code in _TOO_MANY


class CallFailed(Exception):
    """A call that failed before or beside botocore's request (in ``http`` and ``credentials``), with its fault."""

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

#: Cures of KMS's refusals by code without prefix (Amazon SQS API Reference, SendMessage, "Errors").
_KMS = {
    "AccessDenied": "The caller needs kms:Decrypt to receive, and kms:GenerateDataKey too to send, on the queue's key",
    "Disabled": "The queue's KMS key is disabled: enable it (aws kms enable-key), or give the queue another key",
    "InvalidKeyUsage": "The queue's KMS key must be a symmetric one for ENCRYPT_DECRYPT: give the queue such a key",
    "InvalidState": "The queue's KMS key is being deleted or has no key material: cancel that (aws kms "
    "cancel-key-deletion, import-key-material), or give the queue another key",
    "NotFound": "There is no such KMS key in this region and account: check kms_key= and the queue's KmsMasterKeyId",
    "OptInRequired": "The account is not subscribed to KMS: finish its sign-up",
}
#: The action that AWS names in a refusal.
_ACTION = re.compile(r"not authorized to perform: ([A-Za-z0-9-]+:[A-Za-z0-9*]+)")


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
        return OutputError(f"{tried}. {_cure(fault, 'SendMessageBatch')}")
    return MessageTooLarge(
        f"{tried}. Most likely the queue's MaximumMessageSize is smaller than that: raise it (up to 1 MiB), or return "
        "less, such as the key of an object stored elsewhere"
    )


def classify_error(error: BaseException) -> Fault | None:
    """Return the fault of an exception out of a call; None for an exception that is no failed call (a bug, say)."""
    if isinstance(error, CallFailed):
        return error.fault
    if (answer := _answer(error)) is not None:
        return answer
    kind = _kind_of(error)
    # What is about credentials is not SQS's either where botocore says so in the middle of its call.
    if kind in (Kind.CREDENTIALS, Kind.TRANSIENT):
        return no_keys(error)
    return None if kind is None else Fault(kind, type(error).__name__, str(error))


def _answer(error: BaseException) -> Fault | None:
    """Return the fault that a service answered with; None: the exception is not botocore's ClientError."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict) or not isinstance(response.get("Error"), dict):
        return None
    code = str(response["Error"].get("Code", "Unknown"))
    message = str(response["Error"].get("Message", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400))
    return Fault(classify_code(code, message, status=status), code, message)


def no_keys(error: BaseException) -> Fault:
    """Return the fault of an exception raised while credentials were looked for: never one of SQS itself.

    STS, SSO, a metadata service, a credential process, a file or the user's ``session`` may raise any.
    """
    if isinstance(error, CallFailed):
        return error.fault
    if (answer := _answer(error)) is not None:
        source = str(getattr(error, "operation_name", "")) or "the service that gives out credentials"
        passes = answer.kind is Kind.TRANSIENT
        return replace(answer, kind=Kind.CREDENTIALS, source=source, passes=passes)
    passes = _kind_of(error) in (Kind.TRANSIENT, Kind.UNREACHABLE)
    return Fault(Kind.CREDENTIALS, type(error).__name__, str(error)[:_MOST_TOLD], _giver(error), passes)


def _kind_of(error: BaseException) -> Kind | None:
    """Return the kind of an exception by its type; None: it is none of botocore's or the system's."""
    for kind, classes in _kinds_of_exceptions():
        if isinstance(error, classes):
            return kind
    # botocore says so in words alone (RefreshableCredentials).
    if isinstance(error, RuntimeError) and "refreshed credentials" in str(error):
        return Kind.CREDENTIALS
    return None


def malformed_reply(text: str) -> Fault:
    """Return the fault of a reply that cannot be SQS's; ``text`` says why."""
    return Fault(Kind.UNREACHABLE, "MalformedReply", text)


def malformed(keys: Any) -> Fault | None:
    """Return the fault of credentials that no request can carry, without a part of them; None: they can be sent.

    ``keys``: credentials as botocore freezes them. A signature with such a secret key is wrong, and an exception about
    such a header shows all of the header.
    """
    for name, value in (("access key", keys.access_key), ("secret key", keys.secret_key), ("token", keys.token)):
        text = str(value or "")
        if text.isascii() and text.isprintable() and " " not in text:
            continue
        found = "a line break" if "\n" in text or "\r" in text else "white space" if text.split() != [text] else ""
        found = found or "a character that is no printable ASCII"
        message = f"the {name} has {found}: was it read from a file, or copied, with more than itself?"
        return Fault(Kind.CREDENTIALS, "MalformedCredentials", message, "the setting that holds them")
    return None


def _giver(error: BaseException) -> str:
    """Return the name of who gives out credentials, as far as botocore's exception tells it."""
    told = getattr(error, "kwargs", {})
    for name in ("provider", "endpoint_url", "profile_name"):
        if isinstance(told, dict) and told.get(name):
            return str(told[name])
    return str(getattr(error, "filename", None) or "the chain of credential providers")


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
        # Services and commands that give out credentials; they may be back by themselves.
        (Kind.TRANSIENT, (exceptions.CredentialRetrievalError, exceptions.MetadataRetrievalError)),
        (Kind.UNREACHABLE, unreachable),
        (Kind.REFUSED, (exceptions.BotoCoreError,)),
    )


def gives_up(
    kind: Kind,
    failures: int,
    *,
    patience: int = 3,
    boot: bool = False,
    refused: float = 0.0,
    known: bool = True,
    passes: bool = False,
) -> bool:
    """Tell whether a call is to be given up after ``failures`` failures in a row.

    ``patience``: failures that an unreachable endpoint is allowed at ``boot``. ``refused``: seconds since the
    credentials were first refused; ``known``: whether SQS has taken them before; ``passes``: see ``Fault``.
    """
    if passes:
        kind = Kind.UNREACHABLE
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
            return AccessDenied(f"{tried}. {_cure(fault, operation)}")
        case Kind.CREDENTIALS if fault.source:
            return without_keys(fault, f"{operation} on queue {queue!r} at {endpoint}")
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
            return BrokerError(f"{tried}. {_cure(fault, operation)}")


def without_keys(fault: Fault, what: str) -> AccessDenied:
    """Return the error of credentials that could not be had; ``what``: the call, or the endpoint, they were for."""
    return AccessDenied(
        f"no credentials for {what}: {fault.source}: {fault}. This is not SQS's answer: {_cure_of_keys(fault)}, and "
        "try aws sts get-caller-identity with the same environment"
    )


def _cure_of_keys(fault: Fault) -> str:
    match fault.code:
        case "MalformedCredentials":
            return "correct the value"
        case "MultiFactorPrompt":
            return "take a profile that needs no code, or fetch credentials before (aws sts get-session-token)"
        case "AccessDenied":
            return f"allow {fault.source} to the caller in its policy and in the role's trust policy"
        case "NoRegionError":
            return "STS needs a region of its own: set AWS_REGION and AWS_DEFAULT_REGION, or region in the profile"
        case _ if fault.passes:
            return "check that it can be reached from here"
        case _ if "SSO" in fault.code or "Token" in fault.code or "Login" in fault.code:
            return "log in again (aws sso login, aws login), or check the token"
        case _:
            return "check the profile, the AWS_ variables, and the files and commands they name"


def _short(code: str) -> str:
    """Return an error code without its prefixes."""
    return code.rpartition("#")[2].removeprefix("AWS.SimpleQueueService.")


def _cure(fault: Fault, operation: str) -> str:
    code = _short(fault.code)
    named = _ACTION.search(fault.message)
    if code.lower().startswith("kms"):
        kms = code[3:].removeprefix(".").removesuffix("Exception")
        return _KMS.get(kms, _KMS["AccessDenied"])
    if named is not None and named[1].startswith("kms:"):
        return _KMS["AccessDenied"]
    match code:
        case "InvalidMessageContents":
            return "The body has characters SQS does not carry (NUL and most control characters): encode them"
        case "InvalidAddress":
            return "The queue's address is not valid at this endpoint: check its URL or ARN, and the region"
        case "BatchRequestTooLong":
            return "Send less at once: a message with its attributes is limited to 1 MiB"
        case "OptInRequired" | "AccountProblem":
            return (
                "The account cannot use SQS there: check its subscription, its standing, and that the region is enabled"
            )
        case _ if fault.kind is Kind.DENIED:
            return f"Allow {named[1] if named else action(operation)} on this queue to the caller"
        case _ if operation.startswith("SendMessage"):
            return "Retrying cannot help: change what the message says"
        case _:
            return "Retrying cannot help"
