"""Values into the first task's input queue: ``put``, ``put_many``, and ``map`` (caller, or any process of the user's).

A batch is checked as a whole before any of it is sent. A value's message is made without a broker: its id is the key,
else a fresh one, and its hop id derives from the id, so that one key is one message for ever (but for ``salt``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import uuid4

from sqspipes_mp.brokers.base import Connection, Output
from sqspipes_mp.errors import ConfigError, PutError, QueueMissing
from sqspipes_mp.messages.envelope import Encoder, clamp_priority
from sqspipes_mp.messages.ids import group_name, token
from sqspipes_mp.pipeline.checks import is_whole, seconds, whole_number
from sqspipes_mp.pipeline.plan import Settings
from sqspipes_mp.pipeline.stages import MAX_PRIORITY, Pipeline
from sqspipes_mp.pipeline.task import Key

#: Whose value it is.
Tenant: TypeAlias = str | Callable[[Any], object] | None

log = logging.getLogger("sqspipes_mp.feed")

#: Longest delay of one message at SQS itself, seconds (Amazon SQS API Reference, SendMessage: DelaySeconds).
MAX_DELAY = 900
#: Not empty once this process has logged the warning of a long delay.
_told: list[str] = []
#: Longest delay of all, seconds.
_CENTURY = 3.2e9
#: Least number of values that are checked together before they are sent, in several requests if need be.
BATCH = 100
#: Seconds for which a batch waits for values that come slowly.
_PATIENCE = 0.2
#: Characters of a batch from which it is sent: a bound for its memory.
_MOST_CHARACTERS = 16 << 20
#: Most characters of a key: it travels with every message of the value.
_LONGEST_KEY = 1_000


@dataclass(frozen=True, slots=True)
class Item:
    """A value and its message."""

    value: Any
    #: The root's id: the key where there is one.
    id: str
    output: Output

    @property
    def token(self) -> str:
        """The value's name in the ledger."""
        return token(self.id)


def _check_delay(field: str, delay: float, longest: float) -> None:
    """Raise ``ConfigError`` for a delay over ``longest``; say once what a long one asks of the stage."""
    if delay > longest:
        raise ConfigError(
            field,
            delay,
            f"at most {longest:,.0f} s on these queues: 12 hours, and a day less than SQS(retention=)",
            "For a later time let a scheduler service send the message (Amazon EventBridge Scheduler), or use SQLite",
        )
    if not _told:
        _told.append(field)
        log.warning(
            "%s over %d s: SQS shows the message earlier, and workers put it off until it is due; workers of sqspipes, "
            "or of sqspipes_mp 0.1, on the same queue would run it at once",
            field, MAX_DELAY,
        )  # fmt: skip


class Feeder:
    """Makes messages of values for one pipeline's first task.

    Args:
        pipeline: its first task must be fed, ``Task(input=True)``.
        priority: 0 to 15, or callable(value) that returns an int; clamped to the first task's levels.
        group: FIFO group, or None for the task's ``group`` or one group per value.
        tenant: on standard queues, or callable(value) that returns it; None: the task's ``tenant``.
        delay: seconds until they are due; standard queues only.
        key: callable(value) or, for one value, a string or int; None: each value is new.
        longest_delay: returns the broker's ``longest_delay``, seconds; asked for a delay beyond SQS's own alone.
        where: the public method, for the errors' texts.

    Raises:
        ConfigError: naming the argument.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: Settings,
        *,
        priority: int | Callable[[Any], int] = 0,
        group: str | None = None,
        tenant: Tenant = None,
        delay: float = 0,
        key: Key | Callable[[Any], Key] | None = None,
        longest_delay: Callable[[], float | None] = lambda: MAX_DELAY,
        where: str = "put",
    ) -> None:
        first = pipeline.stages[0]
        if first.task.input is not True:
            cure = f"Write Task({first.name}, input=True)"
            if isinstance(first.task.input, str):
                cure = "Send with the means of those whose queue it is"
            allowed = "a task that is fed: this one " + (
                "is a source, which makes its values itself"
                if first.task.input is None
                else f"receives from {first.task.input!r}, a queue of others"
            )
            raise ConfigError(f"{where}: the first task", first.name, allowed, cure)
        if not callable(priority):
            whole_number(f"{where}(priority)", priority, least=0, most=MAX_PRIORITY, also=", or callable(value)")
        if group is not None:
            if not pipeline.fifo:
                allowed = "None on standard queues, which have no groups"
                raise ConfigError(f"{where}(group)", group, allowed, "Give Engine(..., fifo=True), or drop group")
            if not isinstance(group, str) or not group:
                raise ConfigError(f"{where}(group)", group, "None or a text")
        if tenant is not None and pipeline.fifo:
            cure = "Give group, or use standard queues"
            raise ConfigError(f"{where}(tenant)", tenant, "None on FIFO queues, where each message is in a group", cure)
        if tenant is not None and not (callable(tenant) or (isinstance(tenant, str) and tenant)):
            raise ConfigError(f"{where}(tenant)", tenant, "None, a text, or callable(value)")
        rest = seconds(f"{where}(delay)", delay, most=_CENTURY)
        if rest > MAX_DELAY and (longest := longest_delay()) is not None:
            _check_delay(f"{where}(delay)", rest, longest)
        if rest and pipeline.fifo:
            raise ConfigError(
                f"{where}(delay)", delay, "0 on FIFO queues: SQS delays no single message of theirs", "Drop delay"
            )
        self.keyed = key is not None
        #: Mark of the values' messages (``pipeline.value_ends``); None: they have none.
        self.mark: str | None = None
        #: Text that goes into hop ids, so that a key sent before makes a new message. The ids stay as they are.
        self.salt = ""
        self.domain = pipeline.domain
        self.queues = pipeline.specs_for([0])
        self._first = first
        self._fifo = pipeline.fifo
        self._priority = priority
        self._group = group
        self._tenant = first.task.tenant if tenant is None else tenant
        self._delay = rest
        self._key = key
        self._where = where
        self._encoder = Encoder(None, settings.json_default)
        self._create = settings.create_queues

    def item(self, value: Any) -> Item:
        """Make the message of a value.

        Raises:
            OutputError, MessageTooLarge: the value cannot be sent.
            ConfigError: ``key`` or ``priority`` returned a value that is not allowed.
            Exception: a callable of the user's raised it.
        """
        ident = self._ident(value)
        hop = token(self.salt + ident)
        wanted = self._priority(value) if callable(self._priority) else self._priority
        levels = self._first.inputs[::-1]
        level = clamp_priority(wanted, len(levels))
        meta = {"priority": level, "id": ident, "hop": hop}
        if self.mark is not None:
            meta[self.mark] = levels[level]
        if self._delay:
            # The service may show it earlier, and clocks may be set.
            meta["not_before"] = time.time() + self._delay
        body = self._encoder.encode(value, meta)
        group = None
        if self._fifo:
            by_task = self._first.task.group
            wanted_group = self._group if self._group is not None or by_task is None else by_task(value)
            group = hop if wanted_group is None else group_name(wanted_group)
        elif self._tenant is not None:
            tenant = self._tenant(value) if callable(self._tenant) else self._tenant
            group = None if tenant is None else group_name(tenant)
        return Item(value, ident, Output(levels[level], body, hop, group, self._delay))

    def check(self, connection: Connection) -> None:
        """Raise ``ConfigError`` where a queue to feed is another pipeline's."""
        connection.check_owners(self.queues)

    def send(self, connection: Connection, items: list[Item], wanted: Callable[[], bool] | None = None) -> list[Item]:
        """Send a batch; returns the items dropped because their key was seen before (SQLite).

        A missing queue is created first, where the engine may create queues. ``wanted``: see ``Connection.feed``.
        """
        outputs = [item.output for item in items]
        try:
            seen = connection.feed(outputs, keyed=self.keyed, wanted=wanted)
        except QueueMissing:
            connection.ensure(self.queues, create=self._create)
            seen = connection.feed(outputs, keyed=self.keyed, wanted=wanted)
        return [items[place] for place in seen]

    def _ident(self, value: Any) -> str:
        if self._key is None:
            return uuid4().hex
        key = self._key(value) if callable(self._key) else self._key
        if not (is_whole(key) or isinstance(key, str)) or key == "":
            what = "key(value)" if callable(self._key) else "key"
            cure = "Return str(...)" if callable(self._key) else "Give str(...), or None for a value that is always new"
            raise ConfigError(f"{self._where}({what})", key, "a non-empty text or a whole number", cure)
        if len(ident := str(key)) > _LONGEST_KEY:
            raise ConfigError(f"{self._where}(key)", key, f"at most {_LONGEST_KEY:,} characters", "Give a digest of it")
        return ident


def put(feeder: Feeder, connection: Connection, value: Any) -> str:
    """Send one value; returns its id."""
    item = feeder.item(value)
    feeder.check(connection)
    feeder.send(connection, [item])
    return item.id


def put_many(
    feeder: Feeder, connection: Connection, values: Iterable[Any], progress: Callable[[int], object] | None
) -> int:
    """Send all values in batches; returns how many were new.

    Raises ``PutError``, and the exceptions of ``values`` and ``progress``, with a note on how many were sent.
    """
    feeder.check(connection)
    tally = Tally()
    try:
        # Over a network a batch is as many requests as may be under way at once.
        for batch in _batches(feeder, values, max(BATCH, connection.batch * connection.carriers), tally):
            tally.doubtful = len(batch)
            try:
                seen = feeder.send(connection, batch)
            except Exception as error:
                raise PutError(tally.sent, tally.new, len(batch), f"the broker refused: {error}") from error
            tally.doubtful = 0
            tally.sent += len(batch)
            tally.new += len(batch) - len(seen)
            if progress is not None:
                progress(tally.sent)
    except PutError:
        raise
    except BaseException as error:
        rest = f", of the next {tally.doubtful:,} some may have been" if tally.doubtful else ""
        error.add_note(f"put_many: the first {tally.sent:,} values were sent{rest}, nothing after them was")
        raise
    return tally.new


@dataclass(slots=True)
class Tally:
    """Numbers of values."""

    #: Sent so far.
    sent: int = 0
    #: Those of them that were new.
    new: int = 0
    #: Being sent.
    doubtful: int = 0


def _batches(feeder: Feeder, values: Iterable[Any], most: int, tally: Tally) -> Iterator[list[Item]]:
    """Yield full batches, and smaller ones where values come slowly."""
    batch: list[Item] = []
    size = 0
    # The clock starts before the first value is asked for, so that a value that arrives late is sent at once.
    began = time.monotonic()
    for value in values:
        try:
            batch.append(feeder.item(value))
        except Exception as error:
            reason = f"value number {tally.sent + len(batch)} (from 0) cannot be sent: {error}"
            raise PutError(tally.sent, tally.new, 0, reason) from error
        size += len(batch[-1].output.body)
        if len(batch) >= most or size >= _MOST_CHARACTERS or time.monotonic() - began > _PATIENCE:
            yield batch
            batch, size = [], 0
            began = time.monotonic()
    if batch:
        yield batch
