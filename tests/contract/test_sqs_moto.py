"""What only SQS has, checked against moto with a client of the test's own."""

import json
import logging
import uuid
from dataclasses import replace
from typing import Any

import botocore.session
import pytest

from sqspipes_mp.brokers.base import Completion, DeadLetter, Output, QueueSpec
from sqspipes_mp.brokers.sqs import SQS
from sqspipes_mp.errors import BrokerError, QueueMissing
from sqspipes_mp.messages.limits import FAILURE_ATTRIBUTE
from tests.contract.conftest import Bench, dead_of


@pytest.fixture
def client(moto_url: str) -> Any:
    session = botocore.session.Session()
    client = session.create_client("sqs", region_name="us-east-1", endpoint_url=moto_url)
    yield client
    client.close()


def url_of(client: Any, queue: str) -> str:
    return str(client.get_queue_url(QueueName=queue)["QueueUrl"])


def test_new_queue_has_our_attributes(moto: Bench, client: Any, fifo: bool) -> None:
    queue = moto.queue(fifo=fifo, visibility=61.5, dead=True)
    made = client.get_queue_attributes(QueueUrl=url_of(client, queue), AttributeNames=["All"])["Attributes"]
    assert made["VisibilityTimeout"] == "62"
    assert made["MessageRetentionPeriod"] == "1209600"
    assert made["ReceiveMessageWaitTimeSeconds"] == "20"
    redrive = json.loads(made["RedrivePolicy"])
    assert redrive["deadLetterTargetArn"].endswith(f":{dead_of(queue)}")
    assert int(redrive["maxReceiveCount"]) == 1000
    if fifo:
        assert (made["FifoThroughputLimit"], made["DeduplicationScope"]) == ("perMessageGroupId", "messageGroup")


def test_retention_key_and_tags_are_used(moto_url: str, client: Any) -> None:
    broker = SQS(
        "us-east-1",
        endpoint_url=moto_url,
        access_key="testing",
        secret_key="testing",
        retention=3600,
        kms_key="alias/mine",
        tags={"team": "search"},
    )
    queue = f"t-{uuid.uuid4().hex}"
    connection = broker.open()
    connection.ensure([QueueSpec(name=queue, fifo=False, visibility=30)], create=True)
    made = client.get_queue_attributes(QueueUrl=url_of(client, queue), AttributeNames=["All"])["Attributes"]
    assert (made["MessageRetentionPeriod"], made["KmsMasterKeyId"]) == ("3600", "alias/mine")
    assert client.list_queue_tags(QueueUrl=url_of(client, queue))["Tags"] == {"team": "search"}
    connection.delete([queue])
    connection.close()


def test_shorter_retention_is_warned_of_in_days(moto: Bench, client: Any, caplog: pytest.LogCaptureFixture) -> None:
    queue = f"t-{uuid.uuid4().hex}"
    client.create_queue(QueueName=queue)
    moto.made.append(queue)
    with caplog.at_level(logging.WARNING):
        moto.connection.ensure([QueueSpec(name=queue, fifo=False, visibility=30)], create=True)
    assert len(caplog.messages) == 1
    assert "4 days, not 14" in caplog.messages[0]
    assert "ReceiveMessageWaitTimeSeconds is 0, not 20" in caplog.messages[0]


def test_a_queue_that_differs_may_be_another_pipelines(moto: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """SQS does not say whose a queue is: the pair that joins to the same name is named as the likely cause."""
    end = uuid.uuid4().hex
    moto.made.append(f"app-x-{end}")
    spec = QueueSpec(name=f"app-x-{end}", fifo=False, visibility=30, domain="app")
    moto.connection.ensure([spec], create=True)
    with caplog.at_level(logging.WARNING):
        moto.connection.ensure([replace(spec, visibility=60, domain="app-x")], create=True)
        moto.connection.check_owners([replace(spec, domain="app-x")])
    (message,) = caplog.messages
    assert "VisibilityTimeout is 30, not 60" in message
    assert "If it is another pipeline's, rename this one's domain ('app-x') or task" in message
    assert moto.connection.strays("app", ()) == []


def test_failure_travels_as_an_attribute(moto: Bench, client: Any, fifo: bool) -> None:
    queue = moto.queue(fifo=fifo, dead=True)
    moto.send(queue, "poison")
    (message,) = moto.receive(queue)
    moto.connection.dead_letter(
        [DeadLetter(message.handle, dead_of(queue), "poison", "hop", failure='{"error": "ValueError"}', group="g")]
    )
    (dead,) = client.receive_message(
        QueueUrl=url_of(client, dead_of(queue)),
        MessageAttributeNames=["All"],
        MessageSystemAttributeNames=["All"],
    )["Messages"]
    attribute = dead["MessageAttributes"][FAILURE_ATTRIBUTE]
    assert (attribute["DataType"], attribute["StringValue"]) == ("String", '{"error": "ValueError"}')
    if fifo:
        assert dead["Attributes"]["MessageGroupId"] == "g"
        assert len(dead["Attributes"]["MessageDeduplicationId"]) == 64


def test_on_sent_comes_between_sending_and_deleting(moto: Bench) -> None:
    source, sink = moto.queue(), moto.queue()
    moto.send(source, "1", "2")
    messages = moto.receive(source, count=2)
    seen: list[tuple[int, int]] = []

    def on_sent(completion: Completion) -> None:
        seen.append((moto.connection.depth(source).in_flight, moto.connection.depth(sink).visible))

    moto.connection.complete(
        [Completion(message.handle, (Output(sink, "x", message.body),)) for message in messages], on_sent
    )
    assert seen == [(2, 2), (2, 2)]
    assert moto.connection.depth(source).empty


def test_queue_of_others_by_url_and_arn(moto: Bench, client: Any) -> None:
    queue = moto.queue()
    url = url_of(client, queue)
    arn = client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    specs = [QueueSpec(name=name, fifo=False, visibility=30, owned=False) for name in (url, arn)]
    moto.connection.ensure(specs, create=True)
    moto.send(queue, "1", "2")
    for name in (url, arn):
        (message,) = moto.receive(name)
        assert message.handle.queue == name
        assert moto.finish([message]) == []
    assert moto.connection.depth(arn).empty


def test_missing_queue_of_others_by_url(moto: Bench, moto_url: str) -> None:
    url = f"{moto_url}/123456789012/t-{uuid.uuid4().hex}"
    with pytest.raises(QueueMissing, match="of others"):
        moto.connection.ensure([QueueSpec(name=url, fifo=False, visibility=30, owned=False)], create=True)


@pytest.mark.parametrize(
    "name", ["arn:aws:sqs:eu-west-1:123456789012:q", "https://sqs.eu-west-1.amazonaws.com/123456789012/q"]
)
def test_queue_of_another_region_is_refused(moto: Bench, name: str) -> None:
    with pytest.raises(BrokerError, match=r"eu-west-1.*us-east-1"):
        moto.connection.ensure([QueueSpec(name=name, fifo=False, visibility=30, owned=False)], create=True)


def test_delay_is_left_out_on_fifo(moto: Bench) -> None:
    queue = moto.queue(fifo=True)
    moto.send(queue, "x", delay=30)
    assert moto.receive(queue)[0].body == "x"
