"""SQS as the tests of real processes use it."""

import pytest

from sqspipes_mp import SQS
from standin import StandIn
from standin.brokers import sqs_at


@pytest.fixture
def sqs(server: StandIn) -> SQS:
    """The stand-in without queues: unlike moto it remembers deduplication ids, and its clock can be moved."""
    server.reset()
    return sqs_at(server.url)
