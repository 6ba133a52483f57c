"""What the stand-in may be told: on the command line, as keywords of ``standin()``, and (faults) while it runs."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class Faults:
    """What goes wrong, and how often: probabilities from 0 to 1, each drawn by itself.

    Per request: ``throttle`` (400 ThrottlingException or 403 RequestThrottled), ``error`` (500 or 503),
    ``reset_before`` (the connection is reset, nothing done), ``lost_reply`` (done, then reset), ``slow`` (the reply
    comes in drops), ``miss`` (a short poll finds nothing). Per entry of a batch: ``partial`` (InternalError, not done).
    Per delivery on standard queues: ``duplicate`` (handed out twice, or once more after it was deleted).
    ``latency_ms`` before each reply, plus up to ``jitter_ms``. ``only``: the operations that may fail (none: all).
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    throttle: float = 0.0
    error: float = 0.0
    reset_before: float = 0.0
    lost_reply: float = 0.0
    slow: float = 0.0
    miss: float = 0.0
    partial: float = 0.0
    duplicate: float = 0.0
    only: tuple[str, ...] = ()

    def change(self, changes: Mapping[str, Any]) -> None:
        """Set some of the fields. Raises ``ValueError`` for what is none."""
        known = {each.name for each in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"no fault {name!r}: {sorted(known)}")
            setattr(self, name, tuple(value) if name == "only" else float(value))


@dataclass(slots=True)
class Options:
    """The rest. ``purge_window`` and ``delete_window``: 60 s at SQS. ``in_flight``: most in-flight messages of a queue.

    ``lenient_change``: extending a delivery that expired, but was not received again, succeeds (SQS has been seen to
    do so on standard queues; its documentation promises an error). ``ghost_polls``: a long poll whose client is gone
    still takes messages. ``shuffle``: standard queues hand out any of that many oldest messages. ``key``: the only
    access key accepted. ``ledger`` 0: deleted messages are forgotten (long benchmarks). ``uncounted``: no message has
    an ApproximateReceiveCount, as with some emulators.
    """

    port: int = 0
    seed: int = 0
    region: str = "us-east-1"
    account: str = "123456789012"
    in_flight: int = 120_000
    purge_window: float = 0.0
    delete_window: float = 0.0
    shuffle: int = 0
    lenient_change: int = 0
    ghost_polls: int = 0
    ledger: int = 1
    uncounted: int = 0
    key: str = ""
    faults: Faults = field(default_factory=Faults)


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m standin", description=Faults.__doc__)
    options = Options()
    for holder in (options, options.faults):
        for each in fields(holder):
            default = getattr(holder, each.name)
            if each.name == "only":
                parser.add_argument("--only", default=(), type=lambda text: tuple(text.split(",")))
            elif each.name != "faults":
                parser.add_argument(_flag(each.name), default=default, type=type(default))
    given = vars(parser.parse_args(arguments))
    for holder in (options, options.faults):
        for each in fields(holder):
            if each.name != "faults":
                setattr(holder, each.name, given[each.name])
    return options


def command_line(options: Mapping[str, object]) -> Iterator[str]:
    """Write keywords as a command line."""
    for name, value in options.items():
        text = ",".join(value) if isinstance(value, list | tuple) else str(int(value) if value is True else value)
        yield f"{_flag(name)}={text}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
