"""The stand-in, as its own tests use it, and the ways of a report."""

from collections.abc import Iterator
from typing import Any

import pytest

from sqspipes_mp.ipc.report.report import rebuild
from standin import StandIn
from standin.asking import connect
from tests.unit.report_cases import forked, inline


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


@pytest.fixture(params=[inline, forked], ids=["inline", "forked"])
def carry(request):
    """Return a function that raises, packs and rebuilds what its argument raises."""
    return lambda raiser: rebuild(request.param(raiser))
