"""The stand-in, as the tests of the stand-in itself use it."""

from collections.abc import Iterator
from typing import Any

import pytest

from standin import StandIn
from standin.asking import connect


@pytest.fixture
def sqs(server: StandIn) -> Iterator[StandIn]:
    """The stand-in without queues and faults, however the test before left it."""
    yield server
    server.resume()
    server.reset()
    server.faults(**{name: 0 for name in server.faults() if name != "only"}, only=())


@pytest.fixture
def client(sqs: StandIn) -> Iterator[Any]:
    client = connect(sqs.url)
    yield client
    client.close()
