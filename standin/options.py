"""Options of the stand-in: on the command line, as keywords of ``standin()``, and, the faults, while it runs."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class Faults:
    """Faults and latency. Faults are probabilities from 0 to 1, each drawn by itself."""

    #: Milliseconds before each reply.
    latency_ms: float = 0.0
    #: Most milliseconds on top of it, drawn for each reply.
    jitter_ms: float = 0.0
    #: Per request: 400 ThrottlingException or 403 RequestThrottled.
    throttle: float = 0.0
    #: Per request: 500 or 503.
    error: float = 0.0
    #: Per request: the connection is reset, with nothing done.
    reset_before: float = 0.0
    #: Per request: the request is done, then the connection is reset.
    lost_reply: float = 0.0
    #: Per request: the reply comes in pieces.
    slow: float = 0.0
    #: Per short poll: no message is found.
    miss: float = 0.0
    #: Per entry of a batch: InternalError, with the entry not done.
    partial: float = 0.0
    #: Per delivery on standard queues: the message comes twice, or once more after its delete.
    duplicate: float = 0.0
    #: Operations that may fail; none: all.
    only: tuple[str, ...] = ()

    def change(self, changes: Mapping[str, Any]) -> None:
        """Set some of the fields. Raises ``ValueError`` for an unknown name."""
        known = {each.name for each in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"no fault {name!r}: {sorted(known)}")
            setattr(self, name, tuple(value) if name == "only" else float(value))


@dataclass(slots=True)
class Options:
    """All options. A flag is an int, 0 or 1, for the command line."""

    #: 0: any free port.
    port: int = 0
    #: Seed of all dice.
    seed: int = 0
    region: str = "us-east-1"
    account: str = "123456789012"
    #: Most messages of a queue in flight.
    in_flight: int = 120_000
    #: Seconds in which a purged queue refuses another purge and loses new messages; 60 at SQS.
    purge_window: float = 0.0
    #: Seconds in which a deleted queue cannot be created again; 60 at SQS.
    delete_window: float = 0.0
    #: Standard queues deliver any of this many oldest messages.
    shuffle: int = 0
    #: Whether an expired delivery that was not received again can be extended. SQS has been seen to allow it on
    #: standard queues; its documentation promises an error.
    lenient_change: int = 0
    #: Whether a long poll whose client is gone still receives messages.
    ghost_polls: int = 0
    #: 0: deleted messages leave the ledger (long benchmarks).
    ledger: int = 1
    #: Whether messages have no ApproximateReceiveCount, as with some emulators.
    uncounted: int = 0
    #: The only access key that is accepted; "": any.
    key: str = ""
    #: PEM file with the server's key and certificate: the stand-in speaks TLS, on a port of its own. "": it does not.
    certificate: str = ""
    #: PEM bundle that signs the certificates of clients, which need one then. "": they need none.
    client_bundle: str = ""
    faults: Faults = field(default_factory=Faults)


def parse(arguments: Sequence[str]) -> Options:
    """Return the options of a command line."""
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
    """Yield the command line's arguments for keywords of ``standin()``."""
    for name, value in options.items():
        text = ",".join(value) if isinstance(value, list | tuple) else str(int(value) if value is True else value)
        yield f"{_flag(name)}={text}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
