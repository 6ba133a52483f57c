"""Celery over kombu's SQS transport. ``python -m benchmarks.against.celery_peer`` fills; Celery's own command works."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from celery.signals import worker_process_init, worker_ready

from benchmarks.against.setup import AFTER, HOP, KEY, REGION, given

SETUP = given()
_CALL = SETUP.call
app = Celery("bench", broker=f"sqs://{KEY}:{KEY}@{urlsplit(SETUP.url).netloc}//")
app.conf.update(
    # Without its second between two polls, which it also waits whenever it holds enough: it is several times as fast.
    broker_transport_options={"region": REGION, "is_secure": False, "polling_interval": 0},
    task_ignore_result=True,
    # It would poll a queue of its own.
    worker_enable_remote_control=False,
)


def _hop(value: int) -> None:
    after.apply_async((_CALL(value),), queue=AFTER)


def _after(value: int) -> None:
    """Stand behind the measured stage; never run."""


def _connected(**_: Any) -> None:
    """Connect this process to the broker now: otherwise its first message pays for that."""
    with app.producer_pool.acquire(block=True) as producer:
        producer.maybe_declare(app.amqp.queues[AFTER])
    SETUP.tell_ready()


def _ready(**_: Any) -> None:
    SETUP.tell_ready()


hop = app.task(name=HOP)(_hop)
after = app.task(name=AFTER)(_after)
worker_process_init.connect(_connected)
worker_ready.connect(_ready)

if __name__ == "__main__":
    for number in range(SETUP.calls):
        hop.apply_async((number,), queue=HOP)
