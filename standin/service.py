"""The stand-in's state, and a request's way through it: credentials, faults, operation, ledger."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from random import Random
from typing import Any

from standin.errors import SqsError
from standin.faults import Dice, Fate
from standin.line import Line, Timer
from standin.options import Options
from standin.queue import Queue
from standin.shelf import FifoShelf, Shelf, StandardShelf

Json = dict[str, Any]
#: Is called with the reply's body or the error: at once, or at the end of a long poll.
Reply = Callable[[str | SqsError], None]

_KEY = re.compile(r"Credential=([^/,\s]+)/")
_MOST_VIOLATIONS = 1000


class LoopClock:
    """The event loop's time, plus the seconds by which tests have moved it forward."""

    def __init__(self) -> None:
        self.offset = 0.0

    def now(self) -> float:
        return time.monotonic() + self.offset

    def now_ms(self) -> int:
        return int((time.time() + self.offset) * 1000)

    def date(self) -> str:
        """Return the time as HTTP writes it."""
        return formatdate(time.time() + self.offset, usegmt=True)

    def call_at(self, when: float, do: Callable[[], None]) -> Timer:
        return self.call_later(max(0.0, when - self.now()), do)

    def call_later(self, seconds: float, do: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(seconds, do)


@dataclass(slots=True)
class Count:
    """The ledger's counts for an operation."""

    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    #: Requests without a reply just now, and the most there were at once.
    under_way: int = 0
    most: int = 0
    #: Monotonic seconds at the first request, and at the last reply; 0 before these.
    first: float = 0.0
    last: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Call:
    """One request."""

    operation: str
    request: Json
    fate: Fate
    reply: Reply
    #: Takes a long poll out of its line, for a client that is gone.
    withdraw: Callable[[], None] | None = None


Operation = Callable[["Service", Call], str | None]


@dataclass(slots=True, eq=False)
class Service:
    """The stand-in's state: options, queues, ledger, dice."""

    options: Options
    #: Operations by name. Each returns the reply's body, or None where the reply comes later.
    operations: dict[str, Operation]
    clock: LoopClock = field(default_factory=LoopClock)
    #: Queues by name.
    queues: dict[str, Queue] = field(default_factory=dict)
    #: Times from which deleted queues can be created again, by name.
    deleted: dict[str, float] = field(default_factory=dict)
    #: Counts by operation.
    counts: dict[str, Count] = field(default_factory=dict)
    #: Requests that broke a limit.
    violations: list[Json] = field(default_factory=list)
    #: Access keys that are refused as expired.
    expired_keys: set[str] = field(default_factory=set)
    #: Number of message ids so far.
    made: int = 0
    #: End of all message ids.
    tail: str = field(init=False)
    random: Random = field(init=False)
    dice: Dice = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.options.seed)
        tail = f"{self.random.getrandbits(96):024x}"
        self.tail = f"{tail[:4]}-{tail[4:8]}-{tail[8:12]}-{tail[12:]}"
        self.dice = Dice(self.options.faults, self.options.seed)

    def count(self, operation: str) -> Count:
        """Return the counts of an operation."""
        count = self.counts.get(operation)
        if count is None:
            count = self.counts[operation] = Count()
        return count

    def call(self, call: Call, authorization: str) -> None:
        """Answer a request: now, or at the end of its long poll."""
        try:
            self._check_key(authorization)
            if call.fate.refuse is not None:
                raise call.fate.refuse
            do = self.operations.get(call.operation)
            if do is None:
                raise SqsError("UnsupportedOperation", f"Unsupported operation {call.operation}.")
            body = do(self, call)
        except SqsError as error:
            self.refused(call, error)
            call.reply(error)
        else:
            if body is not None:
                call.reply(body)

    def begins(self, operation: str) -> Count:
        """Count a request that is under way from now on; return the operation's counts."""
        count = self.count(operation)
        count.requests += 1
        count.first = count.first or time.monotonic()
        count.under_way += 1
        count.most = max(count.most, count.under_way)
        return count

    def refused(self, call: Call, error: SqsError) -> None:
        """Count an error of a request, or of an entry of its batch, in the ledger."""
        errors = self.count(call.operation).errors
        errors[error.code] = errors.get(error.code, 0) + 1
        if error.blame and len(self.violations) < _MOST_VIOLATIONS:
            text = json.dumps(call.request)
            self.violations.append(
                {
                    "operation": call.operation,
                    "code": error.code,
                    "message": error.message[:500],
                    "request": text if len(text) <= 2000 else text[:1900] + f"... ({len(text)} characters)",
                }
            )

    def queue(self, request: Json) -> Queue:
        """Return the queue of a request. Raises ``SqsError``."""
        url = request.get("QueueUrl")
        if not isinstance(url, str) or not url:
            raise SqsError("MissingRequiredParameterException", "The request must contain the parameter QueueUrl.")
        account, _, name = url.rpartition("/")
        found = self.queues.get(name)
        if found is None or not account.endswith(self.options.account):
            raise SqsError("QueueDoesNotExist", "The specified queue does not exist.")
        return found

    def new_queue(self, name: str, *, fifo: bool) -> Queue:
        """Return a new queue with its line; it is not in ``queues`` yet."""

        def new_shelf() -> Shelf:
            return FifoShelf() if fifo else StandardShelf(self.random, self.options.shuffle)

        line = Line(self.clock)
        now = self.clock.now_ms() // 1000
        queue = Queue(
            name=name,
            arn=f"arn:aws:sqs:{self.options.region}:{self.options.account}:{name}",
            fifo=fifo,
            new_shelf=new_shelf,
            line=line,
            limit=self.options.in_flight,
            lenient=bool(self.options.lenient_change),
            duplicates=self.dice.duplicate,
            created=now,
            changed=now,
            past=[] if self.options.ledger else None,
        )

        def next_due() -> float | None:
            queue.show_due(self.clock.now())
            return queue.next_due()

        line.next_due = next_due
        return queue

    def new_id(self) -> str:
        """Return a new message id in the form of SQS's."""
        # A multiplication by an odd number spreads the counter over all 32 bits without a collision.
        self.made = (self.made + 1) & 0xFFFFFFFF
        return f"{self.made * 0x9E3779B1 & 0xFFFFFFFF:08x}-{self.tail}"

    def reset(self) -> None:
        """Forget queues, messages, counts and planned faults; the probabilities of faults stay."""
        for queue in self.queues.values():
            queue.line.dismiss()
        for held in (self.queues, self.deleted, self.counts, self.violations, self.expired_keys):
            held.clear()
        self.dice.hits.clear()
        self.dice.plans.clear()

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self.clock.offset += seconds
        for queue in list(self.queues.values()):
            queue.show_due(self.clock.now())
            queue.line.stir()

    def _check_key(self, authorization: str) -> None:
        if not authorization:
            raise SqsError("MissingAuthenticationTokenException", "Missing Authentication Token")
        if not self.options.key and not self.expired_keys:
            return
        found = _KEY.search(authorization)
        key = found[1] if found else ""
        if key in self.expired_keys:
            raise SqsError("ExpiredTokenException", "The security token included in the request is expired")
        if self.options.key and key != self.options.key:
            text = "The security token included in the request is invalid."
            raise SqsError("UnrecognizedClientException", text)
