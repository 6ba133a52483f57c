"""Errors in SQS's JSON protocol: ``__type`` in the body, the older code in the header ``x-amzn-query-error``."""

import json

_SQS = "com.amazonaws.sqs#"
_CORAL = "com.amazon.coral.service#"
_OLD = "AWS.SimpleQueueService."

#: By name: the prefix of ``__type``, the code of the older protocol (which boto3 shows), the HTTP status, and whether
#: the client has broken a limit (such errors are in the ledger). Amazon SQS API Reference, each action's "Errors".
_TABLE: dict[str, tuple[str, str, int, bool]] = {
    "BatchEntryIdsNotDistinct": (_SQS, _OLD + "BatchEntryIdsNotDistinct", 400, True),
    "BatchRequestTooLong": (_SQS, _OLD + "BatchRequestTooLong", 400, True),
    "EmptyBatchRequest": (_SQS, _OLD + "EmptyBatchRequest", 400, True),
    "InvalidAddress": (_SQS, "InvalidAddress", 404, True),
    "InvalidAttributeName": (_SQS, "InvalidAttributeName", 400, True),
    "InvalidAttributeValue": (_SQS, "InvalidAttributeValue", 400, True),
    "InvalidBatchEntryId": (_SQS, _OLD + "InvalidBatchEntryId", 400, True),
    "InvalidMessageContents": (_SQS, "InvalidMessageContents", 400, True),
    "MessageNotInflight": (_SQS, _OLD + "MessageNotInflight", 400, False),
    "OverLimit": (_SQS, "OverLimit", 403, True),
    "PurgeQueueInProgress": (_SQS, _OLD + "PurgeQueueInProgress", 403, False),
    "QueueDeletedRecently": (_SQS, _OLD + "QueueDeletedRecently", 400, False),
    "QueueDoesNotExist": (_SQS, _OLD + "NonExistentQueue", 400, False),
    "QueueNameExists": (_SQS, "QueueAlreadyExists", 400, False),
    "ReceiptHandleIsInvalid": (_SQS, "ReceiptHandleIsInvalid", 404, False),
    "RequestThrottled": (_SQS, "RequestThrottled", 403, False),
    "TooManyEntriesInBatchRequest": (_SQS, _OLD + "TooManyEntriesInBatchRequest", 400, True),
    "UnsupportedOperation": (_SQS, _OLD + "UnsupportedOperation", 400, True),
    "AccessDeniedException": (_CORAL, "AccessDenied", 403, False),
    "ExpiredTokenException": (_CORAL, "ExpiredToken", 403, False),
    "InternalFailure": (_CORAL, "InternalFailure", 500, False),
    "InvalidParameterValueException": (_CORAL, "InvalidParameterValue", 400, True),
    "MissingAuthenticationTokenException": (_CORAL, "MissingAuthenticationToken", 403, False),
    "MissingRequiredParameterException": (_CORAL, "MissingParameter", 400, True),
    "ServiceUnavailable": (_CORAL, "ServiceUnavailable", 503, False),
    "ThrottlingException": ("com.amazon.coral.availability#", "ThrottlingException", 400, False),
    "UnrecognizedClientException": (_CORAL, "InvalidClientTokenId", 403, False),
}


class SqsError(Exception):
    """An error to answer with.

    ``name``: a key of ``_TABLE``; ``code``: the code that boto3 shows; ``blame``: whether the client broke a limit.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name
        self.message = message
        prefix, self.code, self.status, self.blame = _TABLE[name]
        self.type = prefix + name

    @property
    def body(self) -> str:
        """The body of the reply."""
        return json.dumps({"__type": self.type, "message": self.message})

    @property
    def fault(self) -> str:
        """The one to blame: "Receiver" (the service) or "Sender"."""
        return "Receiver" if self.status >= 500 else "Sender"


def invalid(parameter: str, value: object, reason: str) -> SqsError:
    """Return the error of a parameter with a wrong value."""
    return SqsError(
        "InvalidParameterValueException", f"Value {value} for parameter {parameter} is invalid. Reason: {reason}"
    )


def missing(parameter: str) -> SqsError:
    """Return the error of a missing parameter."""
    return SqsError("MissingRequiredParameterException", f"The request must contain the parameter {parameter}.")


def stale(receipt: str) -> SqsError:
    """Return the error of a stale receipt handle."""
    error = invalid(
        "ReceiptHandle", receipt, "Message does not exist or is not available for visibility timeout change."
    )
    error.blame = False
    return error
