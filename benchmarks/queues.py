"""Queues to run an engine over: a temporary SQLite file, or the stand-in for SQS; and filling them beforehand."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sqspipes_mp import SQS, Engine, SQLite
from sqspipes_mp.brokers.base import Broker, Completion, Output
from standin import standin

#: Latency of each request to the stand-in, milliseconds: about that of SQS within a region.
LATENCY_MS = 5.0
#: Outputs in one completion.
_BATCH = 500


@contextlib.contextmanager
def brokers(kind: str, latency_ms: float = LATENCY_MS) -> Iterator[Callable[[], Broker]]:
    """Yield a function that returns a fresh broker without queues: ``kind`` is "sqlite" or "sqs"."""
    with contextlib.ExitStack() as stack:
        if kind == "sqlite":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sqspipes-mp-bench-")))
            numbers = iter(range(1_000_000))
            yield lambda: SQLite(folder / f"{next(numbers)}.db")
            return
        yield stack.enter_context(sqs_standin(latency_ms=latency_ms))[1]


@contextlib.contextmanager
def sqs_standin(*, lean: bool = True, **options: object) -> Iterator[tuple[Any, Callable[[], SQS]]]:
    """Yield the stand-in for SQS, started with options, and a function that empties it and returns a broker for it."""
    with standin(ledger=0, **options) as server:

        def fresh() -> SQS:
            server.reset()
            return SQS("us-east-1", endpoint_url=server.url, access_key="bench", secret_key="bench", lean=lean)

        yield server, fresh


def nothing() -> None:
    """Stand before the measured stage as the source of its queue; never run."""


def after(value: Any) -> Any:
    """Stand behind the measured stage, so that it has an output queue; never run."""
    return value


def fill(engine: Engine, stage: str, values: Sequence[object]) -> None:
    """Put values into a stage's input queue, as the stage before it would."""
    queue = engine.pipeline.stage(stage).inputs[-1]
    engine.broker.check()
    with contextlib.closing(engine.broker.open()) as connection:
        connection.ensure(engine.pipeline.queues, create=True)
        for start in range(0, len(values), _BATCH):
            connection.complete(
                [Completion(None, (_output(queue, value),)) for value in values[start : start + _BATCH]]
            )


def _output(queue: str, value: object) -> Output:
    hop = os.urandom(32).hex()
    return Output(queue, json.dumps({"meta": {"priority": 0, "hop": hop}, "value": value}), hop)
