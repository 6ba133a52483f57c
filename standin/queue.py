"""One queue: states of messages, receipts, moves to the dead-letter queue.

It has no network and no clock: every method is given ``now``, seconds. No method visits more messages than it returns.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from standin.errors import SqsError, invalid, stale
from standin.line import Line
from standin.message import Message, State
from standin.shelf import Shelf
from standin.window import Window

#: Longest visibility timeout of one delivery, seconds (Amazon SQS API Reference, ChangeMessageVisibility).
LONGEST = 43_200
#: Seconds for which deduplication ids and receive attempts are remembered (SendMessage, ReceiveMessage).
REMEMBERED = 300

_PAD = "a" * 340  # Receipt handles of SQS are some 400 characters long.


@dataclass(slots=True)
class Attempt:
    """The result of a receive with a ReceiveRequestAttemptId."""

    #: Each message with its deliveries and changes of visibility at that time.
    deliveries: list[tuple[Message, int, int]]
    #: Seconds.
    visibility: int


@dataclass(slots=True)
class Tally:
    """The ledger's counts for a queue."""

    sent: int = 0
    duplicates_dropped: int = 0
    delivered: int = 0
    duplicates_delivered: int = 0
    deleted: int = 0
    stale_deletes: int = 0
    redriven: int = 0
    purged: int = 0
    lost_to_purge: int = 0


@dataclass(slots=True, eq=False)
class Queue:
    """A queue and its messages."""

    name: str
    arn: str
    fifo: bool
    new_shelf: Callable[[], Shelf]
    line: Line
    #: Most messages in flight.
    limit: int
    #: See ``Options.lenient_change``.
    lenient: bool
    #: Decides for each delivery, see ``Dice.duplicate``.
    duplicates: Callable[[], str]
    created: int
    changed: int
    attributes: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    #: Its dead-letter queue.
    target: "Queue | None" = None
    #: maxReceiveCount of its redrive policy.
    most_receives: int = 0
    shelf: Shelf = field(init=False)
    #: Messages that are neither deleted nor purged, by id.
    messages: dict[str, Message] = field(default_factory=dict)
    #: Deleted and purged messages, for the ledger; None: not kept.
    past: list[Message] | None = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    in_flight: int = 0
    delayed: int = 0
    counter: int = 0
    purged_until: float = 0.0
    #: Heap of hidden messages: end, tie-breaker, message. An entry is passed over once its message has another end.
    hidden: list[tuple[float, int, Message]] = field(default_factory=list)
    #: Messages in flight that come a second time.
    echoes: deque[Message] = field(default_factory=deque)
    attempts: Window[Attempt] = field(default_factory=lambda: Window(REMEMBERED))
    sent_ids: Window[Message] = field(default_factory=lambda: Window(REMEMBERED))

    def __post_init__(self) -> None:
        self.shelf = self.new_shelf()

    @property
    def visible(self) -> int:
        """Number of messages that can be received now."""
        return len(self.messages) - self.in_flight - self.delayed

    def original(self, message: Message, now: float) -> Message | None:
        """Return the message of which this one is a duplicate; without one, remember its deduplication id (FIFO)."""
        scope = message.group or "" if self.attributes.get("DeduplicationScope") == "messageGroup" else ""
        key = (scope, message.dedup or "")
        found = self.sent_ids.get(key, now)
        if found is None:
            self.sent_ids.put(key, message, now)
        else:
            self.tally.duplicates_dropped += 1
        return found

    def add(self, message: Message, delay: float, now: float) -> None:
        """Add a new message, hidden for ``delay`` seconds."""
        self.tally.sent += 1
        if now < self.purged_until:
            self.tally.lost_to_purge += 1
            message.purged = True
            self._gone(message)
            return
        self.messages[message.id] = message
        if delay:
            message.state = State.DELAYED
            self.delayed += 1
            self._hide(message, now + delay)
        else:
            message.state = State.VISIBLE
        self.shelf.sent(message)

    def show_due(self, now: float) -> None:
        """Show the hidden messages that are due."""
        returned: list[Message] = []
        heap = self.hidden
        while heap and heap[0][0] <= now:
            when, _, message = heappop(heap)
            if message.hidden_until != when:
                continue
            message.hidden_until = 0.0
            if message.state is State.DELAYED:
                self.delayed -= 1
                message.state = State.VISIBLE
                self.shelf.shown(message)
            else:
                self.in_flight -= 1
                message.state = State.VISIBLE
                returned.append(message)
        if returned:
            self.shelf.returned(returned)

    def next_due(self) -> float | None:
        """Return the time at which a hidden message is due, or earlier; None: no message is hidden."""
        return self.hidden[0][0] if self.hidden else None

    def receive(self, count: int, visibility: int, now: float, now_ms: int) -> list[tuple[Message, str]]:
        """Deliver up to ``count`` messages with their receipts; redrive those that were received too often."""
        self.show_due(now)
        found: list[Message] = []
        while self.echoes and len(found) < count:
            message = self.echoes.popleft()
            if message.state is State.IN_FLIGHT and self.messages.get(message.id) is message:
                self.tally.duplicates_delivered += 1
                self.in_flight -= 1
                found.append(message)
        room = min(count, self.limit - self.in_flight)
        while taken := self.shelf.take_visible(room - len(found)):
            for message in taken:
                if self.target is not None and message.receives_here >= self.most_receives:
                    self._redrive(message, self.target, now, now_ms)
                else:
                    found.append(message)
        return [(message, self._deliver(message, visibility, now, now_ms)) for message in found]

    def again(self, attempt: str, now: float) -> list[tuple[Message, str]] | None:
        """Return the result of an earlier try of this receive, its messages hidden again; None: there is none."""
        self.show_due(now)
        past = self.attempts.get(attempt, now)
        if past is None or not all(
            m.state is State.IN_FLIGHT and (m.receives, m.changes) == (receives, changes)
            for m, receives, changes in past.deliveries
        ):
            self.attempts.drop(attempt)
            return None
        for message, _, _ in past.deliveries:
            self._hide(message, now + past.visibility)
        return [(message, self.receipt(message)) for message, _, _ in past.deliveries]

    def remember(self, attempt: str, deliveries: list[tuple[Message, str]], visibility: int, now: float) -> None:
        """Keep the result of a receive for a retry of it."""
        kept = [(message, message.receives, message.changes) for message, _ in deliveries]
        self.attempts.put(attempt, Attempt(kept, visibility), now)

    def receipt(self, message: Message) -> str:
        """Return the receipt handle of a message's latest delivery."""
        return f"AQEB{self.name}/{message.id}/{message.receives}/{_PAD}"

    def delete(self, receipt: str, now: float) -> None:
        """Delete a delivery's message. A stale receipt is ignored on a standard queue, and an error on a FIFO queue."""
        self.show_due(now)
        message, current = self._find(receipt)
        if message is None:
            return
        if not current or (self.fifo and message.state is not State.IN_FLIGHT):
            self.tally.stale_deletes += 1
            if self.fifo:
                error = invalid("ReceiptHandle", receipt, "The receipt handle has expired.")
                error.blame = False
                raise error
            return
        message.deletes += 1
        self.tally.deleted += 1
        if message.state is State.IN_FLIGHT:
            self.in_flight -= 1
            self.shelf.freed(message)
        message.hidden_until = 0.0
        if message.revives:
            message.revives = False
            self.tally.duplicates_delivered += 1
            message.state = State.VISIBLE
            self.shelf.returned([message])
            return
        del self.messages[message.id]
        self._gone(message)

    def change(self, receipt: str, visibility: int, now: float) -> None:
        """Hide a delivery for ``visibility`` seconds from now; 0 releases it."""
        self.show_due(now)
        message, current = self._find(receipt)
        if message is None or not current:
            raise stale(receipt)
        if message.state is not State.IN_FLIGHT:
            if not self.lenient or self.fifo:
                raise SqsError("MessageNotInflight", f"Message {message.id} is not in flight.")
            message.state = State.IN_FLIGHT
            self.in_flight += 1
        if now + visibility > message.received_at + LONGEST:
            reason = f"Total VisibilityTimeout for the message is beyond the limit [{LONGEST} seconds]"
            error = invalid("VisibilityTimeout", visibility, reason)
            error.blame = False
            raise error
        message.changes += 1
        if visibility:
            self._hide(message, now + visibility)
            return
        message.hidden_until = 0.0
        message.state = State.VISIBLE
        self.in_flight -= 1
        self.shelf.returned([message])

    def purge(self) -> None:
        """Remove all messages."""
        self.tally.purged += len(self.messages)
        for message in self.messages.values():
            message.purged = True
            message.hidden_until = 0.0
            message.listed = False
            self._gone(message)
        self.messages.clear()
        self.shelf = self.new_shelf()
        self.hidden.clear()
        self.echoes.clear()
        self.in_flight = self.delayed = 0

    def _deliver(self, message: Message, visibility: int, now: float, now_ms: int) -> str:
        message.state = State.IN_FLIGHT
        self.in_flight += 1
        message.receives += 1
        message.receives_here += 1
        message.changes = 0
        message.received_at = now
        message.first_received_ms = message.first_received_ms or now_ms
        self.tally.delivered += 1
        self._hide(message, now + visibility)
        if not self.fifo:
            twice = self.duplicates()
            if twice == "twice":
                self.echoes.append(message)
            elif twice:
                message.revives = True
        return self.receipt(message)

    def _hide(self, message: Message, until: float) -> None:
        message.hidden_until = until
        self.counter += 1
        heappush(self.hidden, (until, self.counter, message))
        if len(self.hidden) > 4 * (self.in_flight + self.delayed) + 1000:
            self.hidden[:] = [entry for entry in self.hidden if entry[2].hidden_until == entry[0]]
            heapify(self.hidden)

    def _find(self, receipt: str) -> tuple[Message | None, bool]:
        """Return the message of a receipt, if it is there, and whether the receipt is current."""
        parts = receipt.split("/")
        if len(parts) != 4 or not parts[0].startswith("AQEB") or not parts[2].isdecimal():
            raise SqsError("ReceiptHandleIsInvalid", f'The input receipt handle "{receipt}" is not a valid one.')
        if parts[0][4:] != self.name:
            raise SqsError("ReceiptHandleIsInvalid", "The input receipt handle is of another queue.")
        message = self.messages.get(parts[1])
        return message, message is not None and message.receives == int(parts[2])

    def _redrive(self, message: Message, target: "Queue", now: float, now_ms: int) -> None:
        del self.messages[message.id]
        # The shelf counts it as in flight: its group waits for it.
        self.shelf.freed(message)
        self.tally.redriven += 1
        message.redriven += 1
        message.source_arn = self.arn
        message.receives_here = 0
        target.counter += 1
        message.number = target.counter
        if self.fifo:
            message.dedup = message.id
            message.sent_ms = now_ms
            target.original(message, now)
        target.add(message, 0, now)
        target.line.stir()

    def _gone(self, message: Message) -> None:
        message.state = State.GONE
        message.forget()
        if self.past is not None:
            self.past.append(message)
