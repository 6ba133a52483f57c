"""Dead letters for people: look at them, put them back where they failed, or drop them (caller).

SQS has no way to look without receiving, so a look receives all dead letters for a while and gives them back. It runs
in a thread of its own: signals raise in the main thread, and must not come between a receive and its release.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any, TypeVar

from sqspipes_mp.brokers.base import Broker, Completion, Connection, Handle, Output, Received
from sqspipes_mp.caller.choice import Choice
from sqspipes_mp.caller.stats import opened
from sqspipes_mp.errors import ConfigError, QueueMissing
from sqspipes_mp.messages.attributes import values_of
from sqspipes_mp.messages.envelope import clamp_priority, decode
from sqspipes_mp.messages.failure import Failure, parse_failure
from sqspipes_mp.messages.ids import moved_id
from sqspipes_mp.messages.limits import MAX_VISIBILITY
from sqspipes_mp.messages.plain import one_line
from sqspipes_mp.messages.told import key_of
from sqspipes_mp.pipeline.foreign_bodies import Read, reader
from sqspipes_mp.pipeline.stages import Pipeline, Stage
from sqspipes_mp.pipeline.value_ends import end_of_body

T = TypeVar("T")

#: Least visibility timeout of a look, seconds, and dead letters received per second of it: many take longer. Letters
#: of a killed command come back after it.
_HIDDEN, _PER_SECOND = 60.0, 100
#: Seconds of a long poll, and how many polls in a row must bring nothing new: SQS asks some of its servers at a time.
_POLL, _POLLS = 1.0, 2
#: Messages of a FIFO group that SQS hands out at a time (Amazon SQS API Reference, ReceiveMessage); most messages of
#: one receive without groups.
_OF_A_GROUP, _AT_ONCE = 10, 100
#: Dead-letter queues received from side by side.
_THREADS = 8
_ANY = Choice()
_UNTOLD = "moved by the queue service (received too often), or its reason did not fit"
#: Least characters of a shown id; most ids named in an error.
_SHORT, _NAMED = 8, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A message in a dead-letter queue."""

    #: The hop id; the queue service's message id where the body is no envelope, or is of others.
    id: str
    #: The task that failed.
    stage: str
    #: The queue into which a redrive puts it.
    queue: str
    #: Error, text, traceback, attempts, signal, stack, host, pid, times (epoch seconds).
    failure: Failure
    #: The message's body as it was received.
    body: str
    #: The function's input, read anew, by ``decode`` where the task has one. Unreadable: None, or a body of others.
    value: Any
    #: Message attributes that the sender set (SQS).
    attributes: Mapping[str, str | bytes] = field(default_factory=dict)
    #: The key that the value was sent with; None: it had none.
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The dead letters found by a look."""

    #: In the order of the stages, then of time.
    letters: list[DeadLetter]
    #: Number of further letters that the queues count (on SQS: about).
    hidden: int
    #: Number of letters that were seen, chosen or not.
    seen: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The dead letters taken out by a redrive or a discard."""

    letters: Sequence[DeadLetter]
    #: Chosen letters that another command held when they were to be deleted.
    missed: Sequence[DeadLetter]
    #: As in ``Survey``, where all were to be moved.
    hidden: int = 0
    #: As in ``Survey``.
    seen: int = 0


Found = tuple[Received, DeadLetter]


def look(pipeline: Pipeline, broker: Broker, stage: str | None = None) -> list[DeadLetter]:
    """Return all dead letters, by stage and time. Raises ``ConfigError`` and ``BrokerError``."""
    return survey(pipeline, broker, stage).letters


def survey(
    pipeline: Pipeline, broker: Broker, stage: str | None = None, *, chosen: Choice = _ANY, ids: Collection[str] = ()
) -> Survey:
    """Look, and count the letters that cannot be seen: others hold them, or (SQS) ten of their FIFO group are first.

    Args:
        pipeline: with every queue it can have.
        broker: where the queues are.
        stage: only this task's.
        chosen: only letters that fit.
        ids: only these, by unique beginnings; empty: all.

    Raises:
        ConfigError: an id fits none or several.
        BrokerError: the queue service refuses.
    """
    stages = _stages(pipeline, broker, stage)

    def work(hands: _Hands) -> Survey:
        found, total = hands.receive(stages)
        order = {each.name: each.index for each in stages}
        letters = sorted((letter for _, letter in found), key=lambda letter: (order[letter.stage], _time(letter)))
        hidden = max(0, total - len(found))
        wanted = resolve_ids([letter.id for letter in letters], ids, hidden) if ids else None
        letters = [each for each in letters if chosen.fits(each) and (wanted is None or each.id in wanted)]
        return Survey(letters=letters, hidden=hidden, seen=len(found))

    return _in_a_thread(broker, work)


def redrive(pipeline: Pipeline, broker: Broker, ids: Collection[str] | None, chosen: Choice = _ANY) -> Moved:
    """Put dead letters back into the queues they failed in, with no attempts charged.

    Each letter is sent first and deleted after, so a redrive killed half-way loses none.

    Args:
        pipeline: with every queue it can have.
        broker: where the queues are.
        ids: ids, or unique beginnings of ids; None: all.
        chosen: only letters that fit.

    Raises:
        ConfigError: an id fits none or several; nothing was moved.
    """

    def back(received: Received, letter: DeadLetter) -> Completion:
        # A new deduplication id: SQS would drop the original's as a duplicate, and the delete would lose the message.
        hop = moved_id(letter.id, "redrive", received.handle.message_id)
        group = received.group
        if letter.queue.endswith(".fifo"):
            group = group or letter.id
        output = Output(letter.queue, letter.body, hop, group, attributes=received.attributes)
        return Completion(received.handle, (output,))

    return _move(pipeline, broker, ids, chosen, back)


def discard(pipeline: Pipeline, broker: Broker, ids: Collection[str] | None, chosen: Choice = _ANY) -> Moved:
    """Delete dead letters; arguments and errors as of ``redrive``."""

    def drop(received: Received, _: DeadLetter) -> Completion:
        # What the queue service moved itself has no end yet.
        return Completion(received.handle, end=end_of_body(received.body, received.handle.message_id))

    return _move(pipeline, broker, ids, chosen, drop)


def resolve_ids(known: Collection[str], wanted: Collection[str], hidden: int = 0) -> set[str]:
    """Return the ids that unique beginnings stand for. Raises ``ConfigError``, naming candidates, for any other."""
    found: set[str] = set()
    for beginning in wanted:
        # As it is shown, too: an id of others may have characters that are shown escaped.
        fitting = {ident for ident in known if _begins(ident, beginning)} if beginning else set()
        if beginning in fitting:
            fitting = {beginning}
        if len(fitting) != 1:
            raise _unresolved(beginning, fitting, known, hidden)
        found |= fitting
    return found


def short_ids(ids: Collection[str]) -> dict[str, str]:
    """Return each id's shortest beginning that no other id has, of 8 characters at least."""
    ordered = sorted(set(ids))
    padded = ["", *ordered, ""]
    return {
        ident: ident[: max(_SHORT, _common(ident, one) + 1, _common(ident, other) + 1)]
        for one, ident, other in zip(padded, ordered, padded[2:], strict=False)
    }


def _begins(ident: str, beginning: str) -> bool:
    return ident.startswith(beginning) or one_line(ident, len(ident)).startswith(beginning)


def _common(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _unresolved(beginning: str, fitting: set[str], known: Collection[str], hidden: int) -> ConfigError:
    shown = short_ids(known)
    some = sorted(one_line(shown[ident], len(ident)) for ident in fitting or known)
    names = ", ".join(some[:_NAMED]) + (f" and {len(some) - _NAMED} more" if len(some) > _NAMED else "")
    cure = f"These begin so: {names}" if fitting else f"There are: {names}" if names else "There are none"
    if hidden and not fitting:
        cure += f"; about {hidden} more cannot be seen now"
    return ConfigError("the dead letter's ID", beginning, "an id, or the beginning of just one", cure)


class _Hands:
    """The letters that one command has received and has to give back; used in its thread, and in those it starts."""

    def __init__(self, connection: Connection, stopped: threading.Event) -> None:
        self.connection = connection
        self.stopped = stopped
        self.moved: list[DeadLetter] = []
        self.missed: list[DeadLetter] = []
        #: The newest receipt handle of each letter, by message id.
        self._held: dict[str, Handle] = {}

    def receive(self, stages: Sequence[Stage]) -> tuple[list[Found], int]:
        """Receive every dead letter. Returns them in order, and the number that the queues count."""
        if not stages:
            return [], 0
        with ThreadPoolExecutor(min(_THREADS, len(stages)), "sqspipes-dead") as pool:
            results = list(pool.map(self._receive_all, stages))
        return list(chain.from_iterable(found for found, _ in results)), sum(total for _, total in results)

    def move(self, chosen: Sequence[Found], how: Callable[[Received, DeadLetter], Completion]) -> None:
        """Complete letters in small rounds; a stop waits for the round that has begun."""
        size = self.connection.batch
        for start in range(0, len(chosen), size):
            if self.stopped.is_set():
                return
            batch = chosen[start : start + size]
            stale = set(self.connection.complete([how(received, letter) for received, letter in batch]))
            for received, letter in batch:
                (self.missed if received.handle in stale else self.moved).append(letter)
                del self._held[received.handle.message_id]

    def give_back(self) -> None:
        """Release the letters that were not moved."""
        with suppress(QueueMissing):  # The queue was deleted meanwhile.
            self.connection.extend(list(self._held.values()), 0.0)

    def _receive_all(self, stage: Stage) -> tuple[list[Found], int]:
        assert stage.dead is not None
        found: dict[str, Found] = {}
        read = _reader(stage)
        total = idle = 0
        # A FIFO group gives no more while some of it is held: ask for all at once, which SQLite gives.
        with suppress(QueueMissing):  # The queue was never created: nothing has failed yet.
            depth = self.connection.depth(stage.dead)
            total = depth.visible + depth.in_flight + depth.delayed
            count = _AT_ONCE + (total if stage.dead.endswith(".fifo") else 0)
            hidden = min(MAX_VISIBILITY, max(_HIDDEN, total / _PER_SECOND))
            wait, polls = (_POLL, _POLLS) if self.connection.settle else (0.0, 1)
            while idle < polls and not self.stopped.is_set():
                idle += 1
                for received in self.connection.receive([stage.dead], count, wait, hidden, attributes=True):
                    ident = received.handle.message_id
                    self._held[ident] = received.handle
                    if ident not in found:
                        idle = 0
                    found[ident] = received, _letter(stage, read, received)
        return list(found.values()), total


def _in_a_thread(broker: Broker, work: Callable[[_Hands], T]) -> T:
    """Do ``work`` in a thread. A signal's exception in this one has it stop soon and give back first."""
    stopped = threading.Event()

    def whole(connection: Connection) -> T:
        hands = _Hands(connection, stopped)
        try:
            return work(hands)
        finally:
            hands.give_back()

    with opened(broker) as connection, ThreadPoolExecutor(1, "sqspipes-dead") as pool:
        future = pool.submit(whole, connection)
        try:
            return future.result()
        except BaseException:
            stopped.set()
            connection.interrupt()
            raise


def _stages(pipeline: Pipeline, broker: Broker, name: str | None) -> list[Stage]:
    chosen = pipeline.stages if name is None else (pipeline.stage(name),)
    broker.check()
    if not broker.exists():
        return []
    return [stage for stage in chosen if stage.dead is not None]


def _move(
    pipeline: Pipeline,
    broker: Broker,
    ids: Collection[str] | None,
    chosen: Choice,
    how: Callable[[Received, DeadLetter], Completion],
) -> Moved:
    stages = _stages(pipeline, broker, chosen.stage)

    def work(hands: _Hands) -> Moved:
        if stages:
            hands.connection.check_owners(pipeline.queues)
        found, total = hands.receive(stages)
        hidden = max(0, total - len(found))
        if ids is not None and not hands.stopped.is_set():
            wanted = resolve_ids([letter.id for _, letter in found], ids, hidden)
            hands.move([each for each in found if each[1].id in wanted and chosen.fits(each[1])], how)
            return Moved(letters=hands.moved, missed=hands.missed, seen=len(found))
        hands.move([each for each in found if chosen.fits(each[1])], how)
        # The rest of long FIFO groups, in a bounded number of rounds: a running engine may bring letters for ever.
        for _ in range(total // _OF_A_GROUP + 1 if pipeline.fifo else 0):
            known = {_lasting(each) for each in found}
            more = [each for each in hands.receive(stages)[0] if _lasting(each) not in known]
            if not more:
                break
            hands.move([each for each in more if chosen.fits(each[1])], how)
            found += more
        return Moved(letters=hands.moved, missed=hands.missed, hidden=max(0, total - len(found)), seen=len(found))

    return _in_a_thread(broker, work)


def _lasting(found: Found) -> str:
    """Return an identity that survives a redrive: the hop id, or the body where it is no envelope."""
    received, letter = found
    return letter.body if letter.id == received.handle.message_id else letter.id


def _reader(stage: Stage) -> Read:
    """Return the function that reads a dead letter's body as the stage's workers do."""
    task = stage.task
    if isinstance(task.input, str):
        return reader(task.decode)
    return lambda received: decode(received.body, received.handle.message_id)


def _letter(stage: Stage, read: Read, received: Received) -> DeadLetter:
    failure = (
        parse_failure(received.failure)
        if received.failure is not None
        else Failure(error="unknown", text=_UNTOLD, first_seen=received.sent_at)
    )
    ident, value, priority, key = received.handle.message_id, None, 0, None
    try:
        if (message := read(received)) is not None:
            ident, value, priority, key = message.parent, message.value, message.priority, key_of(message)
    except (Exception, SystemExit):
        # decode= is the user's and may raise anything.
        if isinstance(stage.task.input, str):
            value = received.body
    queue = failure.source
    if queue not in stage.inputs:
        queue = stage.inputs[-1 - clamp_priority(priority, len(stage.inputs))]
    return DeadLetter(
        id=ident,
        stage=stage.name,
        queue=queue,
        failure=failure,
        body=received.body,
        value=value,
        attributes=values_of(received.attributes),
        key=key,
    )


def _time(letter: DeadLetter) -> float:
    return letter.failure.failed_at or letter.failure.first_seen or 0.0
