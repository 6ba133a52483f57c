"""Outputs that a queue refused for what they are: their message fails, as if its function had raised (worker).

Such as one larger than the queue's own MaximumMessageSize. It is found out only when the output is carried away, when
the main thread may be at something else; so the carrier itself sees to what becomes of the message.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial

from sqspipes_mp.brokers.base import OutputsRefused
from sqspipes_mp.ipc.channel import Kind
from sqspipes_mp.ipc.leases import LeaseState
from sqspipes_mp.ipc.report.words import message_of, short_id
from sqspipes_mp.ipc.scoreboard import FAILED
from sqspipes_mp.worker.context import Delivery, WorkerContext
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.send.failures import decide_on, letter_of, log_retry, tell_buried
from sqspipes_mp.worker.send.outgoing import Bury, Done, Release

log = logging.getLogger("sqspipes_mp.worker")


class Refusals:
    """Decides about refused outputs. Carriers call it; what it returns is for them to carry at once."""

    def __init__(self, station: WorkerContext, ready: Ready) -> None:
        self._station = station
        self._ready = ready
        #: Receipts of what this worker had of a FIFO group when an earlier message of it was refused or lost.
        self._behind: set[str] = set()
        self._left: list[Release] = []

    def take(self, batch: Sequence[Done], some: OutputsRefused) -> tuple[list[Done], list[Release | Bury]]:
        """Return what of a batch is completed, and what becomes of the rest."""
        reasons = {id(completion): error for completion, error in some.refused}
        unsent = {id(completion) for completion in some.unsent}
        items: list[Release | Bury] = []
        completed = []
        for done in batch:
            error = reasons.get(id(done.completion))
            if error is not None:
                if done.delivery is None:
                    self._source_failed(error)
                    completed.append(done)
                else:
                    items += self._failed(done.delivery, error, done)
            elif id(done.completion) in unsent and done.delivery is not None:
                items += self.go_back(done.delivery)
            else:
                completed.append(done)
        return completed, items

    def holds_back(self, delivery: Delivery) -> bool:
        """Tell whether this worker had a message already when an earlier one of its group was refused or lost."""
        return delivery.received.handle.receipt in self._behind

    def go_back(self, delivery: Delivery) -> list[Release]:
        """Give back a message that is not to blame for anything."""
        return self._now_or_later(Release((delivery,), 0.0))

    def followers(self, delivery: Delivery) -> list[Release]:
        """Give back what follows in the same FIFO group, and mark what of it runs or waits to be carried."""
        group = delivery.received.group
        if not self._station.fifo or group is None:
            return []
        held = self._station.region.leases(())
        # What is held no more is forgotten.
        self._behind = {
            lease.handle.receipt for lease in held if lease.group == group or lease.handle.receipt in self._behind
        }
        followers = self._ready.take_group(group)
        return self._now_or_later(Release(tuple(followers), 0.0)) if followers else []

    def wait_left(self) -> list[Release]:
        """Once every carrier has ended: return what was not to go back before the engine's workers receive no more."""
        station = self._station
        while self._left and not (station.release.wait(1.0) or station.faulted.is_set()):
            pass
        return self._left

    def _failed(self, delivery: Delivery, error: BaseException, done: Done) -> list[Release | Bury]:
        station = self._station
        # Counted where all failures are: the main thread is the counter's only writer.
        self._ready.put_callback(partial(station.count, FAILED, 1))
        decision, error = decide_on(error, delivery, station)
        station.region.set_state(delivery.lease, LeaseState.FAILED)
        items: list[Release | Bury] = []
        if decision.action == "dead":
            items.append(Bury(delivery, letter_of(error, delivery, station)))
            tell_buried(error, delivery, station)
            if done.step is not None:
                # The caller of map was told of children, which will never be.
                name, _, children = done.step
                station.say(Kind.STEP, {}, json.dumps([(name, child, []) for child in children]).encode())
        else:
            if not decision.report:
                log_retry(error, delivery, station, decision.delay)
            items += self._now_or_later(Release((delivery,), decision.delay, charge=True), later=decision.report)
        if decision.report:
            self._end_run(error, short_id(delivery.message.parent))
        return items + self.followers(delivery)

    def _now_or_later(self, item: Release, *, later: bool = False) -> list[Release]:
        """Return an item to carry now; once the run ends it waits, or this engine's workers would take it again."""
        if not (later or self._station.full_stop.is_set()):
            return [item]
        for delivery in item.deliveries:
            self._station.region.set_state(delivery.lease, LeaseState.FAILED if item.charge else LeaseState.DONE)
        self._left.append(item)
        return []

    def _source_failed(self, error: BaseException) -> None:
        """A source has no message to try again: a generator ends with it, a function goes on if its policy says so."""
        station = self._station
        self._ready.put_callback(partial(station.count, FAILED, 1))
        if station.stage.task.is_generator or station.on_error == "raise" or callable(station.on_error):
            self._end_run(error)
        else:
            log.warning("%s: an output was left out: %.300s", station.stage.name, message_of(error))

    def _end_run(self, error: BaseException, message_id: str | None = None) -> None:
        self._station.end_run(error, message_id)
        self._ready.poke()
