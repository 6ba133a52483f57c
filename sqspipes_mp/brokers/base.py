"""The port: what the engine asks of a queue service. Pure declarations; imports no broker.

A *broker* is what the user writes down (``SQS(...)``, ``SQLite(path)``): small, picklable, opens nothing.
``broker.open()`` gives a *connection*: owned by one process, opened after the fork, usable by all its threads.

Every method works on batches, takes at-least-once delivery for granted, and retries transient faults (throttling,
resets, timeouts, locks) by itself with capped, jittered backoff for as long as it takes (or for the ``patience`` of
``open``). What retrying cannot cure raises ``BrokerError`` (``QueueMissing``, ``AccessDenied``), its cure in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

from sqspipes_mp.errors import BrokerError, MessageError
from sqspipes_mp.messages.attributes import Attribute


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSpec:
    """A queue the pipeline needs.

    ``visibility``: seconds, its default visibility timeout when created. ``dead``: name of the dead-letter queue
    it redrives to as a last resort (None for dead-letter queues). ``owned``: False for a queue of others, which is
    never created, purged or deleted. ``domain``: of the pipeline whose own queue it is; None: of nobody in particular.
    """

    name: str
    fifo: bool
    visibility: float
    dead: str | None = None
    owned: bool = True
    domain: str | None = None


class Handle(NamedTuple):
    """What identifies one delivery of one message: enough to extend, release or delete it."""

    queue: str
    receipt: str
    message_id: str


@dataclass(frozen=True, slots=True)
class Received:
    """One delivery.

    ``receives`` counts deliveries (1 at the first; releases count too; 0: the service does not say), ``charges`` the
    failed attempts where the broker itself keeps them (SQLite; 0 on SQS), ``sent_at`` is in epoch seconds, ``failure``
    the text of ``FAILURE_ATTRIBUTE`` where the message has one, ``attributes`` the sender's where they were asked for.
    ``leased_at``: when its lease began (``lease_now``); None where only the service knows.
    """

    handle: Handle
    body: str
    receives: int
    charges: int
    group: str | None
    sent_at: float
    failure: str | None = None
    attributes: tuple[Attribute, ...] = ()
    leased_at: float | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A message to send. ``hop`` is its deduplication id, ``group`` its FIFO group (None on standard queues)."""

    queue: str
    body: str
    hop: str
    group: str | None = None
    delay: float = 0.0
    attributes: tuple[Attribute, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """Outputs that must be accepted downstream, and the input to delete after that.

    ``input`` None: there is none (a source's call, ``put``); then the outputs must survive a power cut once accepted.
    ``again``: the same ids may come again at any later time (a generator that is walked anew).
    ``last`` False: more outputs of the same input follow in later completions, so it is not deleted yet.
    """

    input: Handle | None
    outputs: tuple[Output, ...] = ()
    last: bool = True
    again: bool = False


class OutputsRefused(BrokerError):
    """Outputs were refused for what they are, though the queue takes others; all else that was asked for is done.

    ``refused``: their completions, each with the reason; ``unsent``: those that would have overtaken one of these (or
    one that was found stale as well) in its FIFO group; ``stale``: what ``complete`` returns otherwise. No input of
    ``refused`` and ``unsent`` was deleted.
    """

    def __init__(
        self, refused: Sequence[tuple[Completion, MessageError]], unsent: Sequence[Completion], stale: Sequence[Handle]
    ) -> None:
        self.refused = refused
        self.unsent = unsent
        self.stale = stale
        super().__init__(str(refused[0][1]) if refused else "what they follow was refused, and is somebody else's now")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A delivery to move to a dead-letter queue.

    ``failure`` is the ASCII JSON for ``FAILURE_ATTRIBUTE`` (already cut to fit beside the rest; None: that goes alone),
    ``hop`` the original hop id, ``group`` the FIFO group to send it with, ``attributes`` the sender's. The broker
    derives the deduplication id: SHA-256 of (hop, 'dead', message id), so that it is never the original one.
    """

    handle: Handle
    queue: str
    body: str
    hop: str
    failure: str | None
    group: str | None = None
    attributes: tuple[Attribute, ...] = ()


@dataclass(frozen=True, slots=True)
class Depth:
    """Messages in one queue; approximate on SQS (ApproximateNumberOfMessages and its siblings)."""

    visible: int
    in_flight: int
    delayed: int

    @property
    def empty(self) -> bool:
        return not (self.visible or self.in_flight or self.delayed)


class Stray(NamedTuple):
    """A queue of a domain that no task of its pipeline uses; ``owned``: the broker knows that it is the domain's."""

    queue: str
    messages: int
    owned: bool


class Wallet(Protocol):
    """A text that all processes of one engine share: the keeper writes it, the workers read it."""

    def read(self) -> str | None:
        """Return the text; None while there is none."""

    def write(self, text: str) -> None:
        """Replace the text; too long ones are not kept."""


class Connection(Protocol):
    """An open broker, owned by one process; any thread of it may call any method."""

    #: Messages per call at which calls are cheapest (SQS: 10, its limit).
    batch: int
    #: Messages per receive at which receives are cheapest (SQS: 10, its limit).
    fetch: int
    #: Seconds of work that one receive may bring: fewer receives, but at a backlog's end one worker has what another
    #: could do.
    ahead: float
    #: Calls of ``complete`` worth having under way at once (round trips overlap; 1 where there are none).
    carriers: int
    #: Calls of ``receive`` worth having under way at once.
    receivers: int
    #: Seconds for which every count must stay zero before "empty" may be believed (SQS: 60, its own documentation).
    settle: float
    #: Whether ``Received.charges`` counts the failed attempts for good.
    keeps_charges: bool
    #: Seconds a finished message may wait for a batch to fill while more are being made (its own cost: latency).
    linger: float

    @property
    def throttles(self) -> int:
        """Requests that the queue service has throttled so far."""

    def ensure(self, queues: Sequence[QueueSpec], *, create: bool) -> None:
        """Create what is missing (``create``) or raise ``QueueMissing``; warn of attributes that differ.

        Dead-letter queues come before those that redrive to them. Raises ``ConfigError`` as ``check_owners`` does.
        """

    def check_owners(self, queues: Sequence[QueueSpec]) -> None:
        """Raise ``ConfigError`` where one of these is another pipeline's own, as far as the broker knows (SQLite)."""

    def strays(self, domain: str, known: Collection[str]) -> list[Stray]:
        """Return a domain's queues besides the known ones that hold messages (SQLite; SQS: none).

        SQS would need the right to list all queues.
        """

    def receive(
        self, queues: Sequence[str], max_messages: int, wait: float, visibility: float, *, attributes: bool = False
    ) -> list[Received]:
        """Return up to ``max_messages`` deliveries, hidden from others for ``visibility`` seconds.

        ``queues``: highest priority first. Returns as soon as there is one, or with none after ``wait`` seconds,
        or soon after ``interrupt``. ``attributes``: with those that the senders gave them, where the broker has such.
        """

    def complete(
        self,
        completions: Sequence[Completion],
        on_sent: Callable[[Completion], None] | None = None,
        still_ours: Callable[[Completion], bool] | None = None,
    ) -> list[Handle]:
        """Send all outputs; delete each input whose outputs were all accepted. Returns the handles found stale.

        What follows a stale one in its FIFO group is left undone and counts as stale, too, where it was not sent by
        then: its lease may still be held, so it should be given back.
        ``on_sent`` is called for a completion between the two where they are two calls. ``still_ours`` is asked, where
        sending may take several tries, before each of them; a completion for which it says False counts as stale:
        nothing more of it is sent, and its input is not deleted. Raises ``OutputsRefused``.
        """

    def feed(self, outputs: Sequence[Output], *, keyed: bool) -> list[int]:
        """Send messages that have no input, to survive a power cut once accepted.

        ``keyed``: their hop ids come from the user's keys and are remembered for as long as the broker can (SQLite:
        until the queue is purged; SQS: for five minutes, and only FIFO queues). Returns the places of those known to
        have been sent before, which were dropped.
        """

    def extend(self, handles: Sequence[Handle], seconds: float, *, attempts: int = 0) -> list[Handle]:
        """Hide deliveries for ``seconds`` from now (0 = release). Returns the handles found stale.

        ``attempts``: failed attempts of each of these messages so far, noted where the broker keeps them; a smaller
        number than the noted one changes nothing.
        """

    def dead_letter(self, letters: Sequence[DeadLetter]) -> list[Handle]:
        """Move deliveries to their dead-letter queues: sent there first, deleted here after. Returns the stale ones."""

    def depth(self, queue: str) -> Depth:
        """Count one queue. Raises ``QueueMissing``."""

    def address(self, queue: str) -> str:
        """Return what others find a queue by: its URL, or its name where it has none. Raises ``QueueMissing``."""

    def purge(self, queues: Sequence[str]) -> None:
        """Remove all messages of exactly these queues; missing ones are fine. Returns when they are gone."""

    def delete(self, queues: Sequence[str]) -> None:
        """Delete exactly these queues; missing ones are fine."""

    def tend(self) -> None:
        """Keep the wallet up to date (the keeper, about every half minute); cheap while nothing is due."""

    def interrupt(self) -> None:
        """From any thread, for good: receives return at once from now on, with what they have."""

    def close(self) -> None:
        """Close every socket and file."""


class KeyedConnection(Connection, Protocol):
    """A connection of a broker that ``remembers_keys``."""

    def keyed(self, queues: Sequence[str], hops: Sequence[str]) -> set[str]:
        """Return those of the hop ids that were fed to one of the queues with a key."""

    def bodies(self, queue: str) -> list[tuple[str, str, str | None]]:
        """Return body, message id and failure of every message of a queue, without receiving any; in flight or not."""


def as_keyed(broker: Broker, connection: Connection) -> KeyedConnection | None:
    """Return a broker's connection where it can look at messages and keys; None where it cannot."""
    return cast("KeyedConnection", connection) if broker.remembers_keys else None


class Broker(Protocol):
    """What the user writes down; picklable, opens nothing until asked."""

    @property
    def temporary(self) -> bool:
        """True: the queues are removed with the engine that made them."""

    @property
    def remembers_keys(self) -> bool:
        """True: keys are remembered for good, and the connection is a ``KeyedConnection``."""

    @property
    def longest_hold(self) -> float | None:
        """Seconds from its receive for which a message can be kept from others; None: for ever."""

    def check(self) -> None:
        """Raise ``ConfigError`` for what can be known to be wrong without the network; called at first use."""

    def warm(self) -> None:
        """In the process that forks, before it does: load what children can share. No network, no sockets."""

    def open(self, *, patience: float | None = None, wallet: Wallet | None = None) -> Connection:
        """Open a connection for this process. Raises ``ConfigError`` or ``BrokerError``.

        ``patience``: seconds after which a call that finds no answer raises ``BrokerBusy``; None: it goes on for ever.
        ``wallet``: where what a whole fleet would otherwise fetch one by one (credentials) is shared; the connection
        with patience, the keeper's, fills it.
        """

    def exists(self) -> bool:
        """Return False where it is known, without asking anybody, that nothing was ever sent."""

    def lock_file(self, domain: str) -> str | None:
        """Return the path of a file that only one map of a domain locks; None: there is no such place."""

    def cleanup(self) -> None:
        """Remove the queues where they are ``temporary``."""

    def describe(self) -> str:
        """A short text for logs, without secrets."""
