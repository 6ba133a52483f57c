"""``engine.map``: a finite job over an iterable, fed and handed out by one iterator (caller).

Between two results it feeds more values, so that a bounded number of values is on the way; ``ledger`` tells which are
done. The supervisor is a process of its own, as with ``iterate=True``, and the rule is the same: a result is
acknowledged, and its message deleted, when the next result is asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from typing import Any
from uuid import uuid4

from sqspipes_mp.brokers.base import Connection, Ended, KeyedConnection, Unwanted, as_keyed
from sqspipes_mp.caller.feed import Item
from sqspipes_mp.caller.kept import Kept, Met
from sqspipes_mp.caller.ledger import Hand, Ledger
from sqspipes_mp.caller.map_job import Job, cure, known_key, not_kept
from sqspipes_mp.caller.results import Results, Start
from sqspipes_mp.errors import Cancelled, MapIncomplete, SqsPipesError, TaskTimeout, UnknownResult, WorkerLost
from sqspipes_mp.ipc.channel import Frame, Kind
from sqspipes_mp.ipc.leases import LEASES
from sqspipes_mp.ipc.map_lock import MapLock
from sqspipes_mp.ipc.report.report import Report, rebuild
from sqspipes_mp.ipc.statistics import CALL_STARTED, EXPECTED, INCARNATION
from sqspipes_mp.messages.plain import one_line

log = logging.getLogger("sqspipes_mp.engine")

#: Most values on the way: so many per worker, and at least so many.
_PER_WORKER, _LEAST = 64, 256
#: Times as many values may be on the way where the queues are behind a network.
_FAR = 4
#: Most values on the way per worker of the last stage, in order: a done value keeps its lease until its turn comes.
_PER_SINK = LEASES // 2
#: Most values of one batch, and seconds for which a batch may be gathered while workers wait.
_CHUNK, _GATHER = 200, 0.02
#: Seconds of silence after which the keeper looks whether every queue is empty.
_SILENCE = 2.0
#: Frames that tell of values.
_OF_VALUES = frozenset({Kind.RESULT, Kind.STEP, Kind.DEAD_LETTERED, Kind.DRAINED})
#: Looks in a row that must find nothing: frames of the last worker may have been on their way at the first.
_LOOKS = 3


class MapResults(Results[Any]):
    """Hands out each value's results once, and feeds the next values meanwhile. Not for several threads at once."""

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        lock: MapLock | None,
        start: Start,
    ) -> None:
        self._job = job
        self._lock = lock
        self._ledger = ledger
        self._values = iter(job.values)
        self._exhausted = False
        #: The batch being sent. After an interruption the ledger may not know all of its values.
        self._sending: list[Item] | None = None
        #: The frames heard while a batch is being sent; None: no batch is.
        self._deferred: list[Frame] | None = None
        #: Values read past the limit, in search of a result's value; they wait for room. The first one is new.
        self._waiting: list[Item] = []
        #: The value read behind them that has no message, with its error.
        self._refused: tuple[Any, Exception] | None = None
        #: Whether the iterable has ended behind them.
        self._read_all = False
        self._hand: Hand | None = None
        #: The message of a result that is of none of this map's values: the map ends, and acknowledges it never.
        self._unknown: str | None = None
        #: Whether Ctrl-C has ended a call of ``next``.
        self._interrupted = False
        self._connection: Connection | None = None
        #: Values whose results of earlier runs were handed out; None before the first.
        self._met: Met | None = None
        self._broker = start.broker
        self._board = start.board
        self._plan = start.plan
        self._room = max(_LEAST, _PER_WORKER * sum(start.plan.workers.values()))
        self._most_unacknowledged = 0
        if job.ordered:
            sinks = start.plan.workers[start.plan.selected[-1]]
            self._room = min(self._room, _PER_SINK * sinks)
            self._most_unacknowledged = (LEASES - 32) * sinks
        self._settle = 0.0
        #: Whether the queues are behind a network.
        self._far = False
        self._frames = 0
        self._watching = False
        self._heard_before_watch = 0
        self._empty_looks = 0
        super().__init__(start)
        if lock is not None:
            lock.sign(os.getpid(), self._child.pid)

    def __next__(self) -> Any:
        """Return the next result or, with ``return_exceptions``, a value's error; with ``with_input`` as a pair.

        Raises a value's error, the exception that ended the run, or ``MapIncomplete``: also at each call after one that
        Ctrl-C ended, since a loop that goes on all the same would take the end for a whole result.
        """
        if self._interrupted:
            reason = f"it was interrupted, and closed. {cure(self._job, self._broker)}"
            raise MapIncomplete(self._missing, reason)
        try:
            return super().__next__()
        except KeyboardInterrupt:
            self._interrupted = True
            raise

    def _next(self) -> Any:
        self._acknowledge_hand()
        self._check_unknown()
        if len(self._ledger) <= self._room * 3 // 4:
            self._feed()
        self._listen(0.0)
        while True:
            self._check_unknown()
            hand = None if self._stopped or self._taken_back else self._ledger.next()
            if hand is not None:
                if (kept := hand.kept) is not None:
                    if (given := self._give_kept(hand, kept)) is not None:
                        return given[0]
                    continue
                if self._ledger.is_new(hand):
                    return self._give(hand)
                self._hand = hand
                self._acknowledge_hand()
                continue
            if self._outcome is not None:
                self._end_early()
            if self._exhausted and not len(self._ledger):
                self._wait_until_empty()
                if len(self._ledger):
                    # A value that was given up has results all the same.
                    continue
                self._end()
            if self._may_rest() or not self._feed():
                self._wait()

    @property
    def _missing(self) -> int:
        """Values that are not done, with those of a batch whose sending was broken off."""
        unknown = sum(item.token not in self._ledger for item in self._sending or ())
        return len(self._ledger) + unknown

    # -- handing out --------------------------------------------------------------------------------------------

    def _give(self, hand: Hand) -> Any:
        try:
            given = self._made_of(hand)
        except KeyboardInterrupt:
            # The result was not handed out: the next call gives it, and does not acknowledge it.
            self._ledger.back(hand)
            raise
        self._ledger.given(hand)
        self._hand = hand
        return given

    def _made_of(self, hand: Hand) -> Any:
        value = hand.entry.value
        if hand.error is not None:
            with contextlib.suppress(AttributeError, TypeError):
                hand.error.value = value  # type: ignore[attr-defined]
            if not self._job.return_exceptions:
                raise hand.error
            return (value, hand.error) if self._job.with_input else hand.error
        assert hand.frame is not None
        result = self._read(hand.frame)
        return (value, result) if self._job.with_input else result

    def _give_kept(self, hand: Hand, kept: Kept) -> tuple[Any] | None:
        """Return a value's next kept result, as a tuple of one; None: there are no more."""
        try:
            text = kept.first()
            if text is None:
                self._ledger.kept_over(hand.entry)
                return None
            result = json.loads(text)
        except KeyboardInterrupt:
            self._ledger.back(hand)
            raise
        kept.take()
        # The value's next one comes next.
        self._ledger.back(hand)
        return ((hand.entry.value, result) if self._job.with_input else result,)

    def _acknowledge_hand(self) -> None:
        if self._hand is None:
            return
        hand, self._hand = self._hand, None
        for frame in hand.frames:
            self._acknowledge(frame)
        self._ledger.acknowledged(hand)

    def _check_unknown(self) -> None:
        """Raise ``UnknownResult`` for a result that is of none of the map's values; closing gives it back."""
        if self._unknown is not None:
            raise UnknownResult(self._unknown, len(self._ledger), cure(self._job, self._broker))

    # -- feeding ------------------------------------------------------------------------------------------------

    def _feed(self) -> bool:
        """Send some values if there is room. Returns whether anything was done."""
        if self._exhausted or not self._goes_on:
            return False
        room, reading = self._rooms()
        if self._waiting and room <= 0:
            return False
        batch = self._sending = self._waiting
        self._waiting = []
        self._read_values(batch, min(reading, _CHUNK))
        if len(batch) > max(room, 0):
            batch, self._waiting = self._fitting(batch, room)
            self._sending = batch
        if batch:
            self._deferred = []
            try:
                self._send(batch)
            except BaseException as error:
                # Some of the batch may have been sent: it stays in ``_sending``.
                self._hear_deferred()
                if isinstance(error, Unwanted):
                    return True
                raise
        refused = None
        if not self._waiting:
            refused, self._refused = self._refused, None
            self._exhausted = self._read_all
        if refused is not None:
            self._ledger.refused(f"refused {uuid4().hex}", *refused)
        if self._exhausted:
            self._ledger.exhausted()
        self._sending = None
        self._hear_deferred()
        return bool(batch) or refused is not None or self._exhausted

    @property
    def _goes_on(self) -> bool:
        """Whether the run goes on, so that values are wanted."""
        return not (self._stopped or self._taken_back or self._outcome is not None)

    def _still_wanted(self) -> bool:
        """Hear the supervisor while values cannot be sent; tell whether they are still wanted."""
        self._listen(0.0)
        return self._goes_on

    def _hear_deferred(self) -> None:
        """Hear the frames that came while a batch was being sent: its values are in the ledger only now."""
        frames, self._deferred = self._deferred, None
        for frame in frames or ():
            self._heard(frame)

    def _may_rest(self) -> bool:
        """Whether to wait for results rather than feed the few values there is room for, each time a round trip."""
        return self._far and len(self._ledger) > self._room * 3 // 4 and not self._ledger.holding

    def _rooms(self) -> tuple[int, int]:
        """Return how many values may be sent, and how many read.

        More are read where a result waits for its value (after a resume). A value that the file skips adds no result,
        so it needs no room. A new value does: in order, where a done value keeps its lease until its turn comes, the
        new value waits for room. Where no turn could come any more, it is sent all the same.
        """
        room = self._room - len(self._ledger)
        if not self._ledger.holding:
            return room, room
        if not self._job.ordered:
            return max(room, _CHUNK), max(room, _CHUNK)
        if not self._ledger.lined:
            room = max(room, self._most_unacknowledged - len(self._ledger), 1)
        return room, max(room, _CHUNK)

    def _read_values(self, batch: list[Item], count: int) -> None:
        """Fill up a batch from the iterable, as far as its values come quickly."""
        names: set[str] = {item.token for item in batch}
        began = time.monotonic()
        while len(batch) < count and time.monotonic() - began < _GATHER and not (self._read_all or self._refused):
            try:
                value = next(self._values)
            except StopIteration:
                self._read_all = True
                break
            try:
                item = self._job.feeder.item(value)
            except Exception as error:
                # The values read before it go first: its error's place is behind theirs.
                self._refused = (value, error)
                break
            self._check_new(item, names)
            batch.append(item)
            names.add(item.token)

    def _fitting(self, batch: list[Item], room: int) -> tuple[list[Item], list[Item]]:
        """Split a batch: values that the file skips and ``room`` new ones may be sent, the rest waits."""
        connection = as_keyed(self._broker, self._opened())
        # Values are read past the limit only by a resumed map, which needs a broker that remembers keys.
        assert connection is not None
        queues = list({item.output.queue for item in batch})
        seen = connection.keyed(queues, [item.output.hop for item in batch])
        for place, item in enumerate(batch):
            if item.output.hop not in seen:
                if room <= 0:
                    return batch[:place], batch[place:]
                room -= 1
        return batch, []

    def _opened(self) -> Connection:
        if self._connection is None:
            # Opened late: nothing may be open when the supervisor is forked.
            self._connection = self._broker.open()
            self._settle = self._connection.settle
            self._far = self._connection.carriers > 1
            if self._far and not self._job.ordered:
                # A value is on its way for longer than its call takes.
                self._room *= _FAR
        return self._connection

    def _send(self, batch: list[Item]) -> None:
        if self._job.resumed:
            self._send_resumed(batch)
            return
        seen = {id(item) for item in self._job.feeder.send(self._opened(), batch, self._still_wanted)}
        for item in batch:
            if id(item) in seen:
                raise known_key(item.id, self._broker)
            self._ledger.fed(item.token, item.value, item.output.hop)

    def _send_resumed(self, batch: list[Item]) -> None:
        """Send the new values, and note the results that earlier runs have recorded of the others."""
        connection = as_keyed(self._broker, self._opened())
        assert connection is not None
        # No value has a priority of its own.
        queue = batch[0].output.queue
        known = connection.keyed([queue], [item.output.hop for item in batch])
        new = [item for item in batch if item.output.hop not in known]
        sent = self._job.feeder.send(connection, new, self._still_wanted) if new else []
        seen = {id(item) for item in sent}
        ended = connection.ended(queue, list(known), self._job.recorded_before, kept=self._job.keeps)
        for item in batch:
            if item.output.hop not in known and id(item) not in seen:
                self._ledger.fed(item.output.hop, item.value, item.output.hop)
            else:
                self._meet(connection, queue, item, ended)

    def _meet(self, connection: KeyedConnection, queue: str, item: Item, ended: dict[str, Ended]) -> None:
        """Note a value that was sent before. Raises ``ResultsNotKept`` where it is done and they should be kept."""
        name = item.output.hop
        kept = None
        results = ended.get(name)
        if results is not None and (results.first or results.more):
            if self._met is None:
                self._met = Met()
            if self._met.add(name):
                kept = Kept(connection, queue, name, self._job.recorded_before, results, keeps=self._job.keeps)
        under_way = name in self._ledger
        met = self._ledger.met(name, item.value, kept)
        if self._job.keeps and not (met or under_way or results is not None):
            lacking = sum(hop not in self._ledger for hop in connection.unended(queue))
            raise not_kept(self._job, max(1, lacking), "were done")

    def _check_new(self, item: Item, names: set[str]) -> None:
        if not self._job.resumed and (item.token in names or item.token in self._ledger):
            raise known_key(item.id, self._broker)

    # -- hearing ------------------------------------------------------------------------------------------------

    def _heard(self, frame: Frame) -> None:
        if self._deferred is not None and frame.kind in _OF_VALUES:
            self._deferred.append(frame)
            return
        header = frame.header
        if frame.kind is Kind.RESULT:
            self._frames += 1
            known = self._ledger.result(frame)
            if not known:
                if known is None and self._sending is not None:
                    # Perhaps a result of the interrupted batch: it comes again in the next run.
                    return
                if known is None:
                    # Acknowledged, it would be deleted, and nobody would have had it.
                    self._unknown = self._unknown or one_line(str(header["id"]).rpartition("/")[0])
                    return
                # A result that was handed out comes again after its worker's death.
                self._acknowledge(frame)
        elif frame.kind is Kind.STEP:
            self._frames += 1
            for name, hop, children, delivery in json.loads(frame.blob):
                self._ledger.step(name, hop, children, delivery)
        elif frame.kind is Kind.DEAD_LETTERED:
            self._frames += 1
            self._ledger.dead_lettered(header["token"], header["hop"], _dead_letter_error(frame))
        elif frame.kind is Kind.DRAINED:
            self._watching = False
            quiet = self._frames == self._heard_before_watch
            self._empty_looks = self._empty_looks + 1 if quiet else 0
        else:
            super()._heard(frame)

    def _wait(self) -> None:
        """Wait for frames; after a silence look whether the queues are empty. Raises ``MapIncomplete`` if so."""
        if self._ledger.unacknowledged > self._most_unacknowledged > 0:
            raise SqsPipesError(
                f"map(ordered=True): {self._ledger.unacknowledged:,} results wait for an earlier value's, more than "
                "can be kept: one value has too many outputs, or is much slower than others. Use ordered=False"
            )
        frames = self._frames
        self._listen(_SILENCE)
        if self._frames == frames:
            self._free_seats()
        if self._frames != frames or self._watching:
            return
        if self._empty_looks >= _LOOKS and len(self._ledger):
            raise MapIncomplete(len(self._ledger), "they are in no queue any more: another process took them")
        self._look()

    def _free_seats(self) -> None:
        """Release workers due for replacement from waiting for our ACKs.

        The value that we need will be run by their successors.
        """
        if any(self._board.get(slot, CALL_STARTED) for slot in self._slots()):
            return
        for child in self._ledger.waiting_on():
            self._child.channel.queue(Kind.LET_GO, {"child": child})
        self._child.channel.flush()

    def _slots(self) -> list[int]:
        """Return the slots that have had a worker."""
        return [slot for index in self._plan.selected for slot in self._board.used(index)]

    def _look(self) -> None:
        if not self._watching:
            self._watching = True
            self._heard_before_watch = self._frames
            self._child.channel.queue(Kind.WATCH)
            self._child.channel.flush()

    # -- ending -------------------------------------------------------------------------------------------------

    def _wait_until_empty(self) -> None:
        """Wait until the queues are empty: the message of a killed worker comes again after its result was handed out.

        On SQS, where emptiness takes a minute to know, only after a worker was replaced.
        """
        if self._connection is None and not self._job.resumed:
            return
        # A worker that was one too many may have died, too, and has no successor.
        left = any(not self._board.get(slot, EXPECTED) for slot in self._slots())
        replaced = left or any(self._board.get(slot, INCARNATION) > 1 for slot in self._slots())
        if self._settle > 0 and not replaced:
            return
        self._look()
        while self._watching and self._outcome is None and self._unknown is None and not len(self._ledger):
            self._listen(None)
        self._check_unknown()

    def _end(self) -> None:
        if self._outcome is not None:
            self._end_early()
        self._child.channel.queue(Kind.DRAIN, {"reason": "ended"})
        self._child.channel.flush()
        while self._outcome is None:
            self._listen(None)
        self._check_unknown()
        self._end_with_outcome()

    def _end_early(self) -> None:
        """End the map with a run that is over before all values are done. Raises ``MapIncomplete``."""
        assert self._outcome is not None
        missing = self._missing
        if self._outcome.failed or (self._exhausted and not missing):
            self._end_with_outcome()
        self._summary = self._outcome.summary
        self._finish()
        reason = f"it was stopped ({self._outcome.summary.reason}). {cure(self._job, self._broker)}"
        raise MapIncomplete(missing, reason)

    def _finish(self) -> int:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._met is not None:
            self._met.close()
        try:
            return super()._finish()
        finally:
            # The supervisor, which holds the lock too, has been reaped.
            if self._lock is not None:
                self._lock.release()


def _dead_letter_error(frame: Frame) -> BaseException:
    if frame.blob:
        return rebuild(Report.from_bytes(frame.blob))
    header = frame.header
    if header["error"] == "Cancelled":
        return Cancelled(header["stage"], header["worker"])
    kind = TaskTimeout if header["error"] == "TaskTimeout" else WorkerLost
    return kind(header["stage"], header["worker"], header["why"])
