"""SQS at servers of this machine: moto's, the stand-in, and emulators."""

from typing import Any

from sqspipes_mp.brokers.sqs import SQS


def sqs_at(url: str, **settings: Any) -> SQS:
    """Return SQS at a server, which takes any pair of keys, with the waits of the real service cut short."""
    broker = SQS("us-east-1", endpoint_url=url, access_key="testing", secret_key="testing", **settings)
    broker._settle = 0.1
    broker._purge_window = 0.0
    return broker
