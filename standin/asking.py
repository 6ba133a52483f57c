"""Short functions for calls to the stand-in through the real boto3, for its tests."""

import contextlib
import functools
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import botocore.config
import botocore.exceptions
import botocore.session
import pytest

from standin.client import StandIn, standin


@functools.cache
def _session() -> botocore.session.Session:
    session = botocore.session.Session()
    session.set_credentials("testing", "testing")
    return session


def connect(url: str, **config: Any) -> Any:
    """Return a client that tries once and validates nothing, so that the stand-in gets the request of the test."""
    config = {"retries": {"total_max_attempts": 1}, "parameter_validation": False, "read_timeout": 30, **config}
    return _session().create_client(
        "sqs", region_name="us-east-1", endpoint_url=url, config=botocore.config.Config(**config)
    )


@contextlib.contextmanager
def served(**options: object) -> Iterator[tuple[StandIn, Any]]:
    """Start a stand-in of the test's own; yield it and a client."""
    with standin(**options) as server:
        client = connect(server.url)
        try:
            yield server, client
        finally:
            client.close()


def new(client: Any, *, fifo: bool = False, **attributes: str) -> str:
    """Create a queue with a unique name; return its URL."""
    if fifo:
        attributes = {"FifoQueue": "true", **attributes}
    name = uuid.uuid4().hex + (".fifo" if fifo else "")
    return str(client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])


def name_of(url: str) -> str:
    """Return the queue's name from its URL."""
    return url.rpartition("/")[2]


def arn_of(client: Any, url: str) -> str:
    """Return a queue's ARN."""
    return str(client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"])


def send(client: Any, url: str, *bodies: str, **entry: Any) -> list[str]:
    """Send bodies one by one; return their message ids."""
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
    """Receive up to ``count`` messages with their system attributes. A parameter that is None is left out."""
    asked = {
        "MessageSystemAttributeNames": ["All"],
        **{name: value for name, value in asked.items() if value is not None},
    }
    found: list[dict[str, Any]] = client.receive_message(QueueUrl=url, MaxNumberOfMessages=count, **asked).get(
        "Messages", []
    )
    return found


def bodies(client: Any, url: str, count: int = 10, **asked: Any) -> list[str]:
    """Receive messages; return their bodies."""
    return [message["Body"] for message in receive(client, url, count, **asked)]


def delete(client: Any, url: str, message: dict[str, Any]) -> None:
    """Delete a message by its receipt."""
    client.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])


def extend(client: Any, url: str, message: dict[str, Any], seconds: int) -> None:
    """Change a delivery's visibility."""
    client.change_message_visibility(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=seconds)


def batch(*texts: str, **more: Any) -> list[dict[str, Any]]:
    """Return a batch's entries, numbered from 0."""
    return [{"Id": str(position), "MessageBody": text, **more} for position, text in enumerate(texts)]


def code_of(call: Callable[[], object]) -> str:
    """Return the code of the error that a call raises; fail where it raises none."""
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call()
    return str(caught.value.response["Error"]["Code"])


def until_waiting(sqs: StandIn, polls: int) -> None:
    """Return once exactly ``polls`` long polls wait; asks the ledger again and again."""
    deadline = time.monotonic() + 20
    while sqs.ledger(messages=False)["waiting"] != polls:
        assert time.monotonic() < deadline


@contextlib.contextmanager
def polling(sqs: StandIn, client: Any, url: str, **asked: Any) -> Iterator[list[str]]:
    """Long poll in a thread; the yielded list has the bodies once the block has ended."""
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
