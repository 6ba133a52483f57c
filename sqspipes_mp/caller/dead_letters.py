"""Dead letters for people: look at them, put them back where they failed, or drop them (caller).

SQS has no way to look without receiving, so a look receives all there is for a while and gives it back. This happens
in a thread of its own: signals raise in the main one, and must not come between a receive and its release.
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
from sqspipes_mp.caller.stats import opened
from sqspipes_mp.errors import ConfigError, QueueMissing
from sqspipes_mp.messages.attributes import values_of
from sqspipes_mp.messages.envelope import clamp_priority, decode
from sqspipes_mp.messages.failure import Failure, parse_failure
from sqspipes_mp.messages.ids import moved_id
from sqspipes_mp.messages.limits import MAX_VISIBILITY
from sqspipes_mp.pipeline.foreign import Read, reader
from sqspipes_mp.pipeline.stages import Pipeline, Stage

T = TypeVar("T")

#: Seconds for which a command hides dead letters from others, if it cannot give them back; more where there are more
#: than so many per second of it, which takes longer to receive.
_HIDDEN, _PER_SECOND = 60.0, 100
#: Seconds of a long poll, and how many must bring nothing new in a row: SQS asks some of its servers at a time.
_POLL, _POLLS = 1.0, 2
#: Messages of a FIFO group that SQS hands out at a time (Amazon SQS API Reference, ReceiveMessage); without groups,
#: what one receive asks for.
_OF_A_GROUP, _AT_ONCE = 10, 100
#: Dead-letter queues received from side by side.
_THREADS = 8
_UNTOLD = "moved by the queue service (received too often), or its reason did not fit"
#: Characters of a shown id, at least; ids named in an error.
_SHORT, _NAMED = 8, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A message in a dead-letter queue.

    ``id``: its hop id (its message id where the body is no envelope, or of others). ``stage``: the task that failed;
    ``queue``: where a redrive puts it. ``failure``: error, text, traceback, attempts, signal, stack, host, pid, times
    (epoch seconds). ``body``: as it was received; ``attributes``: the sender's (SQS). ``value``: what the task was
    given, by its ``decode`` where it has one, called anew; where it cannot be read, None, of others the body itself.
    """

    id: str
    stage: str
    queue: str
    failure: Failure
    body: str
    value: Any
    attributes: Mapping[str, str | bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """``letters``: what was found, by stage and time; ``hidden``: how many more the queues count (about, on SQS)."""

    letters: list[DeadLetter]
    hidden: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """``letters``: what was moved; ``missed``: what was to be, but was in other hands when it came to deleting.

    ``hidden``: as in ``Survey``, when all were to be moved.
    """

    letters: Sequence[DeadLetter]
    missed: Sequence[DeadLetter]
    hidden: int = 0


Found = tuple[Received, DeadLetter]


def look(pipeline: Pipeline, broker: Broker, stage: str | None = None) -> list[DeadLetter]:
    """Return all dead letters, by stage and time. Raises ``ConfigError`` and ``BrokerError``."""
    return survey(pipeline, broker, stage).letters


def survey(pipeline: Pipeline, broker: Broker, stage: str | None = None) -> Survey:
    """Look, and count what could not be seen: what others hold, and on SQS all behind ten of one FIFO group."""
    stages = _stages(pipeline, broker, stage)

    def work(hands: _Hands) -> Survey:
        found, total = hands.receive(stages)
        order = {each.name: each.index for each in stages}
        letters = sorted((letter for _, letter in found), key=lambda letter: (order[letter.stage], _time(letter)))
        return Survey(letters=letters, hidden=max(0, total - len(found)))

    return _in_a_thread(broker, work)


def redrive(pipeline: Pipeline, broker: Broker, ids: Collection[str] | None) -> Moved:
    """Put dead letters back into the queues they failed in, with no attempts charged; ``ids`` None: all.

    ``ids`` may be unique beginnings. Each is sent first and deleted after, so a redrive killed half-way loses none.
    Raises ``ConfigError`` for an id that fits none or several, before anything is moved.
    """

    def back(received: Received, letter: DeadLetter) -> Completion:
        # Not the original's id: SQS would drop the message as a duplicate, and the delete would lose it.
        hop = moved_id(letter.id, "redrive", received.handle.message_id)
        group = (received.group or letter.id) if letter.queue.endswith(".fifo") else None
        output = Output(letter.queue, letter.body, hop, group, attributes=received.attributes)
        return Completion(received.handle, (output,))

    return _move(pipeline, broker, ids, back)


def discard(pipeline: Pipeline, broker: Broker, ids: Collection[str] | None) -> Moved:
    """Delete dead letters; ``ids`` as in ``redrive``."""
    return _move(pipeline, broker, ids, lambda received, _: Completion(received.handle))


def resolve_ids(known: Collection[str], wanted: Collection[str], hidden: int = 0) -> set[str]:
    """Turn unique beginnings of ids into ids. Raises ``ConfigError``, naming candidates, for any other."""
    found: set[str] = set()
    for beginning in wanted:
        fitting = {ident for ident in known if ident.startswith(beginning)} if beginning else set()
        if beginning in fitting:
            fitting = {beginning}
        if len(fitting) != 1:
            raise _unresolved(beginning, fitting, known, hidden)
        found |= fitting
    return found


def short_ids(ids: Collection[str]) -> dict[str, str]:
    """Return the shortest beginning of each id that no other has, of 8 characters at least."""
    ordered = sorted(set(ids))
    padded = ["", *ordered, ""]
    return {
        ident: ident[: max(_SHORT, _common(ident, one) + 1, _common(ident, other) + 1)]
        for one, ident, other in zip(padded, ordered, padded[2:], strict=False)
    }


def _common(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _unresolved(beginning: str, fitting: set[str], known: Collection[str], hidden: int) -> ConfigError:
    shown = short_ids(known)
    some = sorted(shown[ident] for ident in fitting or known)
    names = ", ".join(some[:_NAMED]) + (f" and {len(some) - _NAMED} more" if len(some) > _NAMED else "")
    cure = f"These begin so: {names}" if fitting else f"There are: {names}" if names else "There are none"
    if hidden and not fitting:
        cure += f"; about {hidden} more cannot be seen now"
    return ConfigError("the dead letter's ID", beginning, "an id, or the beginning of just one", cure)


class _Hands:
    """What one command has received and has to give back; used in its thread, and in those it starts."""

    def __init__(self, connection: Connection, stopped: threading.Event) -> None:
        self.connection = connection
        self.stopped = stopped
        self.moved: list[DeadLetter] = []
        self.missed: list[DeadLetter] = []
        #: The newest receipt of each, by message id.
        self._held: dict[str, Handle] = {}

    def receive(self, stages: Sequence[Stage]) -> tuple[list[Found], int]:
        """Receive every dead letter there is; returns them in order, and how many the queues count."""
        if not stages:
            return [], 0
        with ThreadPoolExecutor(min(_THREADS, len(stages)), "sqspipes-dead") as pool:
            results = list(pool.map(self._receive_all, stages))
        return list(chain.from_iterable(found for found, _ in results)), sum(total for _, total in results)

    def move(self, chosen: Sequence[Found], how: Callable[[Received, DeadLetter], Completion]) -> None:
        """Complete in small rounds: being stopped costs no more than the one that has begun."""
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
        """Release all that was not moved."""
        with suppress(QueueMissing):  # Deleted meanwhile: nothing to give back to.
            self.connection.extend(list(self._held.values()), 0.0)

    def _receive_all(self, stage: Stage) -> tuple[list[Found], int]:
        assert stage.dead is not None
        found: dict[str, Found] = {}
        read = _reader(stage)
        total = idle = 0
        # Of a FIFO group nothing more comes while some of it is held: ask for all at once where that can be had.
        with suppress(QueueMissing):  # Never created: nothing has failed yet.
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
    """Do ``work`` out of the signals' reach; what raises here meanwhile has it stop soon and give back first."""
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
    how: Callable[[Received, DeadLetter], Completion],
) -> Moved:
    stages = _stages(pipeline, broker, None)

    def work(hands: _Hands) -> Moved:
        if stages:
            hands.connection.check_owners(pipeline.queues)
        found, total = hands.receive(stages)
        hidden = max(0, total - len(found))
        if ids is not None and not hands.stopped.is_set():
            wanted = resolve_ids([letter.id for _, letter in found], ids, hidden)
            hands.move([each for each in found if each[1].id in wanted], how)
            return Moved(letters=hands.moved, missed=hands.missed)
        hands.move(found, how)
        # The rest of long FIFO groups. A running engine may bring the same ones again, and new ones for ever.
        for _ in range(total // _OF_A_GROUP + 1 if pipeline.fifo else 0):
            known = {_lasting(each) for each in found}
            more = [each for each in hands.receive(stages)[0] if _lasting(each) not in known]
            if not more:
                break
            hands.move(more, how)
            found += more
        return Moved(letters=hands.moved, missed=hands.missed, hidden=max(0, total - len(found)))

    return _in_a_thread(broker, work)


def _lasting(found: Found) -> str:
    """Return what stays the same when a message fails again: the message id does not."""
    received, letter = found
    return letter.body if letter.id == received.handle.message_id else letter.id


def _reader(stage: Stage) -> Read:
    """Return what reads a dead letter's body as the stage's workers did."""
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
    ident, value, priority = received.handle.message_id, None, 0
    try:
        if (message := read(received)) is not None:
            ident, value, priority = message.parent, message.value, message.priority
    except (Exception, SystemExit):
        # decode= is the user's, so anything may come, as in the worker.
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
    )


def _time(letter: DeadLetter) -> float:
    return letter.failure.failed_at or letter.failure.first_seen or 0.0
