"""A stand-in for SQS: its JSON wire on a loopback port, fast, strict about its rules, and able to fail on demand.

``with standin(latency_ms=5, lost_reply=0.01) as sqs:`` starts one process (``python -m standin``); ``sqs.url`` is
an endpoint for boto3, ``sqs.ledger()`` tells what became of every message. Credentials are dummies, always.

::

    connection  bytes <-> requests (asyncio protocol)      service   what the process holds; dispatches, applies faults
    queue       one queue: states, receipts, redrive       shelf     which visible message comes next (standard, FIFO)
    line        who waits in a long poll                   rules     SQS's limits, pure
    manage, send, receive   the operations                 faults    what goes wrong, seeded
    control     /-/ledger, /-/faults, ...                  client    the context manager

Where SQS's documentation leaves a choice it takes the harder one for a client, except that latency, faults and the
waits of 60 s (purge, deletion) are off until asked for. Retention, encryption and permissions are ignored.
"""

from standin.client import StandIn, standin

__all__ = ["StandIn", "standin"]
