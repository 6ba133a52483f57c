"""Replies of another shape than SQS's: faults of the server with its address, tried again."""

import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sqspipes_mp import SQS
from sqspipes_mp.brokers.base import Completion, Handle, Output, QueueSpec
from sqspipes_mp.brokers.sqs.connection import SqsConnection
from sqspipes_mp.errors import BrokerError

MESSAGE = {"MessageId": "m", "ReceiptHandle": "r", "Body": "b"}
DEEP = "[" * 100_000


class Server:
    """Answers each request with the next of ``replies``; the last one stays."""

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.lengths: list[str] = []
        self.asked = 0

    def next(self) -> bytes:
        self.asked += 1
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return (reply if isinstance(reply, str) else json.dumps(reply)).encode()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, str]]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = server.next()
            self.send_response(200)
            self.send_header("Content-Length", server.lengths.pop() if server.lengths else str(len(body)))
            self.end_headers()
            # The fast path hangs up on what is too long for it.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield server, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(params=[True, False], ids=["lean", "boto3"])
def connection(
    served: tuple[Server, str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SqsConnection]:
    monkeypatch.setattr("sqspipes_mp.brokers.sqs.calls.retry_delay", lambda failures: 0.0)
    broker = SQS("us-east-1", endpoint_url=served[1], access_key="a", secret_key="b", lean=request.param)
    with contextlib.closing(broker.open()) as connection:
        connection._queues._urls["q"] = f"{served[1]}/1/q"
        yield connection
        assert (connection._calls._lean is not None) is request.param


@pytest.mark.parametrize(
    "wrong",
    [
        {"Messages": "none"},
        {"Messages": [5]},
        {"Messages": {"a": 1}},
        {"Messages": [{**MESSAGE, "Body": 5}]},
        {"Messages": [{**MESSAGE, "ReceiptHandle": None}]},
        {"Messages": [{"Body": "b"}]},
        {"Messages": [{**MESSAGE, "Attributes": {"ApproximateReceiveCount": "many"}}]},
        {"Messages": [{**MESSAGE, "MessageAttributes": 5}]},
        f'{{"Messages": {DEEP}',
    ],
    ids=lambda wrong: str(wrong)[:60],
)
def test_a_receive_of_another_shape_is_tried_again(
    served: tuple[Server, str], connection: SqsConnection, wrong: object, caplog: pytest.LogCaptureFixture
) -> None:
    server, url = served
    server.replies = [wrong, {"Messages": [MESSAGE]}]
    with caplog.at_level(logging.WARNING, "sqspipes_mp"):
        assert [found.body for found in connection.receive(["q"], 10, 0, 30)] == ["b"]
    [told] = [text for text in caplog.messages if "trying again" in text]
    assert url in told
    assert "MalformedReply" in told or "ResponseParserError" in told


def test_null_is_nothing(served: tuple[Server, str], connection: SqsConnection) -> None:
    served[0].replies = [{"Messages": None}]
    assert connection.receive(["q"], 10, 0, 30) == []


def test_a_message_that_is_twice_in_one_reply_runs_once(served: tuple[Server, str], connection: SqsConnection) -> None:
    served[0].replies = [{"Messages": [MESSAGE, {**MESSAGE, "MessageId": "n"}, {**MESSAGE, "ReceiptHandle": "later"}]}]
    handles = [each.handle for each in connection.receive(["q"], 10, 0, 30)]
    assert handles == [Handle("q", "later", "m"), Handle("q", "r", "n")]


def test_ids_that_were_not_asked_about_are_passed_over_and_missing_ones_are_tried_again(
    served: tuple[Server, str], connection: SqsConnection
) -> None:
    told = [{"Id": "0"}, {"Id": "0"}, {"Id": "7"}]
    served[0].replies = [{"Successful": told, "Failed": [{"Id": "9"}]}, {"Successful": [{"Id": "0"}], "Failed": None}]
    asked = served[0].asked
    assert connection.complete([Completion(Handle("q", f"r{n}", f"{n}")) for n in range(2)]) == []
    assert served[0].asked - asked == 2


def test_sends_and_counts_of_another_shape_are_tried_again(
    served: tuple[Server, str], connection: SqsConnection
) -> None:
    served[0].replies = [{"Successful": 5}, {"Successful": ["0"]}, {"Successful": [{"Id": "0"}]}]
    connection.complete([Completion(None, (Output("q", "b", "hop"),))])
    served[0].replies = [{"Attributes": {"ApproximateNumberOfMessages": "some"}}, {"Attributes": None}]
    assert connection.depth("q").empty


def test_a_server_that_is_none_of_sqs_is_an_error_at_boot(
    served: tuple[Server, str], connection: SqsConnection
) -> None:
    served[0].replies = [{"QueueUrl": 5}]
    with pytest.raises(BrokerError, match="MalformedReply") as caught:
        connection.ensure([QueueSpec(name="other", fifo=False, visibility=30)], create=True)
    assert served[1] in str(caught.value)


def test_a_length_of_thousands_of_digits_is_a_fault_of_the_server(
    served: tuple[Server, str], connection: SqsConnection
) -> None:
    if connection._calls._lean is None:
        pytest.skip("urllib3 takes it for no length")
    served[0].replies = [{"Messages": [MESSAGE]}]
    served[0].lengths = ["9" * 5000]
    assert len(connection.receive(["q"], 10, 0, 30)) == 1


def test_a_reply_that_is_too_long_for_the_fast_path_does_not_end_it(
    served: tuple[Server, str], connection: SqsConnection
) -> None:
    served[0].replies = [{"Messages": [MESSAGE], "more": "x" * (17 << 20)}] * 2 + [{"Messages": [MESSAGE]}]
    assert len(connection.receive(["q"], 10, 0, 30)) == 1


@pytest.mark.parametrize(("count", "ahead", "warns"), [(3, True, True), (3, False, False), (50, True, False)])
def test_the_redrive_of_a_queue_of_others_that_counts_unstarted_receives_is_told(
    served: tuple[Server, str],
    connection: SqsConnection,
    caplog: pytest.LogCaptureFixture,
    count: int,
    ahead: bool,
    warns: bool,
) -> None:
    policy = json.dumps({"deadLetterTargetArn": "arn:dead", "maxReceiveCount": count})
    served[0].replies = [{"Attributes": {"RedrivePolicy": policy}}]
    with caplog.at_level(logging.WARNING, "sqspipes_mp"):
        connection.ensure([QueueSpec(name="q", fifo=False, visibility=30, owned=False, ahead=ahead)], create=True)
    assert any("prefetch=0" in text and "arn:dead" in text for text in caplog.messages) is warns
