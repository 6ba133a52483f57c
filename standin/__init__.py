"""A stand-in for SQS: its JSON wire on a loopback port, fast, strict about SQS's limits, failing on demand.

``with standin(latency_ms=5, lost_reply=0.01) as sqs:`` starts one process (``python -m standin``). ``sqs.url`` is an
endpoint for boto3, ``sqs.ledger()`` has the fate of every message. Credentials are always dummies.

::

    connection  bytes <-> requests (asyncio protocol)      service   queues and counts; dispatches, applies faults
    queue       one queue: states, receipts, redrive       shelf     the order of visible messages (standard, FIFO)
    line        long polls that wait                       rules     SQS's limits, pure
    manage, send, receive   the operations                 faults    faults of requests, seeded
    control     /-/ledger, /-/faults, ...                  client    the context manager

Where SQS's documentation leaves a choice, the stand-in takes the one that is harder for a client. Latency, faults and
the waits of 60 s (purge, deletion) are off unless asked for. Retention, encryption and permissions are ignored.
"""

from standin.client import StandIn, standin

__all__ = ["StandIn", "standin"]
