"""The SQS broker against the stand-in's failures: nothing is lost, nothing overtakes, nothing waits that need not."""

import time
from collections.abc import Callable, Iterator

import pytest

from sqspipes_mp.brokers.base import Completion, Output, OutputsRefused, QueueSpec
from sqspipes_mp.brokers.sqs.connection import SqsConnection
from standin import StandIn, standin
from standin.brokers import sqs_at

FAULTS = {
    "latency_ms": 1,
    "throttle": 0.02,
    "error": 0.02,
    "reset_before": 0.03,
    "lost_reply": 0.03,
    "partial": 0.05,
    "duplicate": 0.05,
}


@pytest.fixture
def server() -> Iterator[StandIn]:
    with standin(seed=3, in_flight=150) as server:
        yield server


@pytest.fixture(params=[True, False], ids=["lean", "boto3"])
def connection(server: StandIn, request: pytest.FixtureRequest) -> Iterator[SqsConnection]:
    connection = sqs_at(server.url, lean=request.param).open()
    yield connection
    assert (connection._calls._lean is not None) is request.param
    connection.close()


def make(connection: SqsConnection, *names: str, visibility: float = 30) -> None:
    specs = [QueueSpec(name=name, fifo=name.endswith(".fifo"), visibility=visibility) for name in names]
    connection.ensure(specs, create=True)


@pytest.mark.parametrize("suffix", ["", ".fifo"])
def test_every_message_gets_through_bad_weather(server: StandIn, connection: SqsConnection, suffix: str) -> None:
    make(connection, f"in{suffix}", f"out{suffix}", visibility=60)
    server.faults(**FAULTS)
    fed = [Output(f"in{suffix}", f"{n}", f"hop-{n}", f"group-{n % 7}" if suffix else None) for n in range(140)]
    connection.complete([Completion(None, tuple(fed))])
    while not connection.depth(f"in{suffix}").empty:
        messages = connection.receive([f"in{suffix}"], 10, 0, 60)
        if not messages:
            # What a lost reply keeps hidden comes again when its time is over.
            server.advance(61)
        done = [Completion(m.handle, (Output(f"out{suffix}", m.body, f"next-{m.body}", m.group),)) for m in messages]
        assert connection.complete(done) == []
    server.faults(**dict.fromkeys(FAULTS, 0))
    arrived = []
    while messages := connection.receive([f"out{suffix}"], 10, 0, 60):
        arrived += [(message.group, int(message.body)) for message in messages]
        connection.complete([Completion(message.handle) for message in messages])
    assert {body for _, body in arrived} == set(range(140))
    ledger = server.ledger(messages=False)
    assert ledger["violations"] == []
    assert sum(ledger["faults"].values()) > 20
    if suffix:
        assert len(arrived) == 140
        for group in {group for group, _ in arrived}:
            ours = [body for each, body in arrived if each == group]
            assert ours == sorted(ours)


def test_level_that_is_full_does_not_hold_up_the_others(server: StandIn, connection: SqsConnection) -> None:
    make(connection, "high", "low")
    connection.complete([Completion(None, tuple(Output("high", f"{n}", f"{n}") for n in range(160)))])
    connection.complete([Completion(None, (Output("low", "x", "x"),))])
    held = 0
    while held < 150:
        held += len(connection.receive(["high"], 10, 1, 30))
    started = time.monotonic()
    assert [message.body for message in connection.receive(["high", "low"], 1, 1, 30)] == ["x"]
    assert time.monotonic() - started < 10
    assert server.ledger(messages=False)["requests"]["ReceiveMessage"]["errors"] == {"OverLimit": 1}


@pytest.mark.parametrize("fault", ["throttle", "lost_reply", "reset_before", "partial"])
def test_a_lease_lost_between_two_tries_of_one_completion_sends_no_second_copy(
    server: StandIn, connection: SqsConnection, fault: str
) -> None:
    make(connection, "in.fifo", "out.fifo")
    connection.complete([Completion(None, tuple(Output("in.fifo", each, each, each) for each in "abc"))])
    a, b, c = connection.receive(["in.fifo"], 10, 0, 600)
    # botocore's own second try comes within a second, so it may still be made.
    server.plan("SendMessageBatch", fault, times=1 if fault == "partial" else 2, entries=[0])
    asked = 0

    def still_ours(completion: Completion) -> bool:
        nonlocal asked
        if completion.input != a.handle:
            return True
        asked += 1
        if asked == 2:
            # It was cut off for long, and another one has done its work: SQS has forgotten the deduplication ids.
            server.advance(301)
        return asked == 1

    outputs = {message.handle: Output("out.fifo", message.body, f"of-{message.body}", "g") for message in (a, b)}
    done = [Completion(handle, (output,)) for handle, output in outputs.items()] + [Completion(c.handle)]
    sent: list[Completion] = []
    assert connection.complete(done, sent.append, still_ours) == [a.handle]
    assert sent == done[1:]
    arrived = [message["dedup"] for message in server.messages("out.fifo")]
    assert arrived == (["of-a", "of-b"] if fault == "lost_reply" else ["of-b"])
    assert connection.depth("in.fifo").in_flight == 1


def losing(lost: Completion, at: int) -> Callable[[Completion], bool]:
    """Return what says of one completion that it is lost, from when it is asked for the ``at``-th time."""
    asked = 0

    def still_ours(completion: Completion) -> bool:
        nonlocal asked
        asked += completion is lost
        return completion is not lost or asked < at

    return still_ours


def test_what_is_behind_a_refused_and_lost_one_is_told(server: StandIn, connection: SqsConnection) -> None:
    make(connection, "in.fifo", "out.fifo", "later.fifo")
    small = {"FifoQueue": "true", "MaximumMessageSize": "1024"}
    connection._calls.clients.hot.create_queue(QueueName="small.fifo", Attributes=small)
    connection.complete([Completion(None, tuple(Output("in.fifo", each, each, each) for each in "abc"))])
    a, b, c = (message.handle for message in connection.receive(["in.fifo"], 10, 0, 600))
    # The first is refused for its size in one queue, and found lost when the other is its turn.
    large = Output("small.fifo", "x" * 2000, "of-a", "g")
    lost = Completion(a, (large, Output("later.fifo", "x", "of-a-too", "g")))
    behind = Completion(b, (Output("small.fifo", "x", "of-b", "g"),))
    other = Completion(c, (Output("later.fifo", "x", "of-c", "other"),))
    with pytest.raises(OutputsRefused) as told:
        connection.complete([lost, behind, other], None, losing(lost, 2))
    assert (told.value.refused, told.value.unsent, told.value.stale) == ([], [behind], [a])
    assert server.messages("small.fifo") == []
    assert [message["dedup"] for message in server.messages("later.fifo")] == ["of-c"]
    assert connection.depth("in.fifo").in_flight == 2


def test_what_was_sent_before_one_of_its_group_was_lost_is_deleted(server: StandIn, connection: SqsConnection) -> None:
    make(connection, "in.fifo", "out.fifo")
    connection.complete([Completion(None, tuple(Output("in.fifo", each, each, "g") for each in "ab"))])
    a, b = (message.handle for message in connection.receive(["in.fifo"], 10, 0, 600))
    lost, sent = (Completion(handle, (Output("out.fifo", "x", to, to),)) for handle, to in ((a, "y"), (b, "z")))
    server.plan("SendMessageBatch", "partial", times=1, entries=[0])
    # Asked in the end, it would count as lost with what it follows, and be sent again by whoever gets it.
    still_ours = losing(lost, 2)
    told: list[Completion] = []

    def group_of_a_lost_one(completion: Completion) -> bool:
        if not still_ours(completion):
            told.append(completion)
        return not told

    assert connection.complete([lost, sent], None, group_of_a_lost_one) == [a]
    assert [message["dedup"] for message in server.messages("out.fifo")] == ["z"]
    assert connection.depth("in.fifo").in_flight == 1
