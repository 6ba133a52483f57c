"""How the stand-in delivers: receipts, visibility, dead letters, FIFO groups, long polls."""

import json
import socket
import threading
import time
from typing import Any

import pytest

from standin import StandIn
from standin.asking import (
    arn_of,
    batch,
    bodies,
    code_of,
    delete,
    extend,
    name_of,
    new,
    polling,
    receive,
    send,
    served,
    until_waiting,
)

# Deliveries.


def test_expired_delivery_comes_again_with_another_receipt(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x")
    (first,) = receive(client, url)
    sqs.advance(20)
    assert receive(client, url) == []
    sqs.advance(11)
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


def test_visibility_of_an_expired_delivery_may_be_changed_where_asked_for() -> None:
    with served(lenient_change=1) as (sqs, client):
        url = new(client)
        send(client, url, "x")
        (message,) = receive(client, url)
        sqs.advance(31)
        extend(client, url, message, 30)
        assert receive(client, url) == []
        sqs.advance(31)
        assert bodies(client, url) == ["x"]
        assert receive(client, url) == []


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
    sqs.advance(275)
    assert send(client, url, "again", MessageDeduplicationId="d") == [sent]
    send(client, url, "other group", MessageDeduplicationId="d", MessageGroupId="h")
    assert bodies(client, url) == ([] if scope == "queue" else ["other group"])
    sqs.advance(26)
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
    assert time.monotonic() - started < 18


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
