"""SQS's errors and limits, as the stand-in keeps them towards the real boto3."""

from collections.abc import Callable
from typing import Any

import botocore.exceptions
import pytest

from standin import StandIn
from standin.asking import batch, bodies, code_of, extend, name_of, new, receive, send, served

MIB = 1_048_576


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
    (some,) = receive(client, url, MessageAttributeNames=["Hello", "None"])
    assert some["MessageAttributes"] == {"Hello": given["Hello"]}
    assert some["MD5OfMessageAttributes"] == "a311262e065454b75da111d535b8dacd"
    (some,) = receive(client, url, MessageAttributeNames=["Hel.*"])
    assert some["MD5OfMessageAttributes"] == "83fee93c1bcd8b9a5a923ffacdc636c7"
    assert receive(client, url, MessageAttributeNames=["All"])[0]["MessageAttributes"] == given
    assert "MessageAttributes" not in receive(client, url)[0]


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
