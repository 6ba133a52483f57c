"""The leases of one incarnation of a worker, in shared memory (worker, keeper, supervisor).

The worker writes a lease's entry before the message can run, and frees it after the delete was accepted. The keeper
reads entries while they change, so each has a generation and a checksum, which are checked before and after the read.
The keeper's own words about an entry (extended until, lost) are beside it. The supervisor assigns a region to a worker
and marks it when the worker is dead.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from sqspipes_mp.brokers.base import Handle
from sqspipes_mp.messages.attributes import PACKED_OVERHEAD, Attribute, packed, unpacked
from sqspipes_mp.messages.limits import MAX_BYTES

#: Where a queue service limits how long a message can be in flight, as SQS does (12 hours from its receive; Amazon SQS
#: Developer Guide, visibility timeout): the time before that limit from which a lease is not extended, in seconds, and
#: the largest share of the limit that it may be.
_UNEXTENDED = 60.0, 1 / 20
#: The same for the time at which a call that still has the message is killed, so that the keeper can judge the lease.
_KILLED = 120.0, 1 / 10
#: The same for the time from which a call is asked to come to an end.
_ASKED = 600.0, 1 / 4


class LeaseState(IntEnum):
    """How far a message has come in its worker."""

    #: The entry has no message.
    FREE = 0
    #: Received, not started; never charged.
    HELD = 1
    #: In the function.
    RUNNING = 2
    #: The function has returned; outputs are not accepted yet.
    DONE = 3
    #: Outputs are accepted; the message is not deleted yet.
    SENT = 4
    #: The worker is changing the message's visibility, deleting or dead-lettering it.
    CLOSING = 5
    #: The call raised; charged whatever the worker's end.
    FAILED = 6
    #: As CLOSING, after a call that raised; charged whatever the worker's end.
    CHARGING = 7


@dataclass(frozen=True, slots=True)
class Lease:
    """A consistent copy of one entry."""

    #: The entry's number in its region.
    index: int
    #: The number of the entry's message, counting those that the entry has had.
    generation: int
    state: LeaseState
    handle: Handle
    #: The message's FIFO group.
    group: str | None
    #: Deliveries of the message, this one included.
    receives: int
    #: Attempts charged before this delivery.
    charges: int
    #: When the message was received, seconds of ``lease_now``.
    received_at: float
    #: When the lease ends, seconds of ``lease_now``.
    deadline: float
    #: When the message was sent, epoch seconds; 0: not known.
    sent_at: float
    #: When the call began, monotonic seconds; infinite while a generator waits for a yield to be sent, which counts
    #: towards no timeout.
    started_at: float
    #: Whether the keeper has extended the lease.
    extended: bool
    #: Whether the keeper has found the receipt stale.
    lost: bool
    #: Whether the call has other messages as well (a batch), so that none of them is to blame.
    company: bool = False


def extended_until(lease: Lease, longest: float | None) -> float:
    """Return the time past which a lease is not extended, seconds of ``lease_now``; ``longest``: ``longest_hold``."""
    return _before_the_end(lease, longest, *_UNEXTENDED)


def killed_at(lease: Lease, longest: float | None) -> float:
    """Return when a call that still has the message is killed, seconds of ``lease_now``; infinite without a limit."""
    return _before_the_end(lease, longest, *_KILLED)


def _before_the_end(lease: Lease, longest: float | None, seconds: float, share: float) -> float:
    return math.inf if longest is None else lease.received_at + longest - min(seconds, longest * share)


def asked_after(longest: float | None) -> float:
    """Return the seconds from its receive after which a message's call is to come to an end; infinite: never."""
    return math.inf if longest is None else longest - min(_ASKED[0], longest * _ASKED[1])


def crashed_in(running: Sequence[Lease]) -> Lease | None:
    """Return the lease that a crash is charged to: the only one that ran, unless it is one of a batch."""
    return running[0] if len(running) == 1 and not running[0].company else None


#: Leases one worker can hold at once: prefetched, running, and done but not yet deleted.
LEASES = 512
#: Bytes of a receipt handle (Amazon SQS Developer Guide, queue and message identifiers: up to 1,024 characters).
_RECEIPT = 1024
#: Bytes of a message id.
_ID = 128
#: Bytes of a FIFO group (Amazon SQS API Reference, SendMessage, MessageGroupId: up to 128 characters).
_GROUP = 128
#: Generation, queue, lengths of receipt, id and group, receives, charges, received at, deadline, sent at.
_FIXED = struct.Struct("<IHHHHIIddd")
_TEXT_AT = 64
_CRC_AT = _TEXT_AT + _RECEIPT + _ID + _GROUP
_ENTRY = _CRC_AT + 64
_CRC = struct.Struct("<I")
#: Worker: a byte, 1 where one call has several messages (a batch).
_COMPANY = _CRC_AT + 9
#: Worker: when the call began, monotonic seconds; infinite while its clock is stopped.
_STARTED = _CRC_AT + 16
#: Keeper: the generation of the two words below.
_KEPT_GENERATION = _CRC_AT + 24
#: Keeper: the end of the extended lease, seconds of ``lease_now``.
_KEPT_UNTIL = _CRC_AT + 32
#: Keeper: a byte, 1 where the receipt is stale.
_KEPT_LOST = _CRC_AT + 40
_U32 = struct.Struct("<I")
#: Native, which packs in one store: other processes read the word meanwhile.
_F64 = struct.Struct("d")

_HEADER = 128
#: Worker: a byte for each entry, one of LeaseState. Together, so that a look at an idle worker touches one page.
_STATES_AT = _HEADER
_ENTRIES_AT = _STATES_AT + LEASES
_NOTHING = bytes(LEASES)
_STACK_AT = _ENTRIES_AT + LEASES * _ENTRY
#: Bytes of a dead worker's stack dump that are kept.
STACK_BYTES = 16_384
REGION_BYTES = _STACK_AT + STACK_BYTES
_BODY_HEADER = 16
#: Bytes of a lane, which keeps the running message of one call: header, body, attributes.
_LANE = -(-(_BODY_HEADER + MAX_BYTES + PACKED_OVERHEAD) // 64) * 64

# Header words; beside each the process that writes it.
#: Supervisor: the number of the region's worker, counted up with each.
_ASSIGNED = 0
#: Supervisor: as ``_ASSIGNED`` once that worker is dead for certain.
_DIED = 1
#: Keeper: as ``_ASSIGNED`` once all leases of that worker are judged.
_JUDGED = 2
#: Supervisor: the worker's slot.
_SLOT = 3
#: Supervisor: one of Cause, and ``_KNOWN``.
_CAUSE = 4
#: A bit of the cause's word: the worker was killed for one call that the supervisor knew.
_KNOWN = 1 << 8
#: Supervisor: exit code + 256; a signal is negative.
_EXITCODE = 5
#: Supervisor: the worker's pid.
_WORKER_PID = 6
#: Supervisor: the call that the worker is about to be killed for: generation, Cause, entry index + 1.
_BLAMED = 7
#: Supervisor: bytes of the stack dump.
_STACK_SIZE = 8


class Cause(IntEnum):
    """Why a worker is dead."""

    #: The worker left as asked.
    CLEAN = 0
    #: A signal, ``os._exit``, or the kernel.
    CRASH = 1
    #: Killed: a call outlived its task's timeout.
    TIMEOUT = 2
    #: Killed: over its memory limit.
    MEMORY = 3
    #: Killed: the grace of the shutdown was over; no message is to blame.
    CUT = 4
    #: Killed: the container was nearly full, most of it gained by the worker.
    FULL = 5
    #: Killed to make room in the container; other workers had no less of it.
    ROOM = 6
    #: Killed: a call had its message for nearly as long as the queue service lets one be in flight.
    HOLD = 7
    #: Killed: a person cancelled a call.
    CANCEL = 8


#: Causes for which the late call does not count, even where it returns.
_LATE = frozenset({Cause.TIMEOUT, Cause.HOLD})


@dataclass(frozen=True, slots=True)
class Blame:
    """The mark on a call that a worker is killed for."""

    #: The number of the call's entry.
    index: int
    #: The entry's generation.
    generation: int
    cause: Cause

    def means(self, lease: Lease) -> bool:
        """Tell whether the mark is on this lease's call, and not on an earlier one in the same entry."""
        return (self.index, self.generation) == (lease.index, lease.generation)


def body_bytes(calls: int) -> int:
    """Return the bytes that the lanes of one worker need; ``calls``: those that it runs at once."""
    return calls * _LANE


def id_digest(message_id: str) -> bytes:
    """Return the 16 bytes that identify a message in the charge tables."""
    return hashlib.blake2b(message_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class LeaseTable:
    """One region of the board: the leases of one worker, and a lane for each call that it runs at once."""

    def __init__(self, view: memoryview, index: int) -> None:
        self.index = index
        self._view = view
        self._words = view[:_HEADER].cast("Q")
        self._states = view[_STATES_AT:_ENTRIES_AT]

    def release(self) -> None:
        """Drop the view of the board."""
        self._words.release()
        self._states.release()
        self._view.release()

    # -- supervisor ---------------------------------------------------------------------------------------------

    @property
    def free(self) -> bool:
        """Whether no worker has the region, and all leases in it are judged."""
        return self._words[_ASSIGNED] == self._words[_JUDGED]

    def assign(self, slot: int) -> None:
        """Give the region to a new worker of ``slot``; it must be free."""
        self._states[:] = _NOTHING
        self._words[_SLOT] = slot
        self._words[_BLAMED] = 0
        self._words[_ASSIGNED] += 1

    def blame(self, lease: Lease, cause: Cause) -> None:
        """Mark the call that the worker is about to be killed for; before any step of the kill."""
        self._words[_BLAMED] = lease.generation << 32 | cause << 16 | (lease.index + 1)

    def spare(self) -> None:
        """Take back the mark: its call is over."""
        self._words[_BLAMED] = 0

    def runs(self, lease: Lease) -> bool:
        """Tell whether a call that was read a moment ago runs still."""
        base = _ENTRIES_AT + lease.index * _ENTRY
        same = _U32.unpack_from(self._view, base)[0] == lease.generation
        return bool(same and self._states[lease.index] == LeaseState.RUNNING)

    def mark_dead(self, cause: Cause, exitcode: int, pid: int, stack: bytes = b"", *, known: bool = False) -> None:
        """Note that the worker is dead for certain (reaped).

        Args:
            cause: of its death.
            exitcode: as ``Process.exitcode``; negative: a signal.
            pid: the worker's.
            stack: its call's stack; ``STACK_BYTES`` of it are kept.
            known: whether it was killed for one call that was marked, though that may have come back since.
        """
        kept = stack[:STACK_BYTES]
        self._view[_STACK_AT : _STACK_AT + len(kept)] = kept
        self._words[_STACK_SIZE] = len(kept)
        self._words[_CAUSE] = cause | (_KNOWN if known else 0)
        self._words[_EXITCODE] = exitcode + 256
        self._words[_WORKER_PID] = pid
        self._words[_DIED] = self._words[_ASSIGNED]

    # -- keeper -------------------------------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether no entry has a message."""
        return self._states.tobytes() == _NOTHING

    @property
    def live(self) -> bool:
        """Whether a worker has the region and is not known to be dead."""
        return not self.free and self._words[_DIED] != self._words[_ASSIGNED]

    @property
    def to_judge(self) -> bool:
        """Whether the worker is dead and its leases are not judged."""
        return not self.free and self._words[_DIED] == self._words[_ASSIGNED]

    @property
    def slot(self) -> int:
        """The worker's slot."""
        return self._words[_SLOT]

    @property
    def death(self) -> tuple[Cause, int, int]:
        """The dead worker's cause, exit code and pid."""
        words = self._words
        return Cause(words[_CAUSE] & ~_KNOWN), words[_EXITCODE] - 256, words[_WORKER_PID]

    @property
    def known(self) -> bool:
        """Whether the dead worker was killed for one known call, so that none beside it is a suspect."""
        return bool(self._words[_CAUSE] & _KNOWN)

    @property
    def blamed(self) -> Blame | None:
        """The mark on the call that the worker was, or is about to be, killed for; None: no single call is to blame.

        The mark on a call that came back by itself ends with its lease.
        """
        word = self._words[_BLAMED]
        if not word:
            return None
        blame = Blame((word & 0xFFFF) - 1, word >> 32, Cause(word >> 16 & 0xFFFF))
        base = _ENTRIES_AT + blame.index * _ENTRY
        held = self._states[blame.index] != LeaseState.FREE
        return blame if held and _U32.unpack_from(self._view, base)[0] == blame.generation else None

    @property
    def stack(self) -> str:
        """The dead worker's stack; empty where it is not known."""
        size = min(self._words[_STACK_SIZE], STACK_BYTES)
        return bytes(self._view[_STACK_AT : _STACK_AT + size]).decode("utf-8", "replace")

    def mark_judged(self) -> None:
        """Free the region: all leases of the dead worker are judged."""
        self._words[_JUDGED] = self._words[_ASSIGNED]

    def keep(self, lease: Lease, until: float) -> None:
        """Note that a lease was extended to ``until``, seconds of ``lease_now``."""
        base = _ENTRIES_AT + lease.index * _ENTRY
        _F64.pack_into(self._view, base + _KEPT_UNTIL, until)
        self._view[base + _KEPT_LOST] = 0
        _U32.pack_into(self._view, base + _KEPT_GENERATION, lease.generation)

    def lose(self, lease: Lease) -> None:
        """Note that a lease's receipt is stale."""
        base = _ENTRIES_AT + lease.index * _ENTRY
        _F64.pack_into(self._view, base + _KEPT_UNTIL, 0.0)
        self._view[base + _KEPT_LOST] = 1
        _U32.pack_into(self._view, base + _KEPT_GENERATION, lease.generation)

    # -- worker -------------------------------------------------------------------------------------------------

    def write(
        self,
        index: int,
        queue: int,
        handle: Handle,
        group: str | None,
        *,
        receives: int,
        charges: int,
        received_at: float,
        deadline: float,
        sent_at: float,
    ) -> None:
        """Write entry ``index`` as HELD; ``queue``: its index in the plan's names, and the rest as of ``Lease``.

        Raises ``ValueError`` for a receipt handle, id or group that does not fit.
        """
        receipt, ident = handle.receipt.encode(), handle.message_id.encode()
        tag = (group or "").encode()
        if len(receipt) > _RECEIPT or len(ident) > _ID or len(tag) > _GROUP:
            raise ValueError(f"a receipt handle, id or group of {len(receipt)}, {len(ident)}, {len(tag)} bytes")
        base = _ENTRIES_AT + index * _ENTRY
        view = self._view
        generation = (_U32.unpack_from(view, base)[0] + 1) & 0xFFFFFFFF
        _FIXED.pack_into(
            view, base, generation, queue, len(receipt), len(ident), len(tag), receives, charges,
            received_at, deadline, sent_at,
        )  # fmt: skip
        text = receipt + ident + tag
        start = base + _TEXT_AT
        view[start : start + len(text)] = text
        crc = zlib.crc32(text, zlib.crc32(view[base : base + _FIXED.size]))
        _CRC.pack_into(view, base + _CRC_AT, crc)
        self._states[index] = LeaseState.HELD

    def state(self, index: int) -> LeaseState:
        """Return the state of entry ``index``."""
        return LeaseState(self._states[index])

    def set_state(self, index: int, state: LeaseState) -> None:
        """Write the state of entry ``index``."""
        self._states[index] = state

    def finish(self, index: int) -> Cause | None:
        """Mark entry ``index`` as done; return why its call does not count, None where it does.

        In this order: the supervisor marks a call as late, then looks whether it runs, and leaves a done one to its
        worker.
        """
        self._states[index] = LeaseState.DONE
        return self.late_for(index) if self._words[_BLAMED] else None

    def start(self, index: int, now: float, lane: int, body: str, attributes: Sequence[Attribute] = ()) -> None:
        """Mark entry ``index`` as running from ``now`` (monotonic seconds), with a copy of its body for the keeper.

        Args:
            index: the entry's number.
            now: when the call begins.
            lane: the number of the call among those that run at once.
            body: the message's.
            attributes: the message's; a body that does not fit with them is not copied.
        """
        raw = body.encode("utf-8", "surrogatepass")
        size, rest = len(raw), 0
        if attributes:
            extra = packed(attributes)
            rest = len(extra)
            raw += extra
        at = REGION_BYTES + lane * _LANE
        base = _ENTRIES_AT + index * _ENTRY
        if _BODY_HEADER + size + rest > _LANE:
            size = rest = 0
        struct.pack_into("<IIII", self._view, at, index, _U32.unpack_from(self._view, base)[0], size, rest)
        self._view[at + _BODY_HEADER : at + _BODY_HEADER + size + rest] = raw[: size + rest]
        _F64.pack_into(self._view, base + _STARTED, now)
        self._view[base + _COMPANY] = 0
        self._states[index] = LeaseState.RUNNING

    def start_together(self, index: int, now: float) -> None:
        """Mark entry ``index`` as running in one call with others; none is to blame, so no body is kept."""
        base = _ENTRIES_AT + index * _ENTRY
        _F64.pack_into(self._view, base + _STARTED, now)
        self._view[base + _COMPANY] = 1
        self._states[index] = LeaseState.RUNNING

    def pause(self, index: int) -> float:
        """Stop the clock of a running call, which goes on running; return when it began, monotonic seconds."""
        at = _ENTRIES_AT + index * _ENTRY + _STARTED
        started: float = _F64.unpack_from(self._view, at)[0]
        _F64.pack_into(self._view, at, math.inf)
        return started

    def resume(self, index: int, started: float) -> None:
        """Have the clock of a paused call go on as if the call had begun at ``started`` (monotonic seconds)."""
        _F64.pack_into(self._view, _ENTRIES_AT + index * _ENTRY + _STARTED, started)

    def late_for(self, index: int) -> Cause | None:
        """Return the cause for which the supervisor has marked the call of entry ``index`` as late; None: no mark."""
        word = self._words[_BLAMED]
        if not word or (word & 0xFFFF) != index + 1:
            return None
        cause = Cause(word >> 16 & 0xFFFF)
        same = _U32.unpack_from(self._view, _ENTRIES_AT + index * _ENTRY)[0] == word >> 32
        return cause if same and cause in _LATE else None

    def held_until(self, index: int, received_until: float) -> float:
        """Return when the lease of entry ``index`` ends, seconds of ``lease_now``; 0: the keeper found it stale.

        ``received_until``: the end that its worker has written; the keeper may have extended it.
        """
        base = _ENTRIES_AT + index * _ENTRY
        if _U32.unpack_from(self._view, base + _KEPT_GENERATION) != _U32.unpack_from(self._view, base):
            return received_until
        if self._view[base + _KEPT_LOST]:
            return 0.0
        return max(received_until, float(_F64.unpack_from(self._view, base + _KEPT_UNTIL)[0]))

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, index: int, queues: tuple[str, ...] = ()) -> Lease | None:
        """Return a consistent copy of entry ``index``; None where it is free or was changing.

        ``queues``: the plan's names, for the handle.
        """
        base = _ENTRIES_AT + index * _ENTRY
        # Before the state: a generation's entry was free since the one before it.
        begun = _U32.unpack_from(self._view, base)[0]
        state = self._states[index]
        if state == LeaseState.FREE:
            return None
        raw = bytes(self._view[base : base + _ENTRY])
        generation, queue, *lengths, receives, charges, received_at, deadline, sent_at = _FIXED.unpack_from(raw)
        a, b, c = lengths
        text = raw[_TEXT_AT : _TEXT_AT + a + b + c]
        if _CRC.unpack_from(raw, _CRC_AT)[0] != zlib.crc32(text, zlib.crc32(raw[: _FIXED.size])):
            return None
        # The entry may have been freed, written anew and brought to the same state in between.
        now = _U32.unpack_from(self._view, base)[0]
        if self._states[index] != state or not begun == generation == now:
            return None
        kept = _U32.unpack_from(raw, _KEPT_GENERATION)[0] == generation
        name = queues[queue] if queue < len(queues) else ""
        return Lease(
            index=index,
            generation=generation,
            state=LeaseState(state),
            handle=Handle(name, text[:a].decode(), text[a : a + b].decode()),
            group=text[a + b :].decode() or None,
            receives=receives,
            charges=charges,
            received_at=received_at,
            deadline=max(deadline, _F64.unpack_from(raw, _KEPT_UNTIL)[0]) if kept else deadline,
            sent_at=sent_at,
            started_at=_F64.unpack_from(raw, _STARTED)[0],
            extended=kept,
            lost=bool(kept and raw[_KEPT_LOST]),
            company=bool(raw[_COMPANY]),
        )

    def leases(self, queues: tuple[str, ...]) -> Iterator[Lease]:
        """Yield the leases of all entries in use, but for those that are changing."""
        states = bytes(self._states)
        for index, state in enumerate(states):
            if state and (lease := self.read(index, queues)) is not None:
                yield lease

    def settled(self) -> Iterator[Lease]:
        """Yield the leases of all entries in use, those that are changing once they have changed (its worker)."""
        for index in range(LEASES):
            lease = self.read(index)
            while lease is None and self.state(index) is not LeaseState.FREE:
                lease = self.read(index)
            if lease is not None:
                yield lease

    def body(self, lease: Lease, calls: int) -> str | None:
        """Return the body of a running message; None where it was not copied."""
        found = self._copy(lease, calls)
        return None if found is None else found[0].decode("utf-8", "surrogatepass")

    def attributes(self, lease: Lease, calls: int) -> tuple[Attribute, ...]:
        """Return the attributes of a running message; none where they were not copied."""
        found = self._copy(lease, calls)
        return () if found is None else unpacked(found[1])

    def _copy(self, lease: Lease, calls: int) -> tuple[bytes, bytes] | None:
        for lane in range(calls):
            at = REGION_BYTES + lane * _LANE
            index, generation, size, rest = struct.unpack_from("<IIII", self._view, at)
            if index == lease.index and generation == lease.generation and size:
                raw = bytes(self._view[at + _BODY_HEADER : at + _BODY_HEADER + size + rest])
                return raw[:size], raw[size:]
        return None
