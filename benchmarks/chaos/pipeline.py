"""The pipeline under chaos: three stages, fed from outside, their results left in a queue that nobody receives from.

Run as ``python -m benchmarks.chaos.pipeline BROKER FIFO VISIBILITY PIDS BACKOFF``, it is one program ("machine") of the
storm. Values are numbers; some are poison and never come through: they raise, are rejected, kill their worker, or are
late.
"""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.watching import Log
from sqspipes_mp import Engine, Reject, Task
from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.messages import attempts

STAGES = ("one", "two", "three")
#: Attempts a message has. A worker killed at random charges what it ran, so one of them must never be the last.
ATTEMPTS = 4
#: What each kind of poison does, by its number.
POISON = ("raise", "reject", "exit", "sigkill", "interrupted", "late")
#: Seconds a call may take. A worker that is stopped for a while must not be late for that.
LONGEST = 20.0

#: [number, steps, poisoned stage or None, kind or None]
Value = list[Any]


def numbers() -> Iterator[Value]:
    """Yield nothing: the storm is fed from outside."""
    yield from ()


def act(value: Value, stage: str) -> Value:
    """Add a step to a value, or fail as its poison says."""
    number, steps, where, kind = value
    # A millisecond or two of work, sometimes more, so that something runs when death comes.
    sum(range(100_000 if number % 50 else 1_000_000))
    if where == stage:
        match kind:
            case "raise":
                raise ValueError(number)
            case "reject":
                raise Reject(str(number))
            case "exit":
                os._exit(3)
            case "interrupted":
                # In C, holding the GIL, until the signal that asks for its stack makes it return.
                ctypes.PyDLL(None).usleep(int(10 * LONGEST * 1e6))
            case "late":
                time.sleep(LONGEST + 0.02)
            case _:
                os.kill(os.getpid(), signal.SIGKILL)
    return [number, [*steps, stage], where, kind]


def never(value: Value) -> Value:
    """The task behind the last one: it only makes a queue for the results and runs nowhere."""
    raise AssertionError(value)


def note(pids: Log, stage: str) -> None:
    """Note that this process works for a stage."""
    pids.note(os.getpid(), stage)


def engine(broker: Broker | str, *, fifo: bool, visibility: float, pids: Log) -> Engine:
    """Return the engine; its first task, a source, runs nowhere either."""
    stages = [
        Task(
            partial(act, stage=stage),
            name=stage,
            workers=1 + (stage == "two"),
            max_attempts=ATTEMPTS,
            init=partial(note, pids, stage),
            timeout=LONGEST,
        )
        for stage in STAGES
    ]
    return Engine(
        [numbers, *stages, never],
        domain="chaos",
        broker=broker,
        fifo=fifo,
        on_error="retry",
        visibility_timeout=visibility,
        shutdown_grace=2.0,
    )


def main() -> None:
    """Run the three stages."""
    broker, fifo, visibility, pids, backoff = sys.argv[1:]
    if backoff:
        # What all attempts of a poison wait for would take longer than the rest of a short storm.
        attempts.backoff = lambda attempt, jitter: jitter(0.0, float(backoff))  # noqa: ARG005
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    made = engine(broker, fifo=fifo == "1", visibility=float(visibility), pids=Log(pids))
    made.run(only=list(STAGES))


if __name__ == "__main__":
    main()
