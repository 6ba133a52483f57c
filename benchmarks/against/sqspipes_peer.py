"""sqspipes. ``python -m benchmarks.against.sqspipes_peer [WORKERS]``: works; without a number of workers, fills."""

from __future__ import annotations

import collections
import collections.abc
import json
import sys
from typing import Any

import boto3

from benchmarks.against.setup import AFTER, HOP, KEY, REGION, given

# sqspipes 0.3.3 looks for it where Python had it before 3.10.
vars(collections).setdefault("Iterable", collections.abc.Iterable)

from sqspipes import TaskClient  # noqa: E402

SETUP = given()
_CALL = SETUP.call


def source() -> None:
    """Stand before the measured stage: its output queue is where the backlog waits; never run."""


def hop(value: int) -> int:
    """Run the function."""
    return _CALL(value)


def after(value: int) -> None:
    """Stand behind the measured stage; never run."""


def _client(workers: int) -> Any:
    # Standard queues, as the others'.
    client = TaskClient("bench", KEY, KEY, aws_region=REGION, fifo=False)
    client.register_tasks(
        [{"method": source}, {"method": hop, "name": HOP, "workers": workers}, {"method": after, "name": AFTER}]
    )
    for task in client.tasks:
        task.setup()
    return client


def main() -> None:
    """Work, or fill."""
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    client = _client(workers or 1)
    if workers:
        SETUP.tell_ready()
        client.run(HOP)
        return
    # Its own way to submit pauses for a second or so after each message.
    queue = boto3.resource("sqs").get_queue_by_name(QueueName="bench-source")
    for number in range(SETUP.calls):
        queue.send_message(MessageBody=json.dumps({"meta": {"priority": 0}, "value": number}))


if __name__ == "__main__":
    main()
