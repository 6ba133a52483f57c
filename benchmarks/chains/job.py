"""A job in chains: ``count`` adds up a value's units, ``spread`` makes an output of each; both in at least four calls.

A call ends where the clock says, at most a quarter of the units after it began, or where it is asked to. So a call that
runs again, after its worker was killed, ends elsewhere, and continues with another state.
"""

import logging
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from sqspipes_mp import Continue, Engine, Task, current_message
from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.messages import attempts, chain

STAGES = ("count", "spread")
#: Attempts that no random kill uses up.
_ATTEMPTS = 1000
#: Seconds of one unit.
_UNIT = 0.001
#: Part of a value's units that one call has time for, at least and at most, on a machine with nothing else to do.
_SLICE = 1 / 8, 1 / 4


def numbers() -> Iterator[int]:
    """Yield nothing: the values are fed from outside."""
    yield from ()


class Slice:
    """The part of a job that one call does."""

    def __init__(self, units: int, done: int) -> None:
        self._end = min(units, done + max(1, units // 4))
        low, high = (share * units * _UNIT for share in _SLICE)
        # Another one each time: the clock is the dice.
        self._until = time.monotonic() + low + (time.time_ns() // 1000 % 997) / 997 * (high - low)

    def over(self, done: int) -> bool:
        """Work for one unit; tell whether the call ends before it."""
        if done >= self._end or time.monotonic() >= self._until or current_message().stopping:
            return True
        time.sleep(_UNIT)
        return False


def count(state: dict[str, int]) -> Any:
    """Add up a value's units; the value is its state: ``value``, ``units``, ``done``, ``sum``."""
    part, units = Slice(state["units"], state["done"]), state["units"]
    began = state["done"]
    while state["done"] < units:
        # One unit at least, or nothing would ever be done.
        if part.over(state["done"]) and state["done"] > began:
            return Continue(state)
        state["sum"] += state["done"]
        state["done"] += 1
    return {"value": state["value"], "units": units, "done": 0, "sum": state["sum"]}


def spread(state: dict[str, int]) -> Generator[Any, None, Continue | None]:
    """Yield ``[value, unit, sum]`` for each unit."""
    part, units = Slice(state["units"], state["done"]), state["units"]
    for done in range(state["done"], units):
        if part.over(done) and done > state["done"]:
            return Continue({**state, "done": done})
        yield [state["value"], done, state["sum"]]
    return None


def never(value: Any) -> Any:
    """Stand behind the last task: it only makes a queue for the outputs, and runs nowhere."""
    raise AssertionError(value)


def engine(broker: Broker, *, fifo: bool) -> Engine:
    """Return the engine; its first task, a source, runs nowhere."""
    stages = [Task(each, workers=2, max_attempts=_ATTEMPTS) for each in (count, spread)]
    return Engine(
        [numbers, *stages, never],
        domain="chains",
        broker=broker,
        fifo=fifo,
        on_error="retry",
        visibility_timeout=2.0,
        shutdown_grace=5.0,
    )


def program(broker: Broker, log: str, *, fifo: bool) -> None:
    """Run the two stages until killed or stopped, in a process of its own."""
    sys.stdout = sys.stderr = Path(log).open("a", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s", force=True)
    # On a busy machine a call ends after a few units; holding back such quick continuations would take minutes.
    chain.UNPAUSED = 1000
    # A retry waits for less than the whole run takes.
    attempts.backoff = lambda attempt, jitter: jitter(0.0, 0.1)  # noqa: ARG005
    engine(broker, fifo=fifo).run(only=list(STAGES))
