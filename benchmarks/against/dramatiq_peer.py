"""Dramatiq over dramatiq_sqs. ``python -m benchmarks.against.dramatiq_peer`` fills; Dramatiq's own command works."""

from __future__ import annotations

from typing import Any

import dramatiq
from dramatiq_sqs import SQSBroker

from benchmarks.against.setup import AFTER, HOP, given

SETUP = given()
_CALL = SETUP.call


class Ready(dramatiq.Middleware):
    """Tells when a process's threads have been started."""

    def after_worker_boot(self, _broker: Any, _worker: Any) -> None:
        SETUP.tell_ready()


broker = SQSBroker()
broker.add_middleware(Ready())
dramatiq.set_broker(broker)


def _hop(value: int) -> None:
    after.send(_CALL(value))


def _after(value: int) -> None:
    """Stand behind the measured stage; never run."""


hop = dramatiq.actor(_hop, actor_name=HOP, queue_name=HOP)
after = dramatiq.actor(_after, actor_name=AFTER, queue_name=AFTER)

if __name__ == "__main__":
    for number in range(SETUP.calls):
        hop.send(number)
