"""The port's connection on one SQLite file (any process that has it open, all its threads)."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TypeVar

from sqspipes_mp.brokers.base import (
    Completion,
    DeadLetter,
    Depth,
    Ended,
    Handle,
    Meter,
    Output,
    QueueSpec,
    Received,
    Stray,
)
from sqspipes_mp.brokers.sqlite import complete as sqlite_complete
from sqspipes_mp.brokers.sqlite import deliveries as sqlite_deliveries
from sqspipes_mp.brokers.sqlite import keys as sqlite_keys
from sqspipes_mp.brokers.sqlite import owners as sqlite_owners
from sqspipes_mp.brokers.sqlite import queues as sqlite_queues
from sqspipes_mp.brokers.sqlite.file import File
from sqspipes_mp.brokers.sqlite.session import Session
from sqspipes_mp.brokers.sqlite.wake import Waiter
from sqspipes_mp.errors import BrokerError, QueueMissing

T = TypeVar("T")

log = logging.getLogger("sqspipes_mp.brokers.sqlite")
#: Most characters of bodies in one transaction. SQLite never gives back the memory that staging them takes.
_MOST = 2 << 20
#: Seconds between two rounds of deleting expired rows, in each process that completes messages.
_TIDY_EVERY = 10.0
#: Milliseconds between the wall clock and the file's from which one of them was set.
_SET = 1_000
#: Seconds to wait before the next try when a message was due and another process took it first.
_OUTRUN = 0.001
#: Longest wait of a receive between two tries, seconds. A sender that cannot get the GIL announces its commit late, and
#: one that was killed just then never does.
_LONGEST_REST = 5.0


class SQLiteConnection:
    """One process's connection; the file is opened at the first call, and again after a fork."""

    #: Larger transactions save hardly any time per message, and keep other processes waiting longer.
    batch = 100
    fetch = 40
    #: A receive takes well below a millisecond: fetching little costs little.
    ahead = 0.05
    carriers = receivers = 1
    throttles = 0
    #: Counts are exact.
    settle = 0.0
    keeps_charges = True
    #: A transaction for one message costs about as much as one for ten.
    linger = 0.02

    def __init__(
        self, file: str, *, durable: bool, patience: float | None = None, attended: bool = False, mode: int = 0o600
    ) -> None:
        self._waiter = Waiter(file)
        self._file = File(
            file, durable=durable, patience=patience, attended=attended, mode=mode, ring=self._waiter.ring
        )
        self._tidy_at = time.monotonic() + _TIDY_EVERY
        self._warned: set[str] = set()
        #: Milliseconds of the wall clock beyond the file's at the last ``tend``; None before the first.
        self._skew: int | None = None
        #: Counts transactions; None: nobody does.
        self._meter: Meter | None = None

    def count_requests(self, meter: Meter) -> None:
        """Have calls from now on counted: each is a transaction, or few."""
        self._meter = meter

    def _count(self, operation: str) -> None:
        if self._meter is not None:
            self._meter.request(operation, None)

    @property
    def moved(self) -> bool:
        """Whether the open file is no longer the one at its path."""
        return self._file.moved

    def ensure(self, queues: Sequence[QueueSpec], *, create: bool) -> None:
        """Create missing queues (``create``) or raise ``QueueMissing``; warn of attributes that differ.

        Raises ``BrokerError`` for a queue that exists with the other type, ``ConfigError`` for another pipeline's.
        """
        absent, ownerless = self._file.read(partial(self._find_unmade, queues))
        if absent and not create:
            raise QueueMissing(absent[0].name, "Create it first, or run with create_queues=True")
        if absent or ownerless:
            self._file.write(partial(self._make, absent, queues), ring=bool(absent))
        new = {spec.name for spec in absent}
        for spec in queues:
            if spec.owned and spec.name not in new and spec.name not in self._warned:
                texts = self._file.read(partial(sqlite_queues.differences, spec=spec))
                if texts:
                    self._warned.add(spec.name)
                    log.warning("queue %s is used as it is: %s", spec.name, "; ".join(texts))

    def check_owners(self, queues: Sequence[QueueSpec]) -> None:
        """Raise ``ConfigError`` where another pipeline owns one of the queues."""
        self._file.read(lambda session: sqlite_owners.check(session, queues, self._file.file))

    def strays(self, domain: str, known: Collection[str]) -> list[Stray]:
        """Return a domain's queues that hold messages, without the ``known`` ones."""
        return self._file.read(lambda session: sqlite_owners.strays(session, domain, known))

    def receive(
        self,
        queues: Sequence[str],
        max_messages: int,
        wait: float,
        visibility: float,
        *,
        attributes: bool = False,  # noqa: ARG002  (SQLite messages have none)
    ) -> list[Received]:
        """Return up to ``max_messages`` deliveries, hidden from others for ``visibility`` seconds.

        Raises ``QueueMissing`` for a queue that does not exist, also for one that is deleted during the wait.
        """
        if self._waiter.interrupted or max_messages < 1:
            return []
        try:
            taken = self._receive(queues, max_messages, wait, visibility)
        except BrokerError:
            if self._waiter.interrupted:
                return []  # Another thread closed the connection during the receive.
            raise
        self._count("receive")
        if self._meter is not None and not taken:
            self._meter.empty()
        return taken

    def complete(
        self,
        completions: Sequence[Completion],
        on_sent: Callable[[Completion], None] | None = None,  # noqa: ARG002  (the port's)
        still_ours: Callable[[Completion], bool] | None = None,  # noqa: ARG002  (the port's)
    ) -> list[Handle]:
        """Send outputs and delete their inputs; returns the stale handles, for which nothing was sent.

        A completion's outputs and the delete of its input are one transaction, so ``on_sent`` is never called (no
        process sees the sends without the delete), and neither is ``still_ours`` (the transaction checks the receipt).
        Raises ``QueueMissing``.
        """
        if not completions:
            return []
        stale: list[Handle] = []
        for part in bounded(completions, sqlite_complete.sizes(completions)):
            ring = sqlite_complete.rings(part)
            stale += self._file.write(partial(sqlite_complete.complete, completions=part, held_up=stale), ring=ring)
        for completion in completions:
            if completion.input is None and completion.outputs:
                self._file.sync()
                break
        self._count("delete" if completions[0].input is not None else "send")
        self._tidy()
        return stale

    def feed(self, outputs: Sequence[Output], *, keyed: bool, wanted: Callable[[], bool] | None = None) -> list[int]:
        """Send messages that have no input; returns the places of those whose hop id was known, which were dropped."""
        if not outputs:
            return []
        parts = list(bounded(outputs, [len(output.body) for output in outputs]))
        if len(parts) > 1:
            # The caller creates a missing queue and feeds all again: a missing one is found before anything is sent.
            for queue in dict.fromkeys(output.queue for output in outputs):
                self._file.read(partial(sqlite_queues.existing, name=queue), wanted)
        seen: list[int] = []
        sent = 0
        for part in parts:
            job = partial(sqlite_complete.feed, outputs=part, keyed=keyed)
            found = self._file.write(job, ring=True, wanted=wanted)
            seen += [sent + place for place in found]
            sent += len(part)
        self._file.sync(wanted)
        self._tidy()
        return seen

    def keyed(self, queues: Sequence[str], hops: Sequence[str]) -> set[str]:
        """Return the hop ids that were fed with a key to one of the queues; the file forgets them at a purge only."""
        return self._file.read(lambda session: sqlite_keys.keyed(session, queues, hops))

    def keys(self, queue: str) -> tuple[int, float | None]:
        """Return the number of a queue's keys, and since when there are any (epoch seconds)."""
        return self._file.read(lambda session: sqlite_keys.keys(session, queue))

    def next_end(self) -> int:
        """Return a number greater than those of the ends recorded so far."""
        return self._file.read(sqlite_keys.next_end)

    def ended(self, queue: str, tokens: Sequence[str], before: int, *, kept: bool) -> dict[str, Ended]:
        """Return the values with such an end, and the first of their results numbered below ``before``."""
        return self._file.read(lambda session: sqlite_keys.ended(session, queue, tokens, before, kept=kept))

    def unended(self, queue: str) -> set[str]:
        """Return the hop ids of a queue's keys whose values have no end that is kept."""
        return self._file.read(lambda session: sqlite_keys.unended(session, queue))

    def results(
        self, queue: str, token: str, after: int, before: int, most: int, *, kept: bool
    ) -> list[tuple[int, str]]:
        """Return up to ``most`` results of a value, and their numbers: above ``after``, below ``before``."""
        return self._file.read(
            lambda session: sqlite_keys.results(session, queue, token, after, before, most, kept=kept)
        )

    def forget_results(self, queue: str, token: str, last: int) -> None:
        """Remove the results of a value, up to the number ``last``, that were not to be kept."""
        self._file.write(lambda session: sqlite_keys.forget_results(session, queue, token, last))

    def extend(self, handles: Sequence[Handle], seconds: float, *, attempts: int = 0) -> list[Handle]:
        """Hide deliveries for ``seconds`` from now (0 releases them); returns the stale handles."""
        if not handles:
            return []
        stale = self._file.write(
            lambda session: sqlite_deliveries.extend(session, handles, seconds, attempts=attempts), ring=True
        )
        self._count("extend")
        return stale

    def dead_letter(self, letters: Sequence[DeadLetter]) -> list[Handle]:
        """Move deliveries to their dead-letter queues in one transaction; returns the stale handles."""
        if not letters:
            return []
        return self._file.write(lambda session: sqlite_deliveries.dead_letter(session, letters), ring=True)

    def depth(self, queue: str) -> Depth:
        """Count one queue, exactly. Raises ``QueueMissing``."""
        depth = self._file.read(lambda session: sqlite_queues.depth(session, queue))
        self._count("count")
        return depth

    def bodies(self, queue: str) -> list[tuple[str, str, str | None]]:
        """Return body, message id and failure of each message of a queue, in flight or not; receives none."""
        return self._file.read(lambda session: sqlite_queues.bodies(session, queue))

    def address(self, queue: str) -> str:
        """Return a queue's name, if it exists. Raises ``QueueMissing``."""
        return self._file.read(lambda session: sqlite_queues.existing(session, queue))

    def purge(self, queues: Sequence[str]) -> None:
        """Remove all messages of the queues and forget their hop ids; missing queues are fine."""
        self._file.write(lambda session: sqlite_queues.empty(session, queues, delete=False), ring=True)
        self._clear()

    def delete(self, queues: Sequence[str]) -> None:
        """Delete the queues; missing ones are fine."""
        self._file.write(lambda session: sqlite_queues.empty(session, queues, delete=True), ring=True)
        # A transaction of its own: retried together, the first would delete a queue that another process created since.
        self._file.write(sqlite_owners.forget)
        self._clear()

    def tend(self) -> None:
        """Bring delayed messages forward where the wall clock was set forward: their due times are its."""
        skew = self._file.read(lambda session: time.time_ns() // 1_000_000 - session.now())
        if self._skew is None or abs(skew - self._skew) > _SET:
            self._skew = skew
            while self._file.write(lambda session: sqlite_queues.redate(session, skew), ring=True):
                pass

    def interrupt(self) -> None:
        """Make receives return at once, until ``receive_again``; any thread may call it."""
        self._waiter.interrupt()

    def receive_again(self) -> None:
        """Undo ``interrupt``."""
        self._waiter.receive_again()

    def close(self) -> None:
        """Close every descriptor of this process; calls still running end."""
        self._waiter.close()
        self._file.close()

    def _receive(self, queues: Sequence[str], max_messages: int, wait: float, visibility: float) -> list[Received]:
        """Receive until there is a delivery, the wait is over or the interrupt comes."""
        deadline = time.monotonic() + wait
        taken, due = self._receive_once(queues, max_messages, visibility)
        if taken or wait <= 0:
            return taken
        with self._waiter.ear() as ear:
            while not self._waiter.interrupted:
                ear.listen()
                taken, due = self._receive_once(queues, max_messages, visibility)
                remaining = deadline - time.monotonic()
                if taken or remaining <= 0:
                    return taken
                ear.wait(min(remaining, due, _LONGEST_REST))
        return []

    def _receive_once(
        self, queues: Sequence[str], max_messages: int, visibility: float
    ) -> tuple[list[Received], float]:
        """Return deliveries, and the seconds until the next try is worth it."""
        # The read costs no turn at the write lock, which idle processes would otherwise take from busy ones.
        due = self._file.read(lambda session: session.next_due(queues))
        if due > 0:
            return [], due
        taken, moved = self._file.write(
            lambda session: sqlite_deliveries.take_messages(session, queues, max_messages, visibility)
        )
        if moved:
            self._file.ring()
        return taken, _OUTRUN

    def _find_unmade(self, specs: Sequence[QueueSpec], session: Session) -> tuple[list[QueueSpec], list[QueueSpec]]:
        """Return the queues that are missing, and the own queues without an owner."""
        session.refresh()
        # The owner is checked before the type: a queue of another pipeline explains a wrong type, too.
        ownerless = sqlite_owners.check(session, specs, self._file.file)
        return sqlite_queues.missing(session, specs), ownerless

    def _make(self, absent: Sequence[QueueSpec], specs: Sequence[QueueSpec], session: Session) -> None:
        """Create the missing queues, and note the owner of all own ones."""
        sqlite_queues.create(session, absent)
        sqlite_owners.adopt(session, specs, self._file.file)

    def _clear(self) -> None:
        while self._file.write(sqlite_queues.clear):
            pass

    def _tidy(self) -> None:
        now = time.monotonic()
        if now < self._tidy_at:
            return
        # Without a lock: two threads that tidy at once do no harm.
        self._tidy_at = now + _TIDY_EVERY
        self._file.write(sqlite_queues.tidy)


def bounded(items: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    """Cut items into runs of at most ``_MOST`` characters in all; a longer item is a run of its own."""
    start = total = 0
    for place, length in enumerate(sizes):
        if place > start and total + length > _MOST:
            yield items[start:place]
            start, total = place, 0
        total += length
    yield items[start:]
