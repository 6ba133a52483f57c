"""SQS brokers at servers of this machine: moto's, the stand-in, emulators."""

from typing import Any

from sqspipes_mp.brokers.sqs import SQS


def sqs_at(url: str, **settings: Any) -> SQS:
    """Return an SQS broker at a server that takes any credentials; the waits for the real service are cut short."""
    broker = SQS("us-east-1", endpoint_url=url, access_key="testing", secret_key="testing", **settings)
    broker._settle = 0.1
    broker._purge_window = 0.0
    return broker
