import pytest

from sqspipes_mp.brokers.base import QueueSpec
from sqspipes_mp.brokers.sqs.faults import Fault, Kind, classify_code, classify_error, gives_up, make_error, retry_delay
from sqspipes_mp.brokers.sqs.http import BadReply, TimedOut
from sqspipes_mp.brokers.sqs.http_connect import Unreachable
from sqspipes_mp.brokers.sqs.queues import differences, parse_address, wanted_attributes
from sqspipes_mp.errors import AccessDenied, BrokerError, BrokerUnreachable, QueueMissing
from sqspipes_mp.messages.limits import MAX_BYTES

botocore = pytest.importorskip("botocore.exceptions")

CODES = [
    ("RequestThrottled", Kind.TRANSIENT),
    ("ThrottlingException", Kind.TRANSIENT),
    ("Throttling", Kind.TRANSIENT),
    ("KmsThrottled", Kind.TRANSIENT),
    ("KMS.ThrottlingException", Kind.TRANSIENT),
    ("OverLimit", Kind.TRANSIENT),
    ("InternalError", Kind.TRANSIENT),
    ("ServiceUnavailable", Kind.TRANSIENT),
    ("AWS.SimpleQueueService.PurgeQueueInProgress", Kind.TRANSIENT),
    ("AWS.SimpleQueueService.QueueDeletedRecently", Kind.TRANSIENT),
    ("AWS.SimpleQueueService.NonExistentQueue", Kind.MISSING),
    ("QueueDoesNotExist", Kind.MISSING),
    ("com.amazonaws.sqs#QueueDoesNotExist", Kind.MISSING),
    ("QueueAlreadyExists", Kind.EXISTS),
    ("QueueNameExists", Kind.EXISTS),
    ("AccessDenied", Kind.DENIED),
    ("AccessDeniedException", Kind.DENIED),
    ("KmsAccessDenied", Kind.DENIED),
    ("KMS.AccessDeniedException", Kind.DENIED),
    ("InvalidClientTokenId", Kind.CREDENTIALS),
    ("UnrecognizedClientException", Kind.CREDENTIALS),
    ("ExpiredToken", Kind.CREDENTIALS),
    ("SignatureDoesNotMatch", Kind.CREDENTIALS),
    ("ReceiptHandleIsInvalid", Kind.STALE),
    ("AWS.SimpleQueueService.MessageNotInflight", Kind.STALE),
    ("KmsDisabled", Kind.REFUSED),
    ("InvalidAddress", Kind.REFUSED),
    ("InvalidMessageContents", Kind.REFUSED),
    ("AWS.SimpleQueueService.UnsupportedOperation", Kind.REFUSED),
    ("BatchRequestTooLong", Kind.REFUSED),
]


@pytest.mark.parametrize(("code", "kind"), CODES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_code_is_judged(code: str, kind: Kind) -> None:
    assert classify_code(code) is kind


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (
            (
                "Value 43200 for parameter VisibilityTimeout is invalid. Reason: Total VisibilityTimeout for the "
                "message is beyond the limit [43200 seconds]"
            ),
            Kind.TOO_LONG,
        ),
        ("Value AQEB for parameter ReceiptHandle is invalid. Reason: The receipt handle has expired.", Kind.STALE),
        (
            (
                "Value AQEB for parameter ReceiptHandle is invalid. Reason: Message does not exist or is not available "
                "for visibility timeout change."
            ),
            Kind.STALE,
        ),
        ("One or more parameters are invalid. Reason: Message must be shorter than 262144 bytes.", Kind.REFUSED),
    ],
)
def test_invalid_parameter_is_judged_by_its_text(message: str, kind: Kind) -> None:
    assert classify_code("InvalidParameterValue", message) is kind


def test_unknown_codes_are_judged_by_status_and_fault() -> None:
    assert classify_code("Strange") is Kind.REFUSED
    assert classify_code("Strange", status=503) is Kind.TRANSIENT
    assert classify_code("Strange", status=429) is Kind.TRANSIENT
    assert classify_code("Strange", status=403) is Kind.DENIED
    assert classify_code("Strange", sender_fault=False) is Kind.TRANSIENT


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (botocore.EndpointConnectionError(endpoint_url="u", error="e"), Kind.UNREACHABLE),
        (botocore.ConnectTimeoutError(endpoint_url="u"), Kind.UNREACHABLE),
        (botocore.SSLError(endpoint_url="u", error="e"), Kind.UNREACHABLE),
        (botocore.ProxyConnectionError(proxy_url="u"), Kind.UNREACHABLE),
        (botocore.ReadTimeoutError(endpoint_url="u"), Kind.UNREACHABLE),
        (botocore.ConnectionClosedError(endpoint_url="u"), Kind.UNREACHABLE),
        (botocore.HTTPClientError(error="e"), Kind.UNREACHABLE),
        (botocore.IncompleteReadError(actual_bytes=1, expected_bytes=2), Kind.UNREACHABLE),
        (ConnectionResetError("e"), Kind.UNREACHABLE),
        (botocore.MetadataRetrievalError(error_msg="e"), Kind.CREDENTIALS),
        (botocore.CredentialRetrievalError(provider="p", error_msg="e"), Kind.CREDENTIALS),
        (botocore.NoCredentialsError(), Kind.CREDENTIALS),
        (botocore.PartialCredentialsError(provider="p", cred_var="v"), Kind.CREDENTIALS),
        (botocore.UnauthorizedSSOTokenError(), Kind.CREDENTIALS),
        (botocore.UnknownServiceError(service_name="s", known_service_names="n"), Kind.REFUSED),
        (
            RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired."),
            Kind.CREDENTIALS,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.name,
)
def test_exceptions_of_botocore_are_classified(error: Exception, kind: Kind) -> None:
    fault = classify_error(error)
    assert fault is not None
    assert fault.kind is kind


def test_a_type_counts_and_not_its_name() -> None:
    renamed = type("Renamed", (botocore.ReadTimeoutError,), {})
    fault = classify_error(renamed(endpoint_url="u"))
    assert fault is not None
    assert fault.kind is Kind.UNREACHABLE
    stranger = type("ReadTimeoutError", (Exception,), {})
    assert classify_error(stranger("e")) is None


def test_a_failed_call_of_our_own_has_its_fault() -> None:
    class Renamed(Unreachable):
        pass

    assert classify_error(Renamed("reset")) == Fault(Kind.UNREACHABLE, "ConnectionClosedError", "reset")
    assert classify_error(TimedOut("silence")) == Fault(Kind.UNREACHABLE, "ReadTimeoutError", "silence")
    assert classify_error(BadReply("Odd", "no", 503)) == Fault(Kind.TRANSIENT, "Odd", "no")


def test_client_error_is_classified_by_code_and_status() -> None:
    response = {"Error": {"Code": "AccessDenied", "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    assert classify_error(botocore.ClientError(response, "SendMessageBatch")) == Fault(
        Kind.DENIED, "AccessDenied", "no"
    )
    response = {"Error": {"Code": "Odd"}, "ResponseMetadata": {"HTTPStatusCode": 500}}
    assert classify_error(botocore.ClientError(response, "SendMessageBatch")) == Fault(Kind.TRANSIENT, "Odd")


@pytest.mark.parametrize("bug", [KeyError("x"), TypeError("x"), RuntimeError("x"), ValueError("x")])
def test_bugs_are_no_faults(bug: Exception) -> None:
    assert classify_error(bug) is None


def test_giving_up() -> None:
    assert not gives_up(Kind.TRANSIENT, 1000, boot=True)
    assert not gives_up(Kind.UNREACHABLE, 1000)
    assert [gives_up(Kind.UNREACHABLE, n, boot=True) for n in (1, 2, 3)] == [False, False, True]
    # By time: new ones take seconds to be known everywhere, however many calls that is.
    assert not gives_up(Kind.CREDENTIALS, 1000, refused=14.9)
    assert gives_up(Kind.CREDENTIALS, 1, refused=15.0)
    assert [gives_up(Kind.CREDENTIALS, 9, refused=s, boot=True, known=False) for s in (4.9, 5.0)] == [False, True]
    for kind in (Kind.DENIED, Kind.MISSING, Kind.EXISTS, Kind.STALE, Kind.TOO_LONG, Kind.REFUSED):
        assert gives_up(kind, 1)


def test_the_delay_doubles_to_its_cap() -> None:
    longest = [retry_delay(failures, lambda low, high: high) for failures in range(1, 12)]
    assert longest[:4] == pytest.approx([0.2, 0.4, 0.8, 1.6])
    assert longest[-1] == 20.0
    assert retry_delay(500, lambda low, high: high) == 20.0
    assert retry_delay(9, lambda low, high: low) == 0.1


@pytest.mark.parametrize(
    ("kind", "code", "error", "words"),
    [
        (Kind.MISSING, "QueueDoesNotExist", QueueMissing, ["'q'", "create_queues=True"]),
        (Kind.DENIED, "AccessDenied", AccessDenied, ["'q'", "sqs:SendMessage ", "http://e"]),
        (Kind.DENIED, "KmsAccessDenied", AccessDenied, ["kms:GenerateDataKey"]),
        (Kind.CREDENTIALS, "ExpiredToken", AccessDenied, ["ExpiredToken", "sts get-caller-identity", "clock"]),
        (Kind.UNREACHABLE, "EndpointConnectionError", BrokerUnreachable, ["http://e", "AWS_ENDPOINT_URL_SQS"]),
        (Kind.REFUSED, "InvalidMessageContents", BrokerError, ["characters"]),
        (Kind.REFUSED, "KmsDisabled", BrokerError, ["enable-key"]),
        (Kind.REFUSED, "KMS.NotFoundException", BrokerError, ["kms_key=", "KmsMasterKeyId"]),
        (Kind.REFUSED, "KmsInvalidState", BrokerError, ["cancel-key-deletion"]),
        (Kind.REFUSED, "KmsInvalidKeyUsage", BrokerError, ["symmetric"]),
        (Kind.REFUSED, "KmsOptInRequired", BrokerError, ["subscribed to KMS"]),
        (Kind.DENIED, "OptInRequired", AccessDenied, ["subscription"]),
    ],
)
def test_error_says_what_to_do(kind: Kind, code: str, error: type[BrokerError], words: list[str]) -> None:
    raised = make_error(Fault(kind, code, "told so"), "SendMessageBatch", "q", "http://e")
    assert type(raised) is error
    assert code in str(raised)
    for word in words:
        assert word in str(raised)


@pytest.mark.parametrize(
    ("queue", "name", "account", "region"),
    [
        ("q", "q", None, None),
        ("q.fifo", "q.fifo", None, None),
        ("arn:aws:sqs:us-west-2:123456789012:q", "q", "123456789012", "us-west-2"),
        ("arn:aws-cn:sqs:cn-north-1:1:q.fifo", "q.fifo", "1", "cn-north-1"),
        ("https://sqs.us-west-2.amazonaws.com/123456789012/q", "q", None, "us-west-2"),
        ("https://sqs.cn-north-1.amazonaws.com.cn/1/q", "q", None, "cn-north-1"),
        ("https://vpce-1.sqs.us-west-2.vpce.amazonaws.com/1/q", "q", None, None),
        ("http://127.0.0.1:5000/123456789012/q", "q", None, None),
    ],
)
def test_address_is_read(queue: str, name: str, account: str | None, region: str | None) -> None:
    found = parse_address(queue)
    assert (found.name, found.account, found.region) == (name, account, region)
    assert found.url == (queue if queue.startswith("http") else None)


SPEC = QueueSpec(name="q.fifo", fifo=True, visibility=30, dead="d.fifo")
WANTED = wanted_attributes(SPEC, retention=1_209_600, kms_key="alias/k", dead_arn="arn:d")


def test_same_attributes_do_not_differ() -> None:
    assert differences(WANTED, {**WANTED, "MaximumMessageSize": str(MAX_BYTES), "QueueArn": "arn:q"}) == []
    assert differences({"MessageRetentionPeriod": "60"}, {"MessageRetentionPeriod": "120"}) == []


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("VisibilityTimeout", "99", "VisibilityTimeout is 99, not 30"),
        ("MessageRetentionPeriod", "86400", "keeps messages 1 days, not 14"),
        ("FifoThroughputLimit", "perQueue", "FifoThroughputLimit is perQueue, not perMessageGroupId"),
        ("KmsMasterKeyId", "alias/other", "KmsMasterKeyId is alias/other, not alias/k"),
        ("MaximumMessageSize", "262144", "MaximumMessageSize is 262144 bytes"),
        ("RedrivePolicy", "", "no RedrivePolicy"),
        ("RedrivePolicy", '{"deadLetterTargetArn":"arn:d","maxReceiveCount":"5"}', "maxReceiveCount is 5, not 1000"),
        ("RedrivePolicy", '{"deadLetterTargetArn":"arn:e","maxReceiveCount":1000}', "redrives to arn:e, not arn:d"),
    ],
)
def test_each_difference_is_named(name: str, value: str, text: str) -> None:
    (found,) = differences(WANTED, {**WANTED, name: value})
    assert text in found
