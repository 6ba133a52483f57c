"""What the SQS broker makes of failures, told by a server that fails on demand."""

import contextlib
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sqspipes_mp.brokers.base import Completion, DeadLetter, Handle, Output, QueueSpec
from sqspipes_mp.brokers.sqs import faults as sqs_errors
from sqspipes_mp.brokers.sqs.connection import SqsConnection
from sqspipes_mp.errors import AccessDenied, BrokerError, QueueMissing
from sqspipes_mp.messages.attributes import Attribute
from standin.brokers import sqs_at
from tests.contract.wire import Error, Json, Wire, batch, served

SPEC = QueueSpec(name="q", fifo=False, visibility=30)


@contextlib.contextmanager
def connected(answer: Callable[[str, Json, int], Json | Error | None]) -> Iterator[tuple[Wire, SqsConnection]]:
    with served(answer) as wire:
        connection = sqs_at(wire.url).open()
        try:
            yield wire, connection
        finally:
            connection.close()


def handle(name: str, queue: str = "in") -> Handle:
    return Handle(queue, f"receipt-{name}", f"id-{name}")


def completion(name: str, *outputs: Output) -> Completion:
    return Completion(handle(name), outputs)


def bodies(requests: list[Json]) -> list[list[str]]:
    return [[entry["MessageBody"] for entry in request["Entries"]] for request in requests]


def receipts(wire: Wire, operation: str = "DeleteMessageBatch") -> list[list[str]]:
    return [[entry["ReceiptHandle"] for entry in request["Entries"]] for request in wire.requests(operation)]


def once(operation: str, error: Error | Callable[[Json], Json]) -> Callable[[str, Json, int], Json | Error | None]:
    def answer(asked: str, request: Json, nth: int) -> Json | Error | None:
        if asked != operation or nth:
            return None
        return error if isinstance(error, Error) else error(request)

    return answer


def always(operation: str, error: Error) -> Callable[[str, Json, int], Json | Error | None]:
    return lambda asked, request, nth: error if asked == operation else None


def test_entry_that_failed_is_sent_again_before_its_input_is_deleted() -> None:
    fails_second = once("SendMessageBatch", lambda request: batch(request, {1: ("InternalError", False)}))
    with connected(fails_second) as (wire, connection):
        connection.complete([completion(n, Output("out", n, n)) for n in "abc"])
    assert bodies(wire.requests("SendMessageBatch")) == [["a", "b", "c"], ["b"]]
    assert [name for name, _ in wire.asked][-1] == "DeleteMessageBatch"
    assert receipts(wire) == [["receipt-a", "receipt-b", "receipt-c"]]


def test_later_message_of_a_group_waits_for_the_one_that_failed() -> None:
    fails_first = once("SendMessageBatch", lambda request: batch(request, {0: ("InternalError", False)}))
    with connected(fails_first) as (wire, connection):
        outputs = [Output("out.fifo", body, body, group=body[0]) for body in ("a1", "a2", "b1", "a3")]
        connection.complete([completion("x", *outputs)])
    assert bodies(wire.requests("SendMessageBatch")) == [["a1", "b1"], ["a1"], ["a2"], ["a3"]]


def test_refused_entry_raises_after_the_others_are_done() -> None:
    refuses = once("SendMessageBatch", lambda request: batch(request, {0: ("InvalidMessageContents", True)}))
    with connected(refuses) as (wire, connection), pytest.raises(BrokerError, match=r"'out'.*InvalidMessageContents"):
        sent: list[Completion] = []
        connection.complete([completion(n, Output("out", n, n)) for n in "ab"], sent.append)
    assert [done.input for done in sent] == [handle("b")]
    assert receipts(wire) == [["receipt-b"]]


def test_nothing_of_a_group_follows_a_refused_message() -> None:
    refuses = once("SendMessageBatch", lambda request: batch(request, {0: ("InvalidMessageContents", True)}))
    with connected(refuses) as (wire, connection), pytest.raises(BrokerError):
        outputs = [Output("out.fifo", body, body, group=body[0]) for body in ("a1", "a2", "b1")]
        connection.complete([completion(output.body, output) for output in outputs])
    assert bodies(wire.requests("SendMessageBatch")) == [["a1", "b1"]]
    assert receipts(wire) == [["receipt-b1"]]


def test_refused_batch_is_sent_entry_by_entry() -> None:
    def answer(operation: str, request: Json, nth: int) -> Error | None:
        if operation == "SendMessageBatch" and any(entry["MessageBody"] == "bad" for entry in request["Entries"]):
            return Error("InvalidParameterValue")
        return None

    with connected(answer) as (wire, connection), pytest.raises(BrokerError):
        connection.complete([completion(n, Output("out", n, n)) for n in ("good", "bad", "fine")])
    assert receipts(wire) == [["receipt-good", "receipt-fine"]]


def test_missing_output_queue_does_not_hold_up_the_others() -> None:
    def answer(operation: str, request: Json, nth: int) -> Error | None:
        missing = operation == "GetQueueUrl" and request["QueueName"] == "gone"
        return Error("AWS.SimpleQueueService.NonExistentQueue") if missing else None

    with connected(answer) as (wire, connection), pytest.raises(QueueMissing, match="gone"):
        connection.complete([completion("a", Output("gone", "a", "a")), completion("b", Output("out", "b", "b"))])
    assert receipts(wire) == [["receipt-b"]]


@pytest.mark.parametrize(
    "error",
    [Error("InternalError", status=500), Error("ServiceUnavailable", status=503), Error("KMS.ThrottlingException")],
    ids=lambda error: error.code,
)
def test_transient_failures_are_outlived(error: Error) -> None:
    def answer(operation: str, request: Json, nth: int) -> Error | None:
        return error if operation == "SendMessageBatch" and nth < 3 else None

    with connected(answer) as (wire, connection):
        assert connection.complete([completion("a", Output("out", "a", "a"))]) == []
    assert receipts(wire) == [["receipt-a"]]


def test_transient_failures_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    def answer(operation: str, request: Json, nth: int) -> Error | None:
        return Error("KmsThrottled") if operation == "SendMessageBatch" and nth < 4 else None

    with connected(answer) as (_wire, connection), caplog.at_level(logging.WARNING):
        connection.complete([completion("a", Output("out", "a", "a"))])
    assert len(caplog.messages) == 1
    assert "KmsThrottled" in caplog.messages[0]


def test_retried_fifo_receive_repeats_its_attempt_id() -> None:
    fails = once("ReceiveMessage", Error("KmsThrottled"))
    with connected(fails) as (wire, connection):
        connection.receive(["q.fifo"], 1, 0, 30)
        connection.receive(["q.fifo"], 1, 0, 30)
    first, again, second = [request["ReceiveRequestAttemptId"] for request in wire.requests("ReceiveMessage")]
    assert first == again != second


def test_receive_asks_for_whole_seconds() -> None:
    with connected(lambda *_: None) as (wire, connection):
        connection.receive(["q"], 50, 0.3, 0.2)
        connection.receive(["q"], 1, 3600, 14.5)
    asked = [
        (request["MaxNumberOfMessages"], request["WaitTimeSeconds"], request["VisibilityTimeout"])
        for request in wire.requests("ReceiveMessage")
    ]
    assert asked == [(10, 1, 1), (1, 20, 15)]


def test_interrupt_ends_the_waiting_for_a_failing_service() -> None:
    asked = threading.Event()

    def answer(operation: str, request: Json, nth: int) -> Error | None:
        if operation == "ReceiveMessage":
            asked.set()
            return Error("KmsThrottled")
        return None

    with connected(answer) as (_, connection):
        found: list[object] = ["none yet"]
        waiting = threading.Thread(target=lambda: found.__setitem__(slice(None), connection.receive(["q"], 1, 20, 30)))
        waiting.start()
        assert asked.wait(10)
        connection.interrupt()
        waiting.join(15)
        assert not waiting.is_alive()
        assert found == []


@pytest.mark.parametrize("operation", ["GetQueueUrl", "CreateQueue", "GetQueueAttributes"])
def test_boot_without_permission_names_the_action(operation: str) -> None:
    def answer(asked: str, request: Json, nth: int) -> Error | None:
        if asked == operation:
            return Error("AccessDenied", status=403)
        missing = asked == "GetQueueUrl" and operation == "CreateQueue"
        return Error("AWS.SimpleQueueService.NonExistentQueue") if missing else None

    with connected(answer) as (wire, connection), pytest.raises(AccessDenied, match=f"sqs:{operation}.*") as caught:
        connection.ensure([SPEC], create=True)
    assert "'q'" in str(caught.value)
    assert len(wire.requests(operation)) == 1


def test_boot_with_bad_credentials_gives_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqs_errors, "UNKNOWN_PATIENCE", 0.3)
    with (
        connected(always("GetQueueUrl", Error("ExpiredToken", status=403))) as (wire, connection),
        pytest.raises(AccessDenied, match="ExpiredToken"),
    ):
        connection.ensure([SPEC], create=True)
    assert len(wire.requests("GetQueueUrl")) >= 2


@pytest.mark.parametrize("operation", ["SendMessageBatch", "ReceiveMessage"])
def test_a_rotated_key_that_is_refused_for_a_while_ends_nothing(operation: str) -> None:
    refused = 5

    def answer(asked: str, request: Json, nth: int) -> Error | None:
        return Error("InvalidClientTokenId", status=403) if asked == operation and nth < refused else None

    with connected(answer) as (wire, connection):
        if operation == "ReceiveMessage":
            assert connection.receive(["in"], 1, 0, 30) == []
        else:
            assert connection.complete([completion("a", Output("out", "a", "a"))]) == []
    assert len(wire.requests(operation)) == refused + 1


def test_once_credentials_are_given_up_further_calls_do_not_wait_as_long_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqs_errors, "REFUSED_PATIENCE", 0.3)
    with connected(always("SendMessageBatch", Error("ExpiredToken", status=403))) as (wire, connection):
        connection.ensure([SPEC], create=True)
        with pytest.raises(AccessDenied, match="ExpiredToken"):
            connection.complete([completion("a", Output("q", "a", "a"))])
        first = len(wire.requests("SendMessageBatch"))
        with pytest.raises(AccessDenied, match="ExpiredToken"):
            connection.complete([completion("b", Output("q", "b", "b"))])
        assert len(wire.requests("SendMessageBatch")) == first + 1 > 2
        assert receipts(wire) == []


def test_boot_at_a_closed_port_names_the_endpoint_soon() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        connection = sqs_at(url).open()
        started = time.monotonic()
        with pytest.raises(BrokerError, match=url):
            connection.ensure([SPEC], create=True)
        assert time.monotonic() - started < 15
        connection.close()


def test_boot_waits_out_a_recent_deletion() -> None:
    def answer(operation: str, request: Json, nth: int) -> Error | None:
        if operation == "GetQueueUrl":
            return Error("AWS.SimpleQueueService.NonExistentQueue")
        if operation == "CreateQueue" and nth == 0:
            return Error("AWS.SimpleQueueService.QueueDeletedRecently")
        return None

    with connected(answer) as (wire, connection):
        connection.ensure([SPEC], create=True)
    assert len(wire.requests("CreateQueue")) == 2


def test_queue_created_meanwhile_by_others_is_used(caplog: pytest.LogCaptureFixture) -> None:
    def answer(operation: str, request: Json, nth: int) -> Error | Json | None:
        if operation == "GetQueueUrl" and nth == 0:
            return Error("AWS.SimpleQueueService.NonExistentQueue")
        if operation == "CreateQueue":
            return Error("QueueAlreadyExists")
        if operation == "GetQueueAttributes":
            return {"Attributes": {"VisibilityTimeout": "7", "MessageRetentionPeriod": "345600"}}
        return None

    with connected(answer) as (_, connection), caplog.at_level(logging.WARNING):
        connection.ensure([SPEC], create=True)
    assert "VisibilityTimeout is 7, not 30" in caplog.messages[0]
    assert "4 days, not 14" in caplog.messages[0]


def test_purge_waits_for_the_one_in_progress() -> None:
    with connected(once("PurgeQueue", Error("AWS.SimpleQueueService.PurgeQueueInProgress"))) as (wire, connection):
        connection.purge(["q"])
    assert len(wire.requests("PurgeQueue")) == 2


@pytest.mark.parametrize("code", ["ReceiptHandleIsInvalid", "AWS.SimpleQueueService.MessageNotInflight"])
def test_lost_deliveries_are_returned(code: str) -> None:
    def answer(operation: str, request: Json, nth: int) -> Json | None:
        return batch(request, {1: (code, True)}) if operation.endswith("Batch") else None

    with connected(answer) as (_, connection):
        handles = [handle(n) for n in "abc"]
        assert connection.extend(handles, 30) == [handles[1]]
        assert connection.complete([Completion(each) for each in handles]) == [handles[1]]


def test_extend_past_twelve_hours_asks_for_less_then_is_stale() -> None:
    def answer(operation: str, request: Json, nth: int) -> Error | None:
        if operation == "ChangeMessageVisibilityBatch" and any(
            entry["ReceiptHandle"] == "receipt-old" for entry in request["Entries"]
        ):
            text = "Value 60 for parameter VisibilityTimeout is invalid. Reason: Total VisibilityTimeout is beyond"
            return Error("InvalidParameterValue", text)
        return None

    with connected(answer) as (wire, connection):
        assert connection.extend([handle("young"), handle("old")], 60) == [handle("old")]
    asked = [
        [(entry["ReceiptHandle"], entry["VisibilityTimeout"]) for entry in request["Entries"]]
        for request in wire.requests("ChangeMessageVisibilityBatch")
    ]
    assert asked[-4:] == [
        [("receipt-young", 60)],
        [("receipt-old", 60)],
        [("receipt-old", 57)],
        [("receipt-old", 30)],
    ]


def test_deliveries_are_handled_ten_at_a_time_and_once_each() -> None:
    with connected(lambda *_: None) as (wire, connection):
        handles = [handle(str(n)) for n in range(23)]
        connection.extend([handles[0]._replace(receipt="older"), *handles], 30)
    assert [len(batch) for batch in receipts(wire, "ChangeMessageVisibilityBatch")] == [10, 10, 3]
    assert "older" not in itertools.chain(*receipts(wire, "ChangeMessageVisibilityBatch"))


def refusing(body: str, unless_bare: bool = False) -> Callable[[str, Json, int], Json | None]:
    def answer(asked: str, request: Json, nth: int) -> Json | None:
        if asked != "SendMessageBatch":
            return None
        bad = [
            place
            for place, entry in enumerate(request["Entries"])
            if entry["MessageBody"] == body and not (unless_bare and "MessageAttributes" not in entry)
        ]
        return batch(request, dict.fromkeys(bad, ("InvalidMessageContents", True)))

    return answer


def test_dead_letter_that_is_refused_keeps_its_original() -> None:
    with connected(refusing("a")) as (wire, connection), pytest.raises(BrokerError, match="q--dead"):
        letters = [DeadLetter(handle(n), "q--dead", n, n, failure="{}") for n in "ab"]
        connection.dead_letter(letters)
    assert receipts(wire) == [["receipt-b"]]


def test_dead_letter_whose_queue_has_no_room_for_the_reason_goes_without() -> None:
    with connected(refusing("a", unless_bare=True)) as (wire, connection):
        connection.dead_letter([DeadLetter(handle(n), "q--dead", n, n, failure="{}") for n in "ab"])
    assert bodies(wire.requests("SendMessageBatch")) == [["a", "b"], ["a"]]
    assert receipts(wire) == [["receipt-a", "receipt-b"]]


def test_dead_letter_with_attributes_that_are_refused_goes_without_rather_than_not_at_all() -> None:
    told = (Attribute("AWS.only", "String", "x"),)
    with connected(refusing("a", unless_bare=True)) as (wire, connection):
        connection.dead_letter([DeadLetter(handle(n), "q--dead", n, n, "{}", attributes=told) for n in "ab"])
    sent = wire.requests("SendMessageBatch")
    assert bodies(sent) == [["a", "b"], ["a"], ["a"]]
    assert [list(each["Entries"][0].get("MessageAttributes", ())) for each in sent] == [
        ["AWS.only", "sqspipes_mp.failure"],
        ["AWS.only"],
        [],
    ]
    assert receipts(wire) == [["receipt-a", "receipt-b"]]


def test_dead_letter_refused_once_for_what_it_is_is_not_sent_again_the_same() -> None:
    with connected(refusing("a")) as (wire, connection), pytest.raises(BrokerError, match="q--dead"):
        connection.dead_letter([DeadLetter(handle("a"), "q--dead", "a", "a", failure="{}")])
    assert bodies(wire.requests("SendMessageBatch")) == [["a"], ["a"]]


def test_closed_connection_says_so() -> None:
    with connected(lambda *_: None) as (_, connection):
        connection.close()
        with pytest.raises(BrokerError, match="closed"):
            connection.depth("q")
