"""The port's connection on one SQLite file (any process that has it open, all its threads)."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TypeVar

from sqspipes_mp.brokers.base import Completion, DeadLetter, Depth, Handle, Output, QueueSpec, Received, Stray
from sqspipes_mp.brokers.sqlite import complete as sqlite_complete
from sqspipes_mp.brokers.sqlite import leases as sqlite_leases
from sqspipes_mp.brokers.sqlite import owners as sqlite_owners
from sqspipes_mp.brokers.sqlite import queues as sqlite_queues
from sqspipes_mp.brokers.sqlite import take as sqlite_take
from sqspipes_mp.brokers.sqlite.file import File
from sqspipes_mp.brokers.sqlite.session import Session
from sqspipes_mp.brokers.sqlite.wake import Waiter
from sqspipes_mp.errors import BrokerError, QueueMissing

T = TypeVar("T")

_log = logging.getLogger("sqspipes_mp.brokers.sqlite")
#: Characters of bodies in one transaction: SQLite keeps the memory that it needs for staging them.
_MOST = 2 << 20
#: Seconds between two rounds of clearing away what is past its time, in each process that completes messages.
_TIDY_EVERY = 10.0
#: Seconds until the next look after another process was quicker.
_OUTRUN = 0.001
#: Seconds until the next look in any case: a process that cannot get the GIL announces what it has sent late.
_LONGEST_REST = 5.0


class SQLiteConnection:
    """One process's connection; the file is opened at the first call, and again after a fork."""

    #: Completions per transaction. Larger ones save hardly any time per message, and keep others waiting longer.
    batch = 100
    fetch = 40
    #: A receive takes well below a millisecond.
    ahead = 0.05
    carriers = receivers = 1
    throttles = 0
    settle = 0.0
    keeps_charges = True
    #: A transaction for one message costs about as much as one for ten: wait a little for company.
    linger = 0.02

    def __init__(self, file: str, *, durable: bool, patience: float | None = None) -> None:
        self._file = File(file, durable=durable, patience=patience)
        self._waiter = Waiter(self._file.wal)
        self._tidy_at = time.monotonic() + _TIDY_EVERY
        self._warned: set[str] = set()

    def ensure(self, queues: Sequence[QueueSpec], *, create: bool) -> None:
        """Create what is missing (``create``) or raise ``QueueMissing``; warn of attributes that differ.

        Raises ``BrokerError`` for a queue that exists with the other type, ``ConfigError`` for another pipeline's.
        """
        absent, ownerless = self._file.read(partial(self._unmade, queues))
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
                    _log.warning("queue %s is used as it is: %s", spec.name, "; ".join(texts))

    def check_owners(self, queues: Sequence[QueueSpec]) -> None:
        """Raise ``ConfigError`` where one of these is another pipeline's own."""
        self._file.read(lambda session: sqlite_owners.check(session, queues, self._file.file))

    def strays(self, domain: str, known: Collection[str]) -> list[Stray]:
        """Return a domain's queues besides the known ones that hold messages."""
        return self._file.read(lambda session: sqlite_owners.strays(session, domain, known))

    def receive(
        self,
        queues: Sequence[str],
        max_messages: int,
        wait: float,
        visibility: float,
        *,
        attributes: bool = False,  # noqa: ARG002  (there are none here)
    ) -> list[Received]:
        """Return up to ``max_messages`` deliveries, hidden from others for ``visibility`` seconds.

        Raises ``QueueMissing`` for a queue that does not exist, also if it is deleted meanwhile.
        """
        if self._waiter.interrupted or max_messages < 1:
            return []
        try:
            return self._receive(queues, max_messages, wait, visibility)
        except BrokerError:
            if self._waiter.interrupted:
                return []  # Closed by another thread in the middle of it.
            raise

    def complete(
        self,
        completions: Sequence[Completion],
        on_sent: Callable[[Completion], None] | None = None,  # noqa: ARG002  (the port's)
        still_ours: Callable[[Completion], bool] | None = None,  # noqa: ARG002  (the port's)
    ) -> list[Handle]:
        """Send outputs and delete their input, each input's in one transaction; returns the handles found stale.

        Nothing is sent for those. ``on_sent`` is never called: nobody can see the one without the other. Nor is
        ``still_ours``: the transaction knows.
        Raises ``QueueMissing``.
        """
        if not completions:
            return []
        stale: list[Handle] = []
        for part in bounded(completions, sqlite_complete.size):
            # A FIFO group goes on when one of it is gone.
            ring = any(each.outputs or (each.input and each.input.queue.endswith(".fifo")) for each in part)
            stale += self._file.write(partial(sqlite_complete.complete, completions=part, held_up=stale), ring=ring)
        if any(completion.input is None and completion.outputs for completion in completions):
            self._file.sync()
        self._tidy()
        return stale

    def feed(self, outputs: Sequence[Output], *, keyed: bool) -> list[int]:
        """Send messages that have no input; returns the places of those seen before, dropped."""
        if not outputs:
            return []
        seen: list[int] = []
        sent = 0
        for part in bounded(outputs, lambda output: len(output.body)):
            found = self._file.write(partial(sqlite_complete.feed, outputs=part, keyed=keyed), ring=True)
            seen += [sent + place for place in found]
            sent += len(part)
        self._file.sync()
        self._tidy()
        return seen

    def keyed(self, queues: Sequence[str], hops: Sequence[str]) -> set[str]:
        """Return those of the hop ids that were fed to one of the queues with a key, which the file never forgets."""
        return self._file.read(lambda session: sqlite_complete.keyed(session, queues, hops))

    def extend(self, handles: Sequence[Handle], seconds: float, *, attempts: int = 0) -> list[Handle]:
        """Hide deliveries for ``seconds`` from now (0 = release). Returns the handles found stale."""
        if not handles:
            return []
        return self._file.write(
            lambda session: sqlite_leases.extend(session, handles, seconds, attempts=attempts), ring=True
        )

    def dead_letter(self, letters: Sequence[DeadLetter]) -> list[Handle]:
        """Move deliveries to their dead-letter queues in one transaction. Returns the stale ones."""
        if not letters:
            return []
        return self._file.write(lambda session: sqlite_leases.dead_letter(session, letters), ring=True)

    def depth(self, queue: str) -> Depth:
        """Count one queue, exactly. Raises ``QueueMissing``."""
        return self._file.read(lambda session: sqlite_queues.depth(session, queue))

    def bodies(self, queue: str) -> list[tuple[str, str, str | None]]:
        """Return body, message id and failure of every message of a queue, without receiving any; in flight or not."""
        return self._file.read(lambda session: sqlite_queues.bodies(session, queue))

    def address(self, queue: str) -> str:
        """Return a queue's name, if it exists. Raises ``QueueMissing``."""
        return self._file.read(lambda session: sqlite_queues.existing(session, queue))

    def purge(self, queues: Sequence[str]) -> None:
        """Remove all messages of these queues, and forget their hop ids; missing queues are fine."""
        self._file.write(lambda session: sqlite_queues.empty(session, queues, delete=False), ring=True)
        self._clear()

    def delete(self, queues: Sequence[str]) -> None:
        """Delete these queues; missing ones are fine."""
        self._file.write(lambda session: sqlite_queues.empty(session, queues, delete=True), ring=True)
        # Apart: tried again together, it would delete what another process has created meanwhile.
        self._file.write(sqlite_owners.forget)
        self._clear()

    def tend(self) -> None:
        """Do nothing: a file needs no credentials."""

    def interrupt(self) -> None:
        """From any thread, for good: receives return at once from now on, with what they have."""
        self._waiter.interrupt()

    def close(self) -> None:
        """Close every descriptor of this process; calls still running end."""
        self._waiter.close()
        self._file.close()

    def _receive(self, queues: Sequence[str], max_messages: int, wait: float, visibility: float) -> list[Received]:
        deadline = time.monotonic() + wait
        taken, due = self._try(queues, max_messages, visibility)
        if taken or wait <= 0:
            return taken
        with self._waiter.ear() as ear:
            while not self._waiter.interrupted:
                ear.listen(self._file.opened)
                taken, due = self._try(queues, max_messages, visibility)
                remaining = deadline - time.monotonic()
                if taken or remaining <= 0:
                    return taken
                # Opened anew meanwhile (a fork): the bell may be on a file that is gone.
                if ear.opened == self._file.opened:
                    ear.wait(min(remaining, due, _LONGEST_REST))
        return []

    def _try(self, queues: Sequence[str], max_messages: int, visibility: float) -> tuple[list[Received], float]:
        # A look costs no turn at writing, which idle processes would otherwise take from busy ones.
        due = self._file.read(lambda session: session.look(queues))
        if due > 0:
            return [], due
        taken, moved = self._file.write(lambda session: sqlite_take.take(session, queues, max_messages, visibility))
        if moved:
            self._file.ring()
        return taken, _OUTRUN

    def _unmade(self, specs: Sequence[QueueSpec], session: Session) -> tuple[list[QueueSpec], list[QueueSpec]]:
        session.refresh()
        # The owner first: of a queue of the other type it says more.
        ownerless = sqlite_owners.check(session, specs, self._file.file)
        return sqlite_queues.missing(session, specs), ownerless

    def _make(self, absent: Sequence[QueueSpec], specs: Sequence[QueueSpec], session: Session) -> None:
        sqlite_queues.create(session, absent)
        sqlite_owners.adopt(session, specs, self._file.file)

    def _clear(self) -> None:
        while self._file.write(sqlite_queues.clear):
            pass

    def _tidy(self) -> None:
        now = time.monotonic()
        if now < self._tidy_at:
            return
        # Two threads at once would do no harm.
        self._tidy_at = now + _TIDY_EVERY
        self._file.write(sqlite_queues.tidy)


def bounded(items: Sequence[T], size: Callable[[T], int]) -> Iterator[Sequence[T]]:
    """Cut into runs of at most ``_MOST`` characters of text, and of one at least."""
    start = total = 0
    for place, item in enumerate(items):
        length = size(item)
        if place > start and total + length > _MOST:
            yield items[start:place]
            start, total = place, 0
        total += length
    yield items[start:]
