"""Dead letters for people: look at them, put them back where they failed, or drop them (caller).

SQS has no way to look without receiving, so a look receives everything for a while and gives it back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sqspipes_mp.admin import opened
from sqspipes_mp.brokers.base import Broker, Completion, Connection, Output, Received
from sqspipes_mp.errors import ConfigError, DecodeError, QueueMissing
from sqspipes_mp.failure import Failure, parse_failure
from sqspipes_mp.message import decode, moved_id
from sqspipes_mp.pipeline import Pipeline, Stage

#: Seconds for which a look hides dead letters from another look or redrive.
_HIDDEN = 60.0
#: Messages handled per round, so that none outlives its hiding.
_ROUND = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A message in a dead-letter queue.

    ``id``: its hop id (its message id where the body is no envelope). ``stage``: the task that failed; ``queue``: where
    a redrive puts it. ``failure``: error, text, traceback, attempts, signal, stack, host, pid, times (epoch seconds).
    ``body``: as it was received; ``value``: what the task was given (None where it cannot be read).
    """

    id: str
    stage: str
    queue: str
    failure: Failure
    body: str
    value: Any


def look(pipeline: Pipeline, broker: Broker, stage: str | None = None) -> list[DeadLetter]:
    """Return all dead letters, by stage and then as received."""
    with opened(broker) as connection:
        found: list[DeadLetter] = []
        held: list[Received] = []
        try:
            for received, letter in _receive_all(pipeline, connection, stage):
                held.append(received)
                found.append(letter)
        finally:
            connection.extend([received.handle for received in held], 0.0)
        return found


def redrive(pipeline: Pipeline, broker: Broker, ids: Collection[str] | None) -> list[DeadLetter]:
    """Put dead letters back into the queues they failed in, with no attempts charged; ``ids`` None: all.

    Each is sent first and deleted after, so that a redrive killed half-way loses none.
    """

    def moved(received: Received, letter: DeadLetter) -> Completion:
        hop = moved_id(letter.id, "redrive", received.handle.message_id)
        group = (received.group or letter.id) if letter.queue.endswith(".fifo") else None
        return Completion(received.handle, (Output(letter.queue, letter.body, hop, group),))

    return _move(pipeline, broker, ids, moved)


def discard(pipeline: Pipeline, broker: Broker, ids: Collection[str] | None) -> list[DeadLetter]:
    """Delete dead letters; ``ids`` None: all."""
    return _move(pipeline, broker, ids, lambda received, _: Completion(received.handle))


def _move(
    pipeline: Pipeline,
    broker: Broker,
    ids: Collection[str] | None,
    how: Callable[[Received, DeadLetter], Completion],
) -> list[DeadLetter]:
    if ids is not None:
        ids = _resolve([letter.id for letter in look(pipeline, broker)], ids)
    moved: list[DeadLetter] = []
    with opened(broker) as connection:
        held: list[Received] = []
        batch: list[tuple[Completion, DeadLetter]] = []
        try:
            for received, letter in _receive_all(pipeline, connection, None):
                if ids is not None and letter.id not in ids:
                    held.append(received)
                    continue
                batch.append((how(received, letter), letter))
                if len(batch) >= _ROUND:
                    moved += _complete(connection, batch)
            moved += _complete(connection, batch)
        finally:
            connection.extend([received.handle for received in held], 0.0)
    return moved


def _complete(connection: Connection, batch: list[tuple[Completion, DeadLetter]]) -> list[DeadLetter]:
    stale = set(connection.complete([completion for completion, _ in batch]))
    done = [letter for completion, letter in batch if completion.input not in stale]
    batch.clear()
    return done


def _resolve(known: list[str], wanted: Collection[str]) -> set[str]:
    """Turn unique beginnings of ids into ids. Raises ``ConfigError`` for what fits none or several."""
    found: set[str] = set()
    for beginning in wanted:
        fitting = {ident for ident in known if ident.startswith(beginning)} if beginning else set()
        if beginning in fitting:
            fitting = {beginning}
        if len(fitting) != 1:
            some = ", ".join(sorted(fitting or known)[:3]) or "none there"
            kind = "unique" if fitting else "known"
            raise ConfigError("dead letter ID", beginning, f"{kind}, or the unique beginning of an id ({some})")
        found |= fitting
    return found


def _receive_all(
    pipeline: Pipeline, connection: Connection, stage_name: str | None
) -> Iterator[tuple[Received, DeadLetter]]:
    """Receive every dead letter once."""
    for stage in pipeline.stages:
        if stage.dead is None or stage_name not in {None, stage.name}:
            continue
        seen: set[str] = set()
        while True:
            try:
                batch = connection.receive([stage.dead], 10, 1.0 if connection.settle else 0.0, _HIDDEN)
            except QueueMissing:
                break
            fresh = [received for received in batch if received.handle.message_id not in seen]
            if not fresh:
                break
            for received in fresh:
                seen.add(received.handle.message_id)
                yield received, _letter(stage, received)


def _letter(stage: Stage, received: Received) -> DeadLetter:
    # What SQS itself moved, after a thousand receives, has no failure of ours beside it.
    failure = (
        parse_failure(received.failure)
        if received.failure is not None
        else Failure(error="unknown", text="moved by the queue service (received too often), or its reason did not fit")
    )
    try:
        message = decode(received.body, received.handle.message_id)
        ident, value = message.parent, message.value
    except DecodeError:
        ident, value = received.handle.message_id, None
    queue = failure.source if failure.source in stage.inputs else stage.inputs[-1]
    return DeadLetter(id=ident, stage=stage.name, queue=queue, failure=failure, body=received.body, value=value)
