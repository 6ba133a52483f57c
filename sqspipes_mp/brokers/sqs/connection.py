"""An open connection to SQS: the port over batch calls (workers, keeper and, within one call, the caller).

Outputs are sent first and inputs deleted after, in two calls. A process that dies between the two leaves a duplicate,
which a FIFO queue drops within five minutes. Processes share nothing of a connection.
"""

from __future__ import annotations

import math
import resource
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sqspipes_mp.brokers.base import (
    Completion,
    DeadLetter,
    Depth,
    Handle,
    Meter,
    Output,
    OutputsRefused,
    QueueSpec,
    Received,
    Stray,
)
from sqspipes_mp.brokers.sqs.batch_calls import BatchCalls
from sqspipes_mp.brokers.sqs.calls import Calls
from sqspipes_mp.brokers.sqs.entries import (
    MAX_ENTRIES,
    Entry,
    all_received,
    is_fifo,
    of_letter,
    of_output,
    shorter,
    visibility,
    waves,
)
from sqspipes_mp.brokers.sqs.faults import Kind
from sqspipes_mp.brokers.sqs.queues import MAX_WAIT, Queues
from sqspipes_mp.errors import BrokerError
from sqspipes_mp.messages.limits import FAILURE_ATTRIBUTE

#: Most receives, and most sends, under way at once; and the descriptors left for everything else.
_MOST_AT_ONCE, _OTHER_DESCRIPTORS = 24, 64


class SqsConnection:
    """The connection of ``SQS.open``; any thread of the process that opened it may use it.

    ``tend``: shares this process's credentials; None: the process does not share them.
    """

    batch = fetch = MAX_ENTRIES
    #: Each receive is paid for: tasks of up to 50 ms get full ones.
    ahead = 0.5
    keeps_charges = False
    linger = 0.15
    #: Counts may be wrong until a minute after the last send (Amazon SQS API Reference, GetQueueAttributes).
    settle = 60.0
    #: Longest time of a purge, seconds; messages sent in it may vanish (Amazon SQS API Reference, PurgeQueue).
    purge_window = 60.0
    #: Seconds of the long poll between two rounds of short polls, when a receive has several levels. A message waits
    #: that long at most.
    sweep = 1

    def __init__(self, calls: Calls, queues: Queues, tend: Callable[[], None] | None = None) -> None:
        self._calls = calls
        self._tend = tend
        self._queues = queues
        self._batches = BatchCalls(calls, queues)
        #: Counts the long polls of receives with several levels; each level gets one in turn.
        self._turn = 0
        self.carriers = self.receivers = requests_at_once(resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    def count_requests(self, meter: Meter) -> None:
        """Have every request from now on counted."""
        self._calls.count_requests(meter)

    @property
    def throttles(self) -> int:
        """Requests that SQS has throttled so far."""
        return self._calls.throttles

    @property
    def moved(self) -> bool:
        """False: queues of SQS stay at their addresses."""
        return False

    def ensure(self, queues: Sequence[QueueSpec], *, create: bool) -> None:
        """Create missing queues (``create``) or raise ``QueueMissing``; warn of attributes that differ."""
        self._queues.ensure(queues, create=create)

    def check_owners(self, queues: Sequence[QueueSpec]) -> None:
        """Do nothing: SQS knows the account that owns a queue, not the pipeline."""

    def strays(self, domain: str, known: Collection[str]) -> list[Stray]:  # noqa: ARG002  (the port's)
        """Return nothing: it would take the right to list all queues, which is needed for nothing else."""
        return []

    def receive(
        self, queues: Sequence[str], max_messages: int, wait: float, visibility: float, *, attributes: bool = False
    ) -> list[Received]:
        """Return up to 10 deliveries of one queue, the first that has any.

        A single queue gets one request, a long poll of ``wait`` rounded up to whole seconds (at most 20). Several
        queues, while all are empty, get each second one short poll each and one long poll of one second, at each in
        turn: 17 requests per second at 16 levels.
        """
        if len(queues) == 1:
            seconds = min(MAX_WAIT, max(0, math.ceil(wait)))
            return self._poll(queues[0], max_messages, seconds, visibility, attributes=attributes)
        until = time.monotonic() + wait
        while True:
            for queue in queues:
                found = self._poll(queue, max_messages, 0, visibility, attributes=attributes)
                if found:
                    return found
            if time.monotonic() >= until or self._calls.interrupted.is_set():
                return []
            self._turn += 1
            queue = queues[self._turn % len(queues)]
            found = self._poll(queue, max_messages, self.sweep, visibility, attributes=attributes)
            if found:
                return found

    def complete(
        self,
        completions: Sequence[Completion],
        on_sent: Callable[[Completion], None] | None = None,
        still_ours: Callable[[Completion], bool] | None = None,
    ) -> list[Handle]:
        """Send all outputs, call ``on_sent``, delete the inputs; returns the stale handles.

        ``still_ours`` is asked before each try to send: an outage may put hours between two tries, and SQS remembers
        accepted deduplication ids for five minutes only. Raises ``OutputsRefused`` and ``BrokerError``, after all else
        is done.
        """
        entries: list[Entry] = []
        owners: list[int] = []
        for owner, completion in enumerate(completions):
            for output in completion.outputs:
                entries.append(of_output(len(owners), output))
                owners.append(owner)
        lost: set[int] = set()

        def is_ours(owner: int) -> bool:
            """Tell whether a completion may still be sent; once it may not, it is lost for good."""
            if still_ours is not None and owner not in lost and not still_ours(completions[owner]):
                lost.add(owner)
            return owner not in lost

        unsent, errors, refused = self._batches.send(entries, lambda entry: is_ours(owners[entry.key]))
        incomplete = {owners[key] for key in unsent} | lost
        if lost:
            # A completion without outputs must not be done either where its group is no longer ours.
            for owner in sorted(set(range(len(completions))).difference(owners)):
                is_ours(owner)
            incomplete |= lost
        incomplete |= _behind(completions, incomplete)
        done = [completion for owner, completion in enumerate(completions) if owner not in incomplete]
        if on_sent is not None:
            for completion in done:
                on_sent(completion)
        stale = [handle for owner in sorted(lost) if (handle := completions[owner].input) is not None]
        stale += self._delete([c.input for c in done if c.last and c.input is not None], errors)
        why = {owners[key]: error for key, error in reversed(refused.items()) if owners[key] not in lost}
        # Completions behind a refused or lost one of their group: not sent, and not deleted.
        behind = [completions[owner] for owner in sorted(incomplete - why.keys() - lost)]
        if why or behind:
            raise OutputsRefused([(completions[owner], error) for owner, error in sorted(why.items())], behind, stale)
        return stale

    def feed(
        self,
        outputs: Sequence[Output],
        *,
        keyed: bool,  # noqa: ARG002  (the port's)
        wanted: Callable[[], bool] | None = None,
    ) -> list[int]:
        """Send messages that have no input; returns an empty list: SQS does not tell which duplicates it dropped."""
        for queue in dict.fromkeys(output.queue for output in outputs):
            # The caller creates a missing queue and feeds all again: a missing one is found before anything is sent.
            self._queues.url(queue, wanted)
        for wave in waves((of_output(key, output) for key, output in enumerate(outputs)), self.carriers):
            results = self._batches.send_at_once(wave, wanted)
            _raise([error for sent in results for error in sent.errors])
            for sent in results:
                for error in sent.refused.values():
                    raise error
        return []

    def extend(self, handles: Sequence[Handle], seconds: float, *, attempts: int = 0) -> list[Handle]:  # noqa: ARG002  (the port's)
        """Hide deliveries for ``seconds``, rounded up; returns the stale handles. SQS keeps no ``attempts``."""
        stale, beyond, errors = self._change(handles, visibility(seconds))
        for less in shorter(visibility(seconds)):
            if beyond:
                more, beyond, failed = self._change(beyond, less)
                stale += more
                errors += failed
        _raise(errors)
        return stale + beyond

    def dead_letter(self, letters: Sequence[DeadLetter]) -> list[Handle]:
        """Send to the dead-letter queues, then delete the originals of accepted letters; returns the stale handles."""
        tried = list(letters)
        unsent, errors, refused = self._batches.send([of_letter(key, letter) for key, letter in enumerate(tried)])
        # A refused letter goes without its reason, then without attributes: the queue's own size limit may leave them
        # no room. The caller has logged the reason.
        for lighter in (_without_reason, _without_attributes):
            if again := {key for key in refused if lighter(tried[key]) != tried[key]}:
                tried = [lighter(each) if key in again else each for key, each in enumerate(tried)]
                still_unsent, more, still = self._batches.send([of_letter(key, tried[key]) for key in sorted(again)])
                unsent = unsent - again | still_unsent
                errors += more
                refused = {key: error for key, error in refused.items() if key not in again} | still
        errors += [BrokerError(str(error)) for error in refused.values()]
        return self._delete([letter.handle for key, letter in enumerate(letters) if key not in unsent], errors)

    def depth(self, queue: str) -> Depth:
        """Return the approximate numbers of one queue. Raises ``QueueMissing``."""
        return self._queues.depth(queue)

    def address(self, queue: str) -> str:
        """Return a queue's URL. Raises ``QueueMissing``."""
        return self._queues.url(queue)

    def purge(self, queues: Sequence[str]) -> None:
        """Empty queues; returns after the window in which SQS does so."""
        self._queues.purge(queues)
        if queues:
            self._calls.pause(self.purge_window)

    def delete(self, queues: Sequence[str]) -> None:
        """Delete queues. For 60 s SQS may still answer for them, and refuses to create them again."""
        self._queues.delete(queues)

    def tend(self) -> None:
        """Refresh this process's credentials when they are due, and share them through the wallet."""
        if self._tend is not None:
            self._tend()

    def interrupt(self) -> None:
        """Make receives return, long polls too; where boto3 makes the calls a poll in flight ends by itself."""
        self._calls.interrupt()

    def receive_again(self) -> None:
        """Undo ``interrupt``."""
        self._calls.receive_again()

    def close(self) -> None:
        """Close the sockets."""
        self._calls.close()

    def _poll(self, queue: str, max_messages: int, wait: int, hidden: float, *, attributes: bool) -> list[Received]:
        """Return the deliveries of one ReceiveMessage; ``wait`` and ``hidden``: seconds."""
        params: dict[str, Any] = {
            "QueueUrl": self._queues.url(queue),
            "MaxNumberOfMessages": max(1, min(MAX_ENTRIES, max_messages)),
            "WaitTimeSeconds": wait,
            "VisibilityTimeout": max(1, visibility(hidden)),
            "MessageSystemAttributeNames": ["ApproximateReceiveCount", "SentTimestamp", "MessageGroupId"],
            # The sender's attributes only on demand: asking for them makes every request and reply longer.
            "MessageAttributeNames": ["All" if attributes else FAILURE_ATTRIBUTE],
        }
        if is_fifo(queue):
            # The same id for all tries of one receive: SQS then repeats a lost reply instead of hiding its messages.
            params["ReceiveRequestAttemptId"] = uuid.uuid4().hex
        return self._calls.receive(queue, params, partial(all_received, queue))

    def _delete(self, handles: Sequence[Handle], errors: list[BrokerError]) -> list[Handle]:
        """Delete deliveries; return the stale handles. Raises ``errors`` and those of the deletes."""
        faults = self._batches.each("DeleteMessageBatch", handles, {})
        stale = [handle for handle, fault in faults.items() if fault.kind in (Kind.STALE, Kind.TOO_LONG)]
        gone = set(stale)
        errors += [
            self._calls.error(fault, "DeleteMessageBatch", handle.queue)
            for handle, fault in faults.items()
            if handle not in gone
        ]
        _raise(errors)
        return stale

    def _change(self, handles: Sequence[Handle], seconds: int) -> tuple[list[Handle], list[Handle], list[BrokerError]]:
        """Set visibility timeouts; return the stale handles, the handles that would pass 12 hours, and the errors."""
        operation = "ChangeMessageVisibilityBatch"
        stale, beyond, errors = [], [], []
        for handle, fault in self._batches.each(operation, handles, {"VisibilityTimeout": seconds}).items():
            match fault.kind:
                case Kind.STALE:
                    stale.append(handle)
                case Kind.TOO_LONG:
                    beyond.append(handle)
                case _:
                    errors.append(self._calls.error(fault, operation, handle.queue))
        return stale, beyond, errors


def _behind(completions: Sequence[Completion], incomplete: set[int]) -> set[int]:
    """Return the places of completions that follow an incomplete one of their input's FIFO group."""
    groups: set[str] = set()
    behind: set[int] = set()
    for place, completion in enumerate(completions):
        if completion.group is None or completion.input is None or not is_fifo(completion.input.queue):
            continue
        if place in incomplete:
            groups.add(completion.group)
        elif completion.group in groups:
            # Its outputs may have been sent: the queue drops them when they come again within five minutes.
            behind.add(place)
    return behind


def requests_at_once(descriptors: int) -> int:
    """Return how many receives, and how many sends, may be under way at once.

    At 60 ms and ten messages per request, 24 carry 2,000 messages per second. Each has a connection of its own, so
    there are fewer where the process may have few ``descriptors`` (its soft limit; -1: any number).
    """
    if descriptors < 0:
        return _MOST_AT_ONCE
    return max(1, min(_MOST_AT_ONCE, (descriptors - _OTHER_DESCRIPTORS) // 4))


def _without_reason(letter: DeadLetter) -> DeadLetter:
    return replace(letter, failure=None)


def _without_attributes(letter: DeadLetter) -> DeadLetter:
    """Return the letter without attributes: SQS refuses some names, such as those that only AWS may give."""
    return replace(letter, attributes=())


def _raise(errors: Sequence[BrokerError]) -> None:
    """Raise the first of some errors, the others as its notes."""
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"and: {other}")
        raise errors[0]
