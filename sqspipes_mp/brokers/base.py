"""The port: all that the engine asks of a queue service. Pure declarations; imports no broker.

A *broker* (``Broker``) is the queue service as the user declares it, ``SQS(...)`` or ``SQLite(path)``: small and
picklable, without open files or sockets. ``broker.open()`` returns a *connection* (``Connection``), which belongs to
one process: it is opened after the fork, and all threads of the process may use it at once.

A queue has SQS's semantics:

- A receive hides a message for its visibility timeout (the message is *in flight*); a delete ends it, a release shows
  it again at once. A message that is neither deleted nor extended in time is delivered again. So a message may be
  delivered more than once, and each delivery has a receipt of its own (``Handle``).
- A handle is *stale* once its message was deleted, or received again. A method given a stale handle does nothing for it
  and returns it; it does not raise.
- A queue whose name ends in ``.fifo`` is FIFO. Its messages have a group; a group's messages come in the order in which
  they were sent, and while one of them is in flight no other one of the group comes. Its hop id is a message's
  deduplication id: a second message with the hop id of an earlier one is accepted and dropped, for five minutes at
  least, also after the first was deleted.
- Messages are kept for 14 days or longer, from when they are due.
- A message that was received very often (1,000 times) moves to its queue's dead-letter queue by itself, as a last
  resort. Standard queues keep no order; they may deliver a message twice.

Every method retries transient faults (throttling, resets, timeouts, locks) by itself with capped, jittered backoff, as
long as it takes or for the ``patience`` of ``Broker.open``. A fault that no retry cures raises ``BrokerError`` or one
of its subclasses, with the cure in the text: ``QueueMissing``, ``AccessDenied``, ``BrokerBusy`` (the patience is over).
Methods take batches of any length, and split them as their service needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

from sqspipes_mp.errors import BrokerError, MessageError
from sqspipes_mp.messages.attributes import Attribute

#: Seconds for which a call of an attended connection is tried again, and seconds between two words on it.
ATTENDED, TOLD_EVERY = 180.0, 10.0
#: Seconds between two questions to ``wanted`` (``Connection.feed``).
ASKED_EVERY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSpec:
    """A queue that the pipeline needs."""

    #: The queue's name. For a queue of others it may be a URL or an ARN, where the service has them.
    name: str
    #: Whether the queue is FIFO; its name ends in ``.fifo`` then.
    fifo: bool
    #: Default visibility timeout of a queue that is created, seconds.
    visibility: float
    #: Name of its dead-letter queue; None for a dead-letter queue.
    dead: str | None = None
    #: False for a queue of others, which the engine never creates, purges or deletes.
    owned: bool = True
    #: Whether workers receive messages of it before they can begin them (``Task(prefetch=)``).
    ahead: bool = True
    #: Domain of the pipeline that owns the queue; None: unknown, no owner is checked or noted.
    domain: str | None = None


class Handle(NamedTuple):
    """The identity of one delivery of one message: all that it takes to extend, release or delete it."""

    #: The queue as the receive was given it.
    queue: str
    #: Text of the service's own, different for each delivery; at most 1,024 bytes, as SQS's (shared memory keeps it).
    receipt: str
    #: The message's id: the same for all its deliveries, another one for every other message; at most 128 bytes.
    message_id: str


@dataclass(frozen=True, slots=True)
class Received:
    """One delivery of a message."""

    handle: Handle
    body: str
    #: Number of this delivery, 1 for the first; released deliveries count, too. 0: the service does not count.
    receives: int
    #: Failed attempts so far, where the connection ``keeps_charges``; else 0.
    charges: int
    #: FIFO group, or on a standard queue the tenant or None; at most 128 bytes.
    group: str | None
    #: Time of the send, epoch seconds. Of a dead letter, the send of the original where the service knows it.
    sent_at: float
    #: Text of the message attribute ``FAILURE_ATTRIBUTE``; None: the message has none.
    failure: str | None = None
    #: The sender's attributes, where the receive asked for them.
    attributes: tuple[Attribute, ...] = ()
    #: Start of the lease on the clock ``host.clock.lease_now``, seconds; None: only the service knows it.
    leased_at: float | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A message to send."""

    queue: str
    body: str
    #: Hop id: the message's deduplication id.
    hop: str
    #: FIFO group; None: the hop id is the group. On a standard queue the tenant, or None: tenants take turns there,
    #: without an order, and block nobody.
    group: str | None = None
    #: Seconds until the message can be received; a FIFO queue may ignore them.
    delay: float = 0.0
    #: Attributes to send, where the service has them.
    attributes: tuple[Attribute, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """The end of one message of a value, recorded for the map that the value is of."""

    #: The queue that the value was fed to.
    queue: str
    #: Hop id of the value's first message.
    token: str
    #: The message's results, in JSON; empty: it was dropped or dead-lettered.
    results: tuple[str, ...] = ()
    #: Whether they are kept for every run (``map(keep_results=True)``), or until a resumed map has handed them out.
    kept: bool = True


@dataclass(frozen=True, slots=True)
class Ended:
    """A value that has an end, with the first of its results."""

    #: Results with their numbers, in order.
    first: tuple[tuple[int, str], ...]
    #: Whether there may be more than these.
    more: bool


@dataclass(frozen=True, slots=True)
class Completion:
    """Outputs that must be accepted downstream, and the input to delete after that."""

    #: None: there is no input (a source's call, ``put``). The outputs must survive a power cut once accepted.
    input: Handle | None
    #: With ``last`` the last output may go to the input's own queue, and takes the input's place: an output that comes
    #: again is dropped beyond that, where the service does so for the outputs of one input that come in several calls.
    outputs: tuple[Output, ...] = ()
    #: False: later completions bring more outputs of the same input, which is not deleted yet.
    last: bool = True
    #: True: the same hop ids may be sent again at any later time (a generator that runs again after a restart).
    again: bool = False
    #: The input's FIFO group: nothing later of it is done before this one is.
    group: str | None = None
    #: Recorded together with the input's delete, by a broker that ``remembers_keys``.
    end: End | None = None


class Unwanted(BrokerError):
    """``feed`` was told that its messages are not wanted any more; some of them may have been sent."""

    def __init__(self) -> None:
        super().__init__("the messages are not wanted any more: their run has ended")


class OutputsRefused(BrokerError):
    """Outputs were refused for their size or content, while their queues take others.

    Raised by ``complete`` after everything else that it was given is done. No input of ``refused`` and ``unsent`` was
    deleted.

    ``refused``: the completions of refused outputs, each with its error. ``unsent``: completions that would have
    overtaken one of them, or a stale one, in its FIFO group. ``stale``: the handles that ``complete`` else returns.
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

    The copy's deduplication id is ``messages.ids.moved_id(hop, "dead", handle.message_id)``: with the original's, the
    dead-letter queue could drop the copy.
    """

    #: The delivery, which is deleted from its queue once the copy was accepted.
    handle: Handle
    #: The dead-letter queue.
    queue: str
    #: The original body.
    body: str
    #: The original hop id; another sender's id may be any text.
    hop: str
    #: ASCII JSON for the message attribute ``FAILURE_ATTRIBUTE``, which fits beside the rest; None: there is no room.
    failure: str | None
    #: FIFO group of the copy; None: the hop id, where the service takes it as a group.
    group: str | None = None
    #: The sender's attributes, which the copy keeps.
    attributes: tuple[Attribute, ...] = ()
    #: As of ``Completion``.
    end: End | None = None


@dataclass(frozen=True, slots=True)
class Depth:
    """Numbers of messages in one queue; approximate on SQS (ApproximateNumberOfMessages and its siblings)."""

    #: Messages that can be received now.
    visible: int
    #: Messages received and hidden, neither deleted nor released yet.
    in_flight: int
    #: Messages never received and not due yet.
    delayed: int

    @property
    def empty(self) -> bool:
        """Whether the queue has no message at all."""
        return not (self.visible or self.in_flight or self.delayed)


class Stray(NamedTuple):
    """A queue of a domain that no task of its pipeline uses, and that holds messages."""

    queue: str
    #: Number of its messages.
    messages: int
    #: Whether the broker knows the domain to be the owner; False: the name alone says so.
    owned: bool


class Wallet(Protocol):
    """A text that the processes of one engine share: the keeper writes it, the workers read it."""

    def read(self) -> str | None:
        """Return the text; None while there is none."""

    def write(self, text: str) -> None:
        """Replace the text; one that is too long is not kept."""


class Meter(Protocol):
    """Counts requests to the queue service; any thread may call it."""

    def request(self, operation: str, error: str | None) -> None:
        """Count a request that has ended.

        ``operation``: "receive", "send", "delete", "extend", "count" or "other". ``error``: "throttled",
        "credentials", "network", "server" or "refused"; None: the service did as it was asked.
        """

    def empty(self) -> None:
        """Count a receive, counted as a request too, that brought nothing."""

    def transport(self, name: str) -> None:
        """Note the way of the requests from now on, where there are two: "fast" or "boto3"."""


def count_requests(connection: Connection, meter: Meter) -> None:
    """Have a connection count its requests; one of another package may have no ``count_requests``, and counts none."""
    count = getattr(connection, "count_requests", None)
    if count is not None:
        count(meter)


class Connection(Protocol):
    """An open broker. It belongs to one process; any thread of it may call any method, several at once."""

    #: Completions per call at which a message costs least (SQS: 10, the limit of a batch). At least 1.
    batch: int
    #: Messages per receive at which a message costs least (SQS: 10, its limit).
    fetch: int
    #: Seconds of work that one receive may bring. More saves receives; less leaves other workers a share at the end of
    #: a backlog.
    ahead: float
    #: Calls of ``complete`` that may be under way at once: more than 1 where calls wait for a network.
    carriers: int
    #: Calls of ``receive`` that may be under way at once.
    receivers: int
    #: Seconds for which all counts of ``depth`` must stay zero before the queues count as empty; 0: counts are exact.
    settle: float
    #: Whether the service keeps the failed attempts (``Received.charges``, ``extend``). The engine then also takes
    #: ``dead_letter`` for one transaction that checks the receipt.
    keeps_charges: bool
    #: Longest wait of a finished message for others to share its ``complete``, seconds: saves calls, costs latency.
    linger: float

    @property
    def throttles(self) -> int:
        """Requests that the queue service has throttled so far."""

    @property
    def moved(self) -> bool:
        """Whether a new connection would reach other queues: the open file is no longer the one at its path."""

    def ensure(self, queues: Sequence[QueueSpec], *, create: bool) -> None:
        """Create missing queues (``create``), or raise ``QueueMissing`` for the first of them.

        Queues that are not ``owned`` are never created: a missing one raises. An existing queue is used as it is, and a
        warning (logger ``sqspipes_mp.brokers.NAME``) names each attribute that differs. The specs may come in any
        order; dead-letter queues are created before the queues that name them. Several processes may call it at once.
        Raises ``ConfigError`` as ``check_owners``, and ``BrokerError`` for an existing queue of the other type.
        """

    def check_owners(self, queues: Sequence[QueueSpec]) -> None:
        """Raise ``ConfigError`` where another domain owns one of the queues.

        A service that does not know owners does nothing (SQS); SQLite notes them in ``ensure``.
        """

    def strays(self, domain: str, known: Collection[str]) -> list[Stray]:
        """Return a domain's queues that hold messages, without those named in ``known``.

        An empty list where the service cannot list its queues (SQS, which needs a right for it).
        """

    def receive(
        self, queues: Sequence[str], max_messages: int, wait: float, visibility: float, *, attributes: bool = False
    ) -> list[Received]:
        """Return up to ``max_messages`` deliveries, hidden from other receives for ``visibility`` seconds.

        ``queues``: highest priority first; a message of a later queue comes only if the earlier ones have no more.
        Returns as soon as there is a delivery, and without one after ``wait`` seconds (0: at once) or soon after
        ``interrupt``. Waiting must not poll fast: an idle worker waits here for hours. ``attributes``: whether the
        deliveries have their senders' attributes, where the service has such. Raises ``QueueMissing``.
        """

    def complete(
        self,
        completions: Sequence[Completion],
        on_sent: Callable[[Completion], None] | None = None,
        still_ours: Callable[[Completion], bool] | None = None,
    ) -> list[Handle]:
        """Send all outputs, then delete each input whose outputs were all accepted; returns the stale handles.

        An input is never deleted before its outputs were accepted; where both are one transaction, all the better. A
        completion of a stale handle sends nothing, as far as the service can tell before it sends. Later completions of
        its FIFO group are not done either: those not sent yet are returned as stale, too, though their lease may still
        be held, so that the caller can give them back.

        ``on_sent`` is called for each completion between send and delete, where these are two calls.
        ``still_ours``: where sending may take several tries, it is asked before each of them; a completion for which it
        returns False sends nothing more, is not deleted and counts as stale.
        Raises ``OutputsRefused``; ``QueueMissing`` and other ``BrokerError``, with their inputs kept.
        """

    def feed(self, outputs: Sequence[Output], *, keyed: bool, wanted: Callable[[], bool] | None = None) -> list[int]:
        """Send messages that have no input; returns the positions of those that were dropped as sent before.

        Once it returns, the messages survive a power cut. ``keyed``: the hop ids are made of the user's keys, and the
        service remembers them as long as it can (SQLite: until the queue is purged; SQS: five minutes, on FIFO queues
        only). A service that does not tell which messages it dropped returns an empty list. Raises ``QueueMissing``, as
        far as possible before anything is sent (the caller creates the queue and feeds all again); ``MessageError`` for
        a message that its queue refuses.

        ``wanted`` is asked in the calling thread, every half second and before each further try, while a fault is
        waited for; once it returns False, ``Unwanted`` is raised: some of the messages may have been sent.
        """

    def extend(self, handles: Sequence[Handle], seconds: float, *, attempts: int = 0) -> list[Handle]:
        """Hide deliveries for ``seconds`` from now, 0 releases them; returns the stale handles.

        A delivery that cannot be hidden so long is hidden as long as the service allows (SQS: 12 hours from its
        receive), and is returned as stale where that is not possible either. ``attempts``: failed attempts of each of
        these messages so far, noted where the connection ``keeps_charges``. A smaller number than the noted one changes
        nothing, so that a repeated call counts once.
        """

    def dead_letter(self, letters: Sequence[DeadLetter]) -> list[Handle]:
        """Move deliveries to their dead-letter queues: send the copy first, then delete; returns the stale handles.

        A letter that its queue refuses for its size goes without its failure, rather than not at all.
        """

    def depth(self, queue: str) -> Depth:
        """Return the numbers of one queue. Raises ``QueueMissing``."""

    def address(self, queue: str) -> str:
        """Return a queue's address for other programs: its URL, or its name. Raises ``QueueMissing``."""

    def purge(self, queues: Sequence[str]) -> None:
        """Remove all messages of exactly these queues, and the remembered keys; missing queues are fine.

        Returns once the messages are gone and a message that is sent next stays.
        """

    def delete(self, queues: Sequence[str]) -> None:
        """Delete exactly these queues; missing ones are fine."""

    def tend(self) -> None:
        """Keep the wallet up to date. The keeper calls it about every half minute; cheap while nothing is due."""

    def interrupt(self) -> None:
        """Make every receive return soon with the messages it has, until ``receive_again``.

        Any thread may call it. All other methods go on.
        """

    def receive_again(self) -> None:
        """Undo ``interrupt``."""

    def close(self) -> None:
        """Close every socket and file; calls that still run end, or raise ``BrokerError``."""


class KeyedConnection(Connection, Protocol):
    """The connection of a broker that ``remembers_keys``.

    It can show keys and messages without a receive, and the ends that were recorded (``End``).
    """

    def keyed(self, queues: Sequence[str], hops: Sequence[str]) -> set[str]:
        """Return the hop ids that were fed to one of the queues with ``keyed=True``."""

    def keys(self, queue: str) -> tuple[int, float | None]:
        """Return how many hop ids a queue was fed with ``keyed=True``, and since when (epoch seconds; None: never)."""

    def bodies(self, queue: str) -> list[tuple[str, str, str | None]]:
        """Return body, message id and failure of each message of a queue, in flight or not; receives none."""

    def next_end(self) -> int:
        """Return a number greater than those of all ends recorded so far, and not of any later one."""

    def ended(self, queue: str, tokens: Sequence[str], before: int, *, kept: bool) -> dict[str, Ended]:
        """Return the values that have an end of this kind, with the first of their results numbered below ``before``.

        ``kept``: as of ``End``, here and below.
        """

    def unended(self, queue: str) -> set[str]:
        """Return the hop ids that were fed to the queue with ``keyed=True`` and have no end that is kept."""

    def results(
        self, queue: str, token: str, after: int, before: int, most: int, *, kept: bool
    ) -> list[tuple[int, str]]:
        """Return results of a value with their numbers, from above ``after`` to below ``before``: ``most`` at most."""

    def forget_results(self, queue: str, token: str, last: int) -> None:
        """Remove the results of a value, up to the number ``last``, that were not to be kept."""


def as_keyed(broker: Broker, connection: Connection) -> KeyedConnection | None:
    """Return a broker's connection as a ``KeyedConnection``; None where the broker does not remember keys."""
    return cast("KeyedConnection", connection) if broker.remembers_keys else None


class Broker(Protocol):
    """A queue service as the user declares it: picklable, opens nothing until ``open``.

    A pickled or forked copy must find the same queues. Constructing one raises ``ConfigError`` for a value that cannot
    be right.
    """

    @property
    def temporary(self) -> bool:
        """Whether the queues last only as long as the engine: its end calls ``cleanup``."""

    @property
    def remembers_keys(self) -> bool:
        """Whether keys are remembered until a purge, and the connection is a ``KeyedConnection``.

        ``map(resume=True)`` needs it.
        """

    @property
    def longest_hold(self) -> float | None:
        """Seconds from its receive for which a message can be kept hidden; None: for ever. SQS: 12 hours."""

    @property
    def longest_delay(self) -> float | None:
        """Longest ``put(delay=)``, seconds; None: any."""

    def check(self) -> None:
        """Raise ``ConfigError`` for a setting that is wrong as far as it shows without the network.

        Called in the process that forks, before its first use.
        """

    def warm(self) -> None:
        """Load modules and data that forked children can share. Called in the process that forks.

        It opens no file or socket that a child would inherit, and uses no network.
        """

    def open(
        self, *, patience: float | None = None, wallet: Wallet | None = None, attended: bool = False
    ) -> Connection:
        """Return a connection for this process. Raises ``ConfigError`` and ``BrokerError``.

        ``patience``: seconds after which a call without an answer raises ``BrokerBusy``; None: calls go on for ever.
        ``attended``: a person or program waits for the calls, and no worker does: a service that never answered is
        given up as at boot, one that stopped answering after ``ATTENDED`` seconds, told every ``TOLD_EVERY`` seconds.
        ``wallet``: place for a text that each process would otherwise fetch by itself (credentials). The connection
        with patience, which is the keeper's, fills it.
        """

    def exists(self) -> bool:
        """Return False where it is known without a request that no message was ever sent; else True."""

    def lock_file(self, domain: str) -> str | None:
        """Return the path of a file that a run of ``map`` locks, so that a domain has one at a time.

        All processes that use the queues must see the same file. None: there is no such place, and nothing is locked.
        """

    def cleanup(self) -> None:
        """Remove the queues of a ``temporary`` broker; do nothing otherwise."""

    def describe(self) -> str:
        """Return a short text for logs, without secrets."""
