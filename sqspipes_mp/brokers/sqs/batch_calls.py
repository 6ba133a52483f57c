"""Batch calls, repeated until each entry has succeeded or cannot succeed (any process with a connection open)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from sqspipes_mp.brokers.base import ASKED_EVERY, Handle, Unwanted
from sqspipes_mp.brokers.sqs.calls import Calls
from sqspipes_mp.brokers.sqs.entries import Entry, by_queue, faults_of, handle_batches, take_batch
from sqspipes_mp.brokers.sqs.faults import Fault, Kind, refusal, unsendable
from sqspipes_mp.brokers.sqs.queues import Queues
from sqspipes_mp.errors import BrokerError, MessageError

#: Kinds of faults that every entry for the queue would have.
_ABOUT_THE_QUEUE = (Kind.MISSING, Kind.DENIED, Kind.CREDENTIALS)


def _always(_: Entry) -> bool:
    return True


def _all(still_wanted: Callable[[Entry], bool], batch: Sequence[Entry]) -> bool:
    return all(map(still_wanted, batch))


class Sent(NamedTuple):
    """The result of a send; its entries are named by their keys."""

    #: Entries that were not sent.
    unsent: set[int]
    #: Errors of the queues.
    errors: list[BrokerError]
    #: Errors of the entries that were refused for their size or characters.
    refused: dict[int, MessageError]


class BatchCalls:
    """Makes batch calls for any thread; entries with a transient fault are tried again without the others."""

    def __init__(self, calls: Calls, queues: Queues) -> None:
        self._calls = calls
        self._queues = queues

    def send(self, entries: Sequence[Entry], still_wanted: Callable[[Entry], bool] = _always) -> Sent:
        """Send until each entry is accepted, refused or no longer wanted.

        ``still_wanted`` is asked for each entry before each try. An entry behind a refused one of its FIFO group is not
        sent either.
        """
        unsent: set[int] = set()
        errors: list[BrokerError] = []
        unsendables: dict[int, MessageError] = {}
        for queue, queued in by_queue(entries).items():
            pending = deque(queued)
            failures = 0
            while pending:
                # The URL is found before ``still_wanted`` is asked: finding it may take as long as any call.
                self._queues.find(queue)
                taken = take_batch(pending)
                batch = [entry for entry in taken if still_wanted(entry)]
                unsent.update({entry.key for entry in taken} - {entry.key for entry in batch})
                if not batch:
                    continue
                on_wire = [entry.wire(i) for i, entry in enumerate(batch)]
                faults = self._batch("SendMessageBatch", queue, on_wire, partial(_all, still_wanted, batch))
                refused = [(batch[i], fault) for i, fault in faults.items() if fault.kind is not Kind.TRANSIENT]
                again = [batch[i] for i, fault in sorted(faults.items()) if fault.kind is Kind.TRANSIENT]
                unsendables |= {e.key: refusal(fault, queue, e.size) for e, fault in refused if unsendable(fault)}
                about_queue = [fault for _, fault in refused if not unsendable(fault)]
                errors += [self._calls.error(fault, "SendMessageBatch", queue) for fault in about_queue[:1]]
                unsent.update(entry.key for entry, _ in refused)
                # Tried again before later entries of their groups. Later entries of a refused one's group are not sent.
                pending.extendleft(reversed(again))
                lost = {entry.line for entry, _ in refused} - {None}
                if any(fault.kind in _ABOUT_THE_QUEUE for _, fault in refused):
                    unsent.update(entry.key for entry in pending)
                    break
                if lost:
                    unsent.update(entry.key for entry in pending if entry.line in lost)
                    pending = deque(entry for entry in pending if entry.line not in lost)
                failures = self._wait_after(faults, "SendMessageBatch", queue, failures)
        return Sent(unsent, errors, unsendables)

    def send_at_once(self, batches: Sequence[Sequence[Entry]], wanted: Callable[[], bool] | None = None) -> list[Sent]:
        """Send batches in a thread each; returns once all have ended.

        An exception, Ctrl-C included, ends the tries of the others: each of them is over with its request under way.
        ``wanted``: see ``Connection.feed``, as ``Unwanted`` is.
        """
        if len(batches) == 1 and wanted is None:
            return [self.send(batches[0])]
        stop = threading.Event()
        with ThreadPoolExecutor(len(batches), "sqs-send") as pool:
            sends = [pool.submit(self.send, batch, lambda _: not stop.is_set()) for batch in batches]
            try:
                while wanted is not None and wait(sends, ASKED_EVERY).not_done:
                    if not wanted():
                        raise Unwanted
                return [send.result() for send in sends]
            except BaseException:
                stop.set()
                with self._calls.without_pauses():
                    wait(sends)
                raise

    def each(self, operation: str, handles: Sequence[Handle], extra: Mapping[str, Any]) -> dict[Handle, Fault]:
        """Call a batch operation on deliveries until each has succeeded or cannot; return the faults of the latter.

        ``extra``: parameters of each entry beside its receipt.
        """
        final: dict[Handle, Fault] = {}
        for queue, batch in handle_batches(handles):
            pending = list(batch)
            failures = 0
            while pending:
                entries = [{"Id": str(i), "ReceiptHandle": h.receipt, **extra} for i, h in enumerate(pending)]
                faults = self._batch(operation, queue, entries)
                final.update({pending[i]: f for i, f in faults.items() if f.kind is not Kind.TRANSIENT})
                pending = [pending[i] for i, f in sorted(faults.items()) if f.kind is Kind.TRANSIENT]
                failures = self._wait_after(faults, operation, queue, failures)
        return final

    def _batch(
        self,
        operation: str,
        queue: str,
        entries: Sequence[dict[str, Any]],
        worthwhile: Callable[[], bool] | None = None,
    ) -> dict[int, Fault]:
        """Make one batch call; return the faults by position. A batch refused as a whole is tried entry by entry.

        ``worthwhile`` is asked before each further try; once False, the entries not done yet have a transient fault.
        """
        url = self._queues.find(queue)
        if isinstance(url, Fault):
            return dict.fromkeys(range(len(entries)), url)
        params = {"QueueUrl": url, "Entries": entries}
        result = self._calls.attempt(operation, queue, params, partial(faults_of, entries), worthwhile=worthwhile)
        if isinstance(result, Fault):
            if len(entries) == 1 or result.kind is Kind.TRANSIENT or result.kind in _ABOUT_THE_QUEUE:
                return dict.fromkeys(range(len(entries)), result)
            faults: dict[int, Fault] = {}
            for position, entry in enumerate(entries):
                if position and worthwhile is not None and not worthwhile():
                    faults[position] = replace(result, kind=Kind.TRANSIENT)
                elif fault := self._batch(operation, queue, [entry], worthwhile):
                    faults[position] = fault[0]
            return faults
        return result

    def _wait_after(self, faults: Mapping[int, Fault], operation: str, queue: str, failures: int) -> int:
        """Back off where entries have a transient fault; return the number of such batches in a row."""
        transient = [fault for fault in faults.values() if fault.kind is Kind.TRANSIENT]
        if not transient:
            return 0
        self._calls.pause(self._calls.plan_retry(transient[0], operation, queue, failures + 1))
        self._calls.check_failures(transient[0], operation, queue, failures + 1)
        return failures + 1
