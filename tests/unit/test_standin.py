"""SQS's rules, as the stand-in keeps them towards the real boto3; its faults; what its ledger tells."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import botocore.config
import botocore.exceptions
import botocore.session
import pytest
from botocore import UNSIGNED

from tests.standin import StandIn, standin

MIB = 1_048_576
Handles = list[str]


def connect(url: str, **config: Any) -> Any:
    session = botocore.session.Session()
    session.set_credentials("testing", "testing")
    config = {"retries": {"total_max_attempts": 1}, "parameter_validation": False, "read_timeout": 30, **config}
    return session.create_client(
        "sqs", region_name="us-east-1", endpoint_url=url, config=botocore.config.Config(**config)
    )


@contextlib.contextmanager
def served(**options: object) -> Iterator[tuple[StandIn, Any]]:
    with standin(**options) as server:
        client = connect(server.url)
        try:
            yield server, client
        finally:
            client.close()


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[StandIn, Any]]:
    with served() as both:
        yield both


@pytest.fixture
def sqs(both: tuple[StandIn, Any]) -> Iterator[StandIn]:
    yield both[0]
    both[0].resume()
    both[0].reset()
    both[0].faults(**{name: 0 for name in both[0].faults() if name != "only"}, only=())


@pytest.fixture
def client(sqs: StandIn, both: tuple[StandIn, Any]) -> Any:
    return both[1]


def new(client: Any, *, fifo: bool = False, **attributes: str) -> str:
    if fifo:
        attributes = {"FifoQueue": "true", **attributes}
    name = uuid.uuid4().hex + (".fifo" if fifo else "")
    return str(client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


def arn_of(client: Any, url: str) -> str:
    return str(client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"])


def send(client: Any, url: str, *bodies: str, **entry: Any) -> list[str]:
    if url.endswith(".fifo"):
        entry = {"MessageGroupId": "g", **entry}
    return [
        client.send_message(
            QueueUrl=url,
            MessageBody=body,
            **({"MessageDeduplicationId": uuid.uuid4().hex} if url.endswith(".fifo") else {}) | entry,
        )["MessageId"]
        for body in bodies
    ]


def receive(client: Any, url: str, count: int = 10, **asked: Any) -> list[dict[str, Any]]:
    asked = {"MessageSystemAttributeNames": ["All"], **asked}
    found: list[dict[str, Any]] = client.receive_message(QueueUrl=url, MaxNumberOfMessages=count, **asked).get(
        "Messages", []
    )
    return found


def bodies(client: Any, url: str, count: int = 10, **asked: Any) -> list[str]:
    return [message["Body"] for message in receive(client, url, count, **asked)]


def delete(client: Any, url: str, message: dict[str, Any]) -> None:
    client.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])


def extend(client: Any, url: str, message: dict[str, Any], seconds: int) -> None:
    client.change_message_visibility(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=seconds)


def batch(*texts: str, **more: Any) -> list[dict[str, Any]]:
    return [{"Id": str(position), "MessageBody": text, **more} for position, text in enumerate(texts)]


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call()
    return str(caught.value.response["Error"]["Code"])


def until_waiting(sqs: StandIn, polls: int) -> None:
    deadline = time.monotonic() + 20
    while sqs.ledger(messages=False)["waiting"] != polls:
        assert time.monotonic() < deadline


@contextlib.contextmanager
def polling(sqs: StandIn, client: Any, url: str, **asked: Any) -> Iterator[list[str]]:
    """Long poll in a thread; when the block ends, what was found is in the list."""
    found: list[str] = []
    before = sqs.ledger(messages=False)["waiting"]
    thread = threading.Thread(target=lambda: found.extend(bodies(client, url, WaitTimeSeconds=20, **asked)))
    thread.start()
    try:
        until_waiting(sqs, before + 1)
        yield found
    finally:
        thread.join(25)
        assert not thread.is_alive()


# Errors are those boto3 has classes for.


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("QueueDoesNotExist", lambda c, u: c.get_queue_url(QueueName="none")),
        ("QueueDoesNotExist", lambda c, u: send(c, u + "x", "body")),
        ("QueueNameExists", lambda c, u: c.create_queue(QueueName=name_of(u), Attributes={"DelaySeconds": "7"})),
        ("ReceiptHandleIsInvalid", lambda c, u: c.delete_message(QueueUrl=u, ReceiptHandle="nonsense")),
        ("InvalidMessageContents", lambda c, u: send(c, u, "a\0b")),
        ("InvalidMessageContents", lambda c, u: send(c, u, "\uffff")),
        ("EmptyBatchRequest", lambda c, u: c.send_message_batch(QueueUrl=u, Entries=[])),
        ("TooManyEntriesInBatchRequest", lambda c, u: c.send_message_batch(QueueUrl=u, Entries=batch(*"abcdefghijk"))),
        ("BatchEntryIdsNotDistinct", lambda c, u: c.send_message_batch(QueueUrl=u, Entries=batch("a") + batch("b"))),
        ("InvalidBatchEntryId", lambda c, u: c.send_message_batch(QueueUrl=u, Entries=batch("a", Id="no!"))),
        ("InvalidBatchEntryId", lambda c, u: c.send_message_batch(QueueUrl=u, Entries=batch("a", Id="i" * 81))),
        ("BatchRequestTooLong", lambda c, u: c.send_message_batch(QueueUrl=u, Entries=batch("a" * MIB, "b"))),
        ("InvalidAttributeName", lambda c, u: c.create_queue(QueueName="n", Attributes={"Colour": "red"})),
        ("InvalidAttributeName", lambda c, u: c.get_queue_attributes(QueueUrl=u, AttributeNames=["Colour"])),
        ("InvalidAttributeValue", lambda c, u: c.create_queue(QueueName="n", Attributes={"DelaySeconds": "901"})),
        ("UnsupportedOperation", lambda c, u: c.start_message_move_task(SourceArn="arn:aws:sqs:us-east-1:1:q")),
    ],
)
def test_error_has_the_class_boto3_models(client: Any, name: str, call: Callable[[Any, str], object]) -> None:
    with pytest.raises(getattr(client.exceptions, name)):
        call(client, new(client))


def test_purge_and_deletion_take_their_minute() -> None:
    with served(purge_window=60, delete_window=60) as (sqs, client):
        url = new(client)
        send(client, url, "before")
        client.purge_queue(QueueUrl=url)
        send(client, url, "lost to the purge")
        with pytest.raises(client.exceptions.PurgeQueueInProgress):
            client.purge_queue(QueueUrl=url)
        sqs.advance(61)
        assert bodies(client, url) == []
        client.purge_queue(QueueUrl=url)
        client.delete_queue(QueueUrl=url)
        with pytest.raises(client.exceptions.QueueDeletedRecently):
            client.create_queue(QueueName=name_of(url))
        sqs.advance(61)
        client.create_queue(QueueName=name_of(url))


def test_in_flight_limit_is_an_error_for_a_short_poll_and_silence_for_a_long_one() -> None:
    with served(in_flight=2) as (_, client):
        url, fifo = new(client), new(client, fifo=True)
        send(client, url, *"abc")
        assert len(bodies(client, url)) == 2
        with pytest.raises(client.exceptions.OverLimit):
            bodies(client, url)
        assert bodies(client, url, WaitTimeSeconds=1) == []
        send(client, fifo, *"abc")
        assert len(bodies(client, fifo)) == 2
        assert bodies(client, fifo) == []


# Limits: exactly at, and one over.


def attributes(count: int, value: str = "v") -> dict[str, Any]:
    return {f"n{number}": {"DataType": "String", "StringValue": value} for number in range(count)}


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"MessageBody": "x" * MIB}, {"MessageBody": "x" * (MIB + 1)}),
        ({"MessageBody": "é" * (MIB // 2)}, {"MessageBody": "é" * (MIB // 2) + "x"}),
        # Name, type and value count: 2 + 6 + 1 bytes.
        (
            {"MessageBody": "x" * (MIB - 9), "MessageAttributes": attributes(1)},
            {"MessageBody": "x" * (MIB - 8), "MessageAttributes": attributes(1)},
        ),
        ({"MessageAttributes": attributes(10)}, {"MessageAttributes": attributes(11)}),
        ({"MessageAttributes": attributes(1, " ")}, {"MessageAttributes": attributes(1, "")}),
        ({"MessageAttributes": {"a.b": attributes(1)["n0"]}}, {"MessageAttributes": {"a..b": attributes(1)["n0"]}}),
        ({"DelaySeconds": 900}, {"DelaySeconds": 901}),
        ({"MessageGroupId": "g" * 128}, {"MessageGroupId": "g" * 129}),
        ({"MessageBody": "\t\n\r \ud7ff\ue000\ufffd\U00010000"}, {"MessageDeduplicationId": "only on fifo"}),
        ({}, {"MessageBody": ""}),
    ],
)
def test_send_at_the_limit_and_one_over(sqs: StandIn, client: Any, good: dict[str, Any], bad: dict[str, Any]) -> None:
    url = new(client)
    client.send_message(**{"QueueUrl": url, "MessageBody": "x", **good})
    assert sqs.ledger()["violations"] == []
    code = code_of(lambda: client.send_message(**{"QueueUrl": url, "MessageBody": "x", **bad}))
    assert code in ("InvalidParameterValue", "MissingParameter")
    (violation,) = sqs.ledger()["violations"]
    assert (violation["operation"], violation["code"]) == ("SendMessage", code)
    assert sqs.ledger()["queues"][name_of(url)]["sent"] == 1


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"MessageGroupId": "g" * 128}, {"MessageGroupId": "g" * 129}),
        ({"MessageDeduplicationId": "~" * 128}, {"MessageDeduplicationId": "a b"}),
        ({"DelaySeconds": 0}, {"DelaySeconds": 1}),
        ({}, {"MessageGroupId": None}),
        ({}, {"MessageDeduplicationId": None}),
    ],
)
def test_fifo_send_at_the_limit_and_over(client: Any, good: dict[str, Any], bad: dict[str, Any]) -> None:
    url = new(client, fifo=True)
    entry = {"Id": "1", "MessageBody": "x", "MessageGroupId": "g", "MessageDeduplicationId": "d"}
    assert client.send_message_batch(QueueUrl=url, Entries=[entry | good])["Failed"] == []
    wrong = {name: value for name, value in (entry | bad).items() if value is not None}
    try:
        (failed,) = client.send_message_batch(QueueUrl=url, Entries=[wrong])["Failed"]
    except botocore.exceptions.ClientError as error:
        assert None in bad.values()
        failed = {"SenderFault": True, "Code": error.response["Error"]["Code"]}
    assert failed["SenderFault"] is True
    assert failed["Code"] in ("InvalidParameterValue", "MissingParameter")


@pytest.mark.parametrize(
    ("parameter", "good", "bad"),
    [("MaxNumberOfMessages", 10, 11), ("VisibilityTimeout", 43_200, 43_201), ("WaitTimeSeconds", 20, 21)],
)
def test_receive_at_the_limit_and_one_over(client: Any, parameter: str, good: int, bad: int) -> None:
    url = new(client)
    send(client, url, "x")
    assert client.receive_message(QueueUrl=url, **{parameter: good})["Messages"]
    assert code_of(lambda: client.receive_message(QueueUrl=url, **{parameter: bad})) == "InvalidParameterValue"


def test_queue_has_its_own_limit_of_size_and_names_have_80_characters(client: Any) -> None:
    url = new(client, MaximumMessageSize="1024")
    reply = client.send_message_batch(QueueUrl=url, Entries=batch("x" * 1024, "y" * 1025))
    assert [(failed["Id"], failed["Code"]) for failed in reply["Failed"]] == [("1", "InvalidParameterValue")]
    client.create_queue(QueueName="n" * 80)
    assert code_of(lambda: client.create_queue(QueueName="n" * 81)) == "InvalidParameterValue"
    assert code_of(lambda: client.create_queue(QueueName="a.fifo")) == "InvalidParameterValue"


def test_bad_characters_fail_their_entry_only(sqs: StandIn, client: Any) -> None:
    url = new(client)
    reply = client.send_message_batch(QueueUrl=url, Entries=batch("good", "b\x01d", "fine"))
    assert [(failed["Id"], failed["Code"], failed["SenderFault"]) for failed in reply["Failed"]] == [
        ("1", "InvalidMessageContents", True)
    ]
    assert bodies(client, url) == ["good", "fine"]
    assert "b\\u0001d" in sqs.ledger()["violations"][0]["request"]


def test_attributes_come_back_as_asked_with_the_digests_of_sqs(client: Any) -> None:
    given = {
        "General": {"DataType": "String", "StringValue": "Kenobi"},
        "Hello": {"DataType": "String", "StringValue": "There"},
        "Help.Me": {"DataType": "String", "StringValue": "Me"},
    }
    url = new(client, VisibilityTimeout="0")
    sent = client.send_message(QueueUrl=url, MessageBody="msg", MessageAttributes=given)
    # Digests that AWS itself gave for these values.
    assert sent["MD5OfMessageBody"] == "6e2baaf3b97dbeef01c0043275f9a0e7"
    assert sent["MD5OfMessageAttributes"] == "4c360f3fdafd970e05fae2f149d997f5"
    (some,) = receive(client, url, MessageAttributeNames=["Hel.*", "Hello"])
    assert (list(some["MessageAttributes"]), some["MD5OfMessageAttributes"]) == (
        ["Hello"],
        "a311262e065454b75da111d535b8dacd",
    )
    assert receive(client, url, MessageAttributeNames=["All"])[0]["MessageAttributes"] == given
    assert "MessageAttributes" not in receive(client, url)[0]


# Deliveries.


def test_expired_delivery_comes_again_with_another_receipt(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x")
    (first,) = receive(client, url)
    sqs.advance(29)
    assert receive(client, url) == []
    sqs.advance(2)
    (second,) = receive(client, url)
    assert second["Attributes"]["ApproximateReceiveCount"] == "2"
    assert second["ReceiptHandle"] != first["ReceiptHandle"]


def test_visibility_of_an_expired_delivery_cannot_be_changed(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x")
    (message,) = receive(client, url)
    sqs.advance(31)
    with pytest.raises(client.exceptions.MessageNotInflight):
        extend(client, url, message, 30)


def test_twelve_hours_count_from_the_receive(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x")
    (message,) = receive(client, url)
    extend(client, url, message, 43_100)
    sqs.advance(3600)
    entry = {"Id": "1", "ReceiptHandle": message["ReceiptHandle"], "VisibilityTimeout": 39_601}
    (failed,) = client.change_message_visibility_batch(QueueUrl=url, Entries=[entry])["Failed"]
    assert (failed["Code"], failed["SenderFault"]) == ("InvalidParameterValue", True)
    assert "43200" in failed["Message"]
    extend(client, url, message, 39_500)


def test_old_receipt_is_ignored_on_a_standard_queue(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x")
    (first,) = receive(client, url)
    extend(client, url, first, 0)
    (second,) = receive(client, url)
    delete(client, url, first)
    assert sqs.messages(name_of(url))[0]["state"] == "in_flight"
    delete(client, url, second)
    delete(client, url, second)
    assert [(m["state"], m["received"], m["deleted"]) for m in sqs.messages(name_of(url))] == [("gone", 2, 1)]


def test_expired_receipt_is_an_error_on_a_fifo_queue(sqs: StandIn, client: Any) -> None:
    url = new(client, fifo=True)
    send(client, url, "x")
    (message,) = receive(client, url)
    sqs.advance(31)
    assert code_of(lambda: delete(client, url, message)) == "InvalidParameterValue"
    entries = [{"Id": "1", "ReceiptHandle": message["ReceiptHandle"]}]
    (failed,) = client.delete_message_batch(QueueUrl=url, Entries=entries)["Failed"]
    assert (failed["Code"], failed["SenderFault"]) == ("ReceiptHandleIsInvalid", True)


@pytest.mark.parametrize("fifo", [False, True])
def test_received_too_often_moves_to_the_dead_letter_queue(sqs: StandIn, client: Any, fifo: bool) -> None:
    dead = new(client, fifo=fifo)
    policy = json.dumps({"deadLetterTargetArn": arn_of(client, dead), "maxReceiveCount": 2})
    url = new(client, fifo=fifo, RedrivePolicy=policy)
    (sent,) = send(client, url, "poison")
    for _ in range(2):
        extend(client, url, receive(client, url)[0], 0)
    assert receive(client, url) == []
    (letter,) = receive(client, dead)
    assert letter["MessageId"] == sent
    assert letter["Attributes"]["DeadLetterQueueSourceArn"] == arn_of(client, url)
    assert letter["Attributes"]["ApproximateReceiveCount"] == "3"
    if fifo:
        assert letter["Attributes"]["MessageDeduplicationId"] == sent
    assert sqs.messages(name_of(dead))[0]["redriven"] == 1
    assert client.list_dead_letter_source_queues(QueueUrl=dead)["queueUrls"] == [url]


def test_redrive_needs_a_queue_of_the_same_type(client: Any) -> None:
    policy = json.dumps({"deadLetterTargetArn": arn_of(client, new(client)), "maxReceiveCount": 2})
    assert code_of(lambda: new(client, fifo=True, RedrivePolicy=policy)) == "InvalidParameterValue"


# FIFO.


def test_group_comes_in_order_and_blocks_while_in_flight(client: Any) -> None:
    url = new(client, fifo=True)
    send(client, url, "a1", "a2", "a3", MessageGroupId="a")
    send(client, url, "b1", MessageGroupId="b")
    first, second = receive(client, url, 2)
    assert [first["Body"], second["Body"]] == ["a1", "a2"]
    assert bodies(client, url) == ["b1"]
    extend(client, url, second, 0)
    assert receive(client, url) == []
    extend(client, url, first, 0)
    assert bodies(client, url) == ["a1", "a2", "a3"]


@pytest.mark.parametrize("scope", ["queue", "messageGroup"])
def test_duplicates_are_dropped_for_five_minutes(sqs: StandIn, client: Any, scope: str) -> None:
    url = new(client, fifo=True, DeduplicationScope=scope)
    (sent,) = send(client, url, "first", MessageDeduplicationId="d")
    delete(client, url, receive(client, url)[0])
    sqs.advance(298)
    assert send(client, url, "again", MessageDeduplicationId="d") == [sent]
    send(client, url, "other group", MessageDeduplicationId="d", MessageGroupId="h")
    assert bodies(client, url) == ([] if scope == "queue" else ["other group"])
    sqs.advance(3)
    send(client, url, "after", MessageDeduplicationId="d")
    assert bodies(client, url) == ["after"]
    assert sqs.ledger()["queues"][name_of(url)]["duplicates_dropped"] == (2 if scope == "queue" else 1)


def test_content_is_the_deduplication_id_where_the_queue_says_so(client: Any) -> None:
    url = new(client, fifo=True, ContentBasedDeduplication="true")
    entries = batch("same", "same", "other", MessageGroupId="g")
    assert client.send_message_batch(QueueUrl=url, Entries=entries)["Failed"] == []
    assert bodies(client, url) == ["same", "other"]


def test_receive_attempt_is_repeated_until_its_messages_change(sqs: StandIn, client: Any) -> None:
    url = new(client, fifo=True)
    send(client, url, "a", "b")
    first = receive(client, url, ReceiveRequestAttemptId="try")
    sqs.advance(20)
    assert receive(client, url, ReceiveRequestAttemptId="try") == first
    sqs.advance(20)
    assert receive(client, url, ReceiveRequestAttemptId="other") == []
    extend(client, url, first[1], 60)
    assert receive(client, url, ReceiveRequestAttemptId="try") == []


# Long polls.


def test_long_poll_wakes_when_a_message_is_sent(sqs: StandIn, client: Any) -> None:
    url = new(client)
    started = time.monotonic()
    with polling(sqs, client, url) as found:
        send(client, url, "x")
    assert found == ["x"]
    assert time.monotonic() - started < 15


def test_long_poll_wakes_when_a_group_is_free_again(sqs: StandIn, client: Any) -> None:
    url = new(client, fifo=True)
    send(client, url, "1", "2")
    (first,) = receive(client, url, 1)
    with polling(sqs, client, url) as found:
        delete(client, url, first)
    assert found == ["2"]


def test_long_poll_wakes_when_a_delivery_is_given_back(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x")
    (message,) = receive(client, url)
    with polling(sqs, client, url) as found:
        extend(client, url, message, 0)
    assert found == ["x"]


def test_long_poll_wakes_when_a_dead_letter_arrives(sqs: StandIn, client: Any) -> None:
    dead = new(client)
    policy = json.dumps({"deadLetterTargetArn": arn_of(client, dead), "maxReceiveCount": 1})
    url = new(client, RedrivePolicy=policy)
    send(client, url, "x")
    extend(client, url, receive(client, url)[0], 0)
    with polling(sqs, client, dead) as found:
        assert receive(client, url) == []
    assert found == ["x"]


@pytest.mark.parametrize("hidden", ["delayed", "in flight"])
def test_long_poll_wakes_by_itself_when_a_message_is_due(client: Any, hidden: str) -> None:
    url = new(client)
    send(client, url, "x", DelaySeconds=int(hidden == "delayed"))
    receive(client, url, VisibilityTimeout=1)
    started = time.monotonic()
    assert bodies(client, url, WaitTimeSeconds=20) == ["x"]
    assert time.monotonic() - started < 10


def test_long_poll_ends_when_its_queue_is_deleted(sqs: StandIn, client: Any) -> None:
    url, ended = new(client), []

    def poll() -> None:
        ended.append(code_of(lambda: receive(client, url, WaitTimeSeconds=20)))

    thread = threading.Thread(target=poll)
    thread.start()
    until_waiting(sqs, 1)
    client.delete_queue(QueueUrl=url)
    thread.join(20)
    assert ended == ["AWS.SimpleQueueService.NonExistentQueue"]


@pytest.mark.parametrize("ghosts", [0, 1])
def test_long_poll_of_a_client_that_left_takes_messages_only_as_a_ghost(ghosts: int) -> None:
    with served(ghost_polls=ghosts) as (sqs, client):
        url = new(client)
        leaving = socket.create_connection(("127.0.0.1", int(sqs.url.rpartition(":")[2])))
        asked = json.dumps({"QueueUrl": url, "WaitTimeSeconds": 20}).encode()
        head = "POST / HTTP/1.1\r\nX-Amz-Target: AmazonSQS.ReceiveMessage\r\nAuthorization: a\r\n"
        leaving.sendall(f"{head}Content-Length: {len(asked)}\r\n\r\n".encode() + asked)
        until_waiting(sqs, 1)
        leaving.close()
        until_waiting(sqs, ghosts)
        send(client, url, "x")
        assert bodies(client, url) == ([] if ghosts else ["x"])


# Queues.


def test_queues_are_listed_by_pages_and_prefix(client: Any) -> None:
    urls = [client.create_queue(QueueName=f"p-{number}")["QueueUrl"] for number in range(5)]
    client.create_queue(QueueName="other")
    first = client.list_queues(QueueNamePrefix="p-", MaxResults=3)
    second = client.list_queues(QueueNamePrefix="p-", MaxResults=3, NextToken=first["NextToken"])
    assert first["QueueUrls"] + second["QueueUrls"] == urls
    assert "NextToken" not in second
    assert "QueueUrls" not in client.list_queues(QueueNamePrefix="none")


def test_attributes_and_tags_are_kept(client: Any) -> None:
    url = new(client, VisibilityTimeout="7")
    client.set_queue_attributes(QueueUrl=url, Attributes={"DelaySeconds": "9"})
    found = client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    assert (found["VisibilityTimeout"], found["DelaySeconds"], found["MaximumMessageSize"]) == ("7", "9", str(MIB))
    client.tag_queue(QueueUrl=url, Tags={"a": "1", "b": "2"})
    client.untag_queue(QueueUrl=url, TagKeys=["a"])
    assert client.list_queue_tags(QueueUrl=url)["Tags"] == {"b": "2"}
    send(client, url, "x")
    counts = client.get_queue_attributes(QueueUrl=url, AttributeNames=["ApproximateNumberOfMessagesDelayed"])
    assert counts["Attributes"] == {"ApproximateNumberOfMessagesDelayed": "1"}


def test_purge_takes_everything(sqs: StandIn, client: Any) -> None:
    for url in (new(client), new(client, fifo=True)):
        send(client, url, "1", "2")
        (held,) = receive(client, url, 1)
        client.purge_queue(QueueUrl=url)
        assert sqs.ledger()["queues"][name_of(url)]["purged"] == 2
        sqs.advance(60)
        send(client, url, "new")
        assert bodies(client, url) == ["new"]
        with pytest.raises(botocore.exceptions.ClientError):
            extend(client, url, held, 30)


# Faults.


def outcomes(client: Any, url: str, times: int = 60) -> list[str]:
    found = []
    for _ in range(times):
        try:
            send(client, url, "x")
        except botocore.exceptions.ClientError as error:
            found.append(error.response["Error"]["Code"])
        except botocore.exceptions.ConnectionClosedError:
            found.append("reset")
        else:
            found.append("")
    return found


def test_throttling_and_server_errors_come_in_their_varieties(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.faults(throttle=0.3, error=0.3, only=["SendMessage"])
    found = outcomes(client, url)
    assert set(found) == {"ThrottlingException", "RequestThrottled", "InternalFailure", "ServiceUnavailable", ""}
    assert sqs.ledger()["queues"][name_of(url)]["sent"] == found.count("")
    assert sum(sqs.ledger()["faults"].values()) == 60 - found.count("")


def test_same_seed_same_faults() -> None:
    seen = []
    for seed in (1, 1, 2):
        with served(seed=seed, throttle=0.2, reset_before=0.2, only=["SendMessage"]) as (_, client):
            seen.append(outcomes(client, new(client)))
    assert seen[0] == seen[1] != seen[2]


def test_reset_before_does_nothing_and_a_lost_reply_means_done(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.plan("SendMessage", "reset_before")
    sqs.plan("SendMessage", "lost_reply")
    assert outcomes(client, url, 3) == ["reset", "reset", ""]
    assert sqs.ledger()["queues"][name_of(url)]["sent"] == 2
    assert sqs.ledger()["faults"] == {"reset_before": 1, "lost_reply": 1}


def test_lost_reply_of_a_receive_leaves_its_messages_in_flight(sqs: StandIn, client: Any) -> None:
    url, fifo = new(client), new(client, fifo=True)
    for each in (url, fifo):
        send(client, each, "x")
        sqs.plan("ReceiveMessage", "lost_reply")
        with pytest.raises(botocore.exceptions.ConnectionClosedError):
            receive(client, each, **({"ReceiveRequestAttemptId": "try"} if each == fifo else {}))
    assert bodies(client, url) == []
    assert bodies(client, fifo, ReceiveRequestAttemptId="try") == ["x"]


def test_planned_entries_of_a_batch_fail_undone(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.plan("SendMessageBatch", "partial", entries=[0, 2])
    reply = client.send_message_batch(QueueUrl=url, Entries=batch(*"abc"))
    assert [(f["Id"], f["Code"], f["SenderFault"]) for f in reply["Failed"]] == [
        ("0", "InternalError", False),
        ("2", "InternalError", False),
    ]
    messages = receive(client, url)
    assert [message["Body"] for message in messages] == ["b"]
    sqs.plan("DeleteMessageBatch", "partial")
    entries = [{"Id": "1", "ReceiptHandle": messages[0]["ReceiptHandle"]}]
    assert len(client.delete_message_batch(QueueUrl=url, Entries=entries)["Failed"]) == 1
    assert client.delete_message_batch(QueueUrl=url, Entries=entries)["Failed"] == []


def test_some_entries_fail_by_chance(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.faults(partial=0.3)
    replies = [client.send_message_batch(QueueUrl=url, Entries=batch(*"abcdefghij")) for _ in range(10)]
    failed = sum(len(reply["Failed"]) for reply in replies)
    assert 5 < failed < 60
    assert sqs.ledger()["queues"][name_of(url)]["sent"] == 100 - failed


def test_duplicates_are_delivered_twice_or_after_their_delete(sqs: StandIn, client: Any) -> None:
    url, fifo = new(client), new(client, fifo=True)
    send(client, url, *map(str, range(10)))
    send(client, fifo, "once")
    sqs.faults(duplicate=1)
    first = receive(client, url)
    assert len(first) == 10
    sqs.faults(duplicate=0)
    at_once = bodies(client, url)
    for message in first:
        delete(client, url, message)
    after = bodies(client, url)
    assert sorted([*at_once, *after], key=int) == [str(number) for number in range(10)]
    assert at_once
    assert after
    assert sqs.ledger()["queues"][name_of(url)]["duplicates_delivered"] == 10
    (message,) = receive(client, fifo)
    delete(client, fifo, message)
    assert receive(client, fifo) == []


def test_short_poll_may_miss_and_a_slow_reply_is_whole(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x" * 1000)
    sqs.faults(miss=1)
    assert bodies(client, url) == []
    sqs.plan("ReceiveMessage", "slow")
    started = time.monotonic()
    assert bodies(client, url, WaitTimeSeconds=1) == ["x" * 1000]
    assert time.monotonic() - started > 0.15


def test_latency_is_waited(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.faults(latency_ms=150, jitter_ms=1)
    started = time.monotonic()
    send(client, url, "x")
    assert time.monotonic() - started >= 0.15


def test_pause_holds_requests_until_resume(sqs: StandIn, client: Any) -> None:
    url, hasty = new(client), connect(sqs.url, read_timeout=0.2)
    sqs.pause()
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        send(hasty, url, "kept")
    hasty.close()
    assert sqs.ledger()["held"] == 1
    assert sqs.ledger()["queues"][name_of(url)]["sent"] == 0
    sqs.resume()
    assert bodies(client, url) == ["kept"]


def test_shuffle_hands_out_everything_in_another_order() -> None:
    with served(shuffle=20) as (_, client):
        url = new(client)
        sent = [str(number) for number in range(30)]
        send(client, url, *sent)
        found = [body for _ in range(3) for body in bodies(client, url)]
        assert found != sent
        assert sorted(found, key=int) == sent


def test_unknown_faults_are_refused(sqs: StandIn) -> None:
    with pytest.raises(ValueError, match="typhoon"):
        sqs.faults(typhoon=1)
    with pytest.raises(ValueError, match="typhoon"):
        sqs.plan("SendMessage", "typhoon")


# Credentials, the ledger, the process.


def test_credentials_are_asked_for_and_may_expire(sqs: StandIn, client: Any) -> None:
    unsigned = connect(sqs.url, signature_version=UNSIGNED)
    assert code_of(unsigned.list_queues) == "MissingAuthenticationToken"
    unsigned.close()
    sqs.keys(key="another")
    assert code_of(client.list_queues) == "InvalidClientTokenId"
    sqs.keys(key="testing", expire=["testing"])
    assert code_of(client.list_queues) == "ExpiredToken"
    sqs.keys(key="", renew=["testing"])
    client.list_queues()


def test_ledger_counts_requests_and_bytes(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x" * 10_000)
    receive(client, url)
    ledger = sqs.ledger()
    assert ledger["requests"]["SendMessage"]["requests"] == 1
    assert 10_000 < ledger["requests"]["SendMessage"]["bytes_in"] < 12_000
    assert 10_000 < ledger["requests"]["ReceiveMessage"]["bytes_out"] < 12_000
    assert ledger["cpu_seconds"] > 0
    sqs.reset()
    assert sqs.ledger()["requests"] == sqs.ledger()["queues"] == {}


def test_process_ends_with_its_standard_input() -> None:
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.standin", "--latency-ms", "5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=here,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert int(server.stdout.readline()) > 0
        server.stdin.close()
        assert server.wait(20) == 0
