"""An output that its queue refuses, in FIFO groups: nothing of its input's group overtakes it, nothing is left out."""

import contextlib
import json

from sqspipes_mp import SQS, Engine, Task
from standin import StandIn
from tests.gates import Background, drain, eventually, feed
from tests.process.test_refusals import at_once, engine_with_a_small_queue, long, sink, source


def by_value(value):
    return str(value)[:8]


def arrived(broker: SQS, queue: str) -> list[object]:
    with contextlib.closing(broker.open()) as connection:
        found = connection.receive([queue], 10, 0, 30)
    return [json.loads(message.body)["value"] for message in found]


def test_what_follows_it_in_its_input_group_is_done_after_it_though_it_goes_elsewhere(
    sqs: SQS, server: StandIn
) -> None:
    small = engine_with_a_small_queue(sqs, server, long, fifo=True)
    work = Task(long, name="work", max_attempts=2)
    engine = Engine([source, work, Task(sink, group=by_value)], domain="t", broker=sqs, fifo=True, on_error=at_once)
    assert small.pipeline.queues[0].name == engine.pipeline.queues[0].name
    feed(engine, "work", range(8), group="g")
    order = [message["id"] for message in server.messages("t-source.fifo")]
    drain(engine, "work")
    done = [message["id"] for message in server.messages("t-source.fifo") if message["deleted"]]
    assert done == order
    assert sorted(arrived(sqs, "t-work.fifo"), key=str) == [0, 1, 2, 4, 5, 6, 7]
    assert [letter.value for letter in engine.dead_letters()] == [3]


class Count:
    """A source of eight values, of which the fourth is too large for its queue."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self):
        self.next += 1
        return long(self.next - 1) if self.next <= 8 else None


def one_group(value):
    return "g"


def test_a_sources_calls_behind_it_are_sent(sqs: SQS, server: StandIn) -> None:
    engine_with_a_small_queue(sqs, server, long, fifo=True)
    tasks = [Task(Count, name="work"), Task(sink, group=one_group)]
    engine = Engine(tasks, domain="t", broker=sqs, fifo=True, on_error="retry")
    with Background(engine, only="work"):
        eventually(lambda: len(server.messages("t-work.fifo")) >= 7)
        engine.stop()
    assert arrived(sqs, "t-work.fifo") == [0, 1, 2, 4, 5, 6, 7]
