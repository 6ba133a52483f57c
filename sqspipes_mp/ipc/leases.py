"""The leases of one incarnation of a worker, in shared memory (worker, keeper; the supervisor opens and closes it).

An entry is written by its worker before the message can run, and cleared after its delete was accepted. The keeper
reads entries while they change, so each carries a generation and a checksum that are checked before and after;
what it has to say (extended until when, lost) is in words of its own beside them.
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

#: Where a queue service limits how long a message can be in flight, as SQS does (12 hours from its receive): seconds
#: before that from which its lease is not extended, and at which a call that still has it is killed, so that there is
#: time to judge it; at most that share of the limit.
_UNEXTENDED, _KILLED = (60.0, 1 / 20), (120.0, 1 / 10)


class LeaseState(IntEnum):
    """Where a message is in its worker."""

    FREE = 0
    HELD = 1  # received, not started: never charged
    RUNNING = 2  # in the function
    DONE = 3  # computed, outputs not accepted yet
    SENT = 4  # outputs accepted, not deleted yet
    CLOSING = 5  # its worker is changing its visibility, deleting or dead-lettering it
    FAILED = 6  # its call raised: charged however its worker ends
    CHARGING = 7  # as CLOSING, after a call that raised: charged however its worker ends


@dataclass(frozen=True, slots=True)
class Lease:
    """A consistent copy of one entry. ``received_at`` and ``deadline`` are by ``lease_now``, ``sent_at`` epoch seconds.

    ``started_at``: monotonic seconds; infinite while a generator waits for what it gave to be sent, which counts
    towards no timeout.
    ``company``: its call has other messages as well (a batch), so that none of them can be told guilty.
    """

    index: int
    generation: int
    state: LeaseState
    handle: Handle
    group: str | None
    receives: int
    charges: int
    received_at: float
    deadline: float
    sent_at: float
    started_at: float
    extended: bool
    lost: bool
    company: bool = False


def extended_until(lease: Lease, longest: float | None) -> float:
    """Return the time past which a lease cannot be extended (``lease_now``), by its broker's ``longest_hold``."""
    return _before_the_end(lease, longest, *_UNEXTENDED)


def killed_at(lease: Lease, longest: float | None) -> float:
    """Return when a call that still has the message is killed for that (``lease_now``); infinite without a limit."""
    return _before_the_end(lease, longest, *_KILLED)


def _before_the_end(lease: Lease, longest: float | None, seconds: float, share: float) -> float:
    return math.inf if longest is None else lease.received_at + longest - min(seconds, longest * share)


#: Leases one worker can hold at once: prefetched, running, and done but not yet deleted.
LEASES = 512
_RECEIPT = (
    1024  # Amazon SQS Developer Guide, queue and message identifiers: a receipt handle has up to 1,024 characters
)
_ID = 128
_GROUP = 128  # Amazon SQS API Reference, SendMessage: MessageGroupId has up to 128 characters
_FIXED = struct.Struct("<IHHHHIIddd")  # generation, queue, lengths of receipt, id, group, receives, charges, 3 times
_TEXT_AT = 64
_CRC_AT = _TEXT_AT + _RECEIPT + _ID + _GROUP
_ENTRY = _CRC_AT + 64
_CRC = struct.Struct("<I")
_STATE = _CRC_AT + 8  # worker: a byte
_COMPANY = _CRC_AT + 9  # worker: a byte, 1 where one call has several messages (a batch)
_STARTED = _CRC_AT + 16  # worker: monotonic s, when the function began; infinite while it is kept waiting
_KEPT_GENERATION = _CRC_AT + 24  # keeper: which generation the two below speak of
_KEPT_UNTIL = _CRC_AT + 32  # keeper: until when (lease_now) the lease was extended
_KEPT_LOST = _CRC_AT + 40  # keeper: a byte
_U32 = struct.Struct("<I")
_F64 = struct.Struct("d")  # native: packed in one store, for whoever reads it meanwhile

_HEADER = 128
_STACK_AT = _HEADER + LEASES * _ENTRY
#: Bytes of a dead worker's stack dump that are kept.
STACK_BYTES = 16_384
REGION_BYTES = _STACK_AT + STACK_BYTES
_BODY_HEADER = 16
_SEAT = -(-(_BODY_HEADER + MAX_BYTES + PACKED_OVERHEAD) // 64) * 64  # header, body, attributes

# Header words.
_ASSIGNED = 0  # supervisor: number of the worker this region belongs to (counting up)
_DIED = 1  # supervisor: = assigned once that worker is dead for certain
_JUDGED = 2  # keeper: = assigned once it has judged all leases
_SLOT = 3  # supervisor
_CAUSE = 4  # supervisor: one of Cause
_EXITCODE = 5  # supervisor: exit code + 256 (a signal is negative)
_WORKER_PID = 6  # supervisor
_BLAMED = 7  # supervisor: the call it is about to kill its worker for: generation, Cause and entry index + 1
_STACK_SIZE = 8  # supervisor: bytes of the stack dump


class Cause(IntEnum):
    """Why a worker is dead."""

    CLEAN = 0  # it ended as asked
    CRASH = 1  # signal, os._exit, kernel
    TIMEOUT = 2  # killed: a call outlived its task's timeout
    MEMORY = 3  # killed: over its memory limit
    CUT = 4  # killed: shutdown grace was over; nobody's fault
    FULL = 5  # killed: the container was nearly full of what this worker has gained
    ROOM = 6  # killed to make room in the container; no more its fault than others'
    HOLD = 7  # killed: a call had its message for nearly as long as the queue service lets one be in flight


#: A call that is blamed for one of these does not count, whatever it gives.
_LATE = frozenset({Cause.TIMEOUT, Cause.HOLD})


@dataclass(frozen=True, slots=True)
class Blame:
    """A call that a worker is killed for: which entry, which of its generations, and why."""

    index: int
    generation: int
    cause: Cause

    def means(self, lease: Lease) -> bool:
        """Tell whether the call is this lease's, and not an earlier one's in the same entry."""
        return (self.index, self.generation) == (lease.index, lease.generation)


def body_bytes(calls: int) -> int:
    """Return the bytes that the bodies of so many running messages need, attributes included."""
    return calls * _SEAT


def id_digest(message_id: str) -> bytes:
    """Return the 16 bytes a message is known by in the charge tables."""
    return hashlib.blake2b(message_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class LeaseTable:
    """One region: a view of the board."""

    def __init__(self, view: memoryview, index: int) -> None:
        self.index = index
        self._view = view
        self._words = view[:_HEADER].cast("Q")

    def release(self) -> None:
        """Look at the board no more."""
        self._words.release()
        self._view.release()

    # -- supervisor ---------------------------------------------------------------------------------------------

    @property
    def free(self) -> bool:
        return self._words[_ASSIGNED] == self._words[_JUDGED]

    def assign(self, slot: int) -> None:
        """Give the region to a new worker of ``slot``; it must be free."""
        for index in range(LEASES):
            self._view[_HEADER + index * _ENTRY + _STATE] = LeaseState.FREE
        self._words[_SLOT] = slot
        self._words[_BLAMED] = 0
        self._words[_ASSIGNED] += 1

    def blame(self, lease: Lease, cause: Cause) -> None:
        """Say which call its worker is about to be killed for, and why; before anything is done about it."""
        self._words[_BLAMED] = lease.generation << 32 | cause << 16 | (lease.index + 1)

    def runs(self, lease: Lease) -> bool:
        """Tell whether a call of a moment ago runs still."""
        base = _HEADER + lease.index * _ENTRY
        same = _U32.unpack_from(self._view, base)[0] == lease.generation
        return bool(same and self._view[base + _STATE] == LeaseState.RUNNING)

    def mark_dead(self, cause: Cause, exitcode: int, pid: int, stack: bytes = b"") -> None:
        """Say that its worker is dead, for certain (reaped); ``stack``: what it was doing."""
        kept = stack[:STACK_BYTES]
        self._view[_STACK_AT : _STACK_AT + len(kept)] = kept
        self._words[_STACK_SIZE] = len(kept)
        self._words[_CAUSE] = cause
        self._words[_EXITCODE] = exitcode + 256
        self._words[_WORKER_PID] = pid
        self._words[_DIED] = self._words[_ASSIGNED]

    # -- keeper -------------------------------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        return not self.free and self._words[_DIED] != self._words[_ASSIGNED]

    @property
    def to_judge(self) -> bool:
        return not self.free and self._words[_DIED] == self._words[_ASSIGNED]

    @property
    def slot(self) -> int:
        return self._words[_SLOT]

    @property
    def death(self) -> tuple[Cause, int, int]:
        """(cause, exit code, pid) of the dead worker."""
        words = self._words
        return Cause(words[_CAUSE]), words[_EXITCODE] - 256, words[_WORKER_PID]

    @property
    def blamed(self) -> Blame | None:
        """The call that its worker was, or is about to be, killed for; None where no single call is to blame.

        A call that came back by itself is blamed no longer once its lease is over.
        """
        word = self._words[_BLAMED]
        if not word:
            return None
        blame = Blame((word & 0xFFFF) - 1, word >> 32, Cause(word >> 16 & 0xFFFF))
        base = _HEADER + blame.index * _ENTRY
        held = self._view[base + _STATE] != LeaseState.FREE
        return blame if held and _U32.unpack_from(self._view, base)[0] == blame.generation else None

    @property
    def stack(self) -> str:
        """The dead worker's stack dump, if there is one."""
        size = min(self._words[_STACK_SIZE], STACK_BYTES)
        return bytes(self._view[_STACK_AT : _STACK_AT + size]).decode("utf-8", "replace")

    def mark_judged(self) -> None:
        self._words[_JUDGED] = self._words[_ASSIGNED]

    def keep(self, lease: Lease, until: float) -> None:
        """Note that a lease was extended to ``until`` (``lease_now``)."""
        base = _HEADER + lease.index * _ENTRY
        _F64.pack_into(self._view, base + _KEPT_UNTIL, until)
        self._view[base + _KEPT_LOST] = 0
        _U32.pack_into(self._view, base + _KEPT_GENERATION, lease.generation)

    def lose(self, lease: Lease) -> None:
        """Note that a lease's receipt is no longer valid."""
        base = _HEADER + lease.index * _ENTRY
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
        counts: tuple[int, int],
        times: tuple[float, float, float],
    ) -> None:
        """Write entry ``index`` as HELD. ``counts``: receives, charges; ``times``: received, deadline, sent."""
        receipt, ident = handle.receipt.encode(), handle.message_id.encode()
        tag = (group or "").encode()
        if len(receipt) > _RECEIPT or len(ident) > _ID or len(tag) > _GROUP:
            raise ValueError(f"a receipt handle, id or group of {len(receipt)}, {len(ident)}, {len(tag)} bytes")
        base = _HEADER + index * _ENTRY
        view = self._view
        generation = (_U32.unpack_from(view, base)[0] + 1) & 0xFFFFFFFF
        lengths = len(receipt), len(ident), len(tag)
        _FIXED.pack_into(view, base, generation, queue, *lengths, *counts, *times)
        text = receipt + ident + tag
        start = base + _TEXT_AT
        view[start : start + len(text)] = text
        crc = zlib.crc32(text, zlib.crc32(view[base : base + _FIXED.size]))
        _CRC.pack_into(view, base + _CRC_AT, crc)
        view[base + _STATE] = LeaseState.HELD

    def state(self, index: int) -> LeaseState:
        return LeaseState(self._view[_HEADER + index * _ENTRY + _STATE])

    def set_state(self, index: int, state: LeaseState) -> None:
        self._view[_HEADER + index * _ENTRY + _STATE] = state

    def finish(self, index: int) -> Cause | None:
        """Mark entry ``index`` as done; return why its call does not count, None where it does.

        In this order: the supervisor marks a call as late, then looks whether it runs, and leaves a done one to its
        worker.
        """
        self._view[_HEADER + index * _ENTRY + _STATE] = LeaseState.DONE
        return self.late_for(index) if self._words[_BLAMED] else None

    def start(self, index: int, now: float, call: int, body: str, attributes: Sequence[Attribute] = ()) -> None:
        """Mark entry ``index`` as running in call seat ``call``, with a copy of its body for the keeper.

        ``attributes``: those that the body goes with. What does not fit with them is not copied.
        """
        raw = body.encode("utf-8", "surrogatepass")
        size, rest = len(raw), 0
        if attributes:
            extra = packed(attributes)
            rest = len(extra)
            raw += extra
        at = REGION_BYTES + call * _SEAT
        base = _HEADER + index * _ENTRY
        if _BODY_HEADER + size + rest > _SEAT:
            size = rest = 0
        struct.pack_into("<IIII", self._view, at, index, _U32.unpack_from(self._view, base)[0], size, rest)
        self._view[at + _BODY_HEADER : at + _BODY_HEADER + size + rest] = raw[: size + rest]
        _F64.pack_into(self._view, base + _STARTED, now)
        self._view[base + _COMPANY] = 0
        self._view[base + _STATE] = LeaseState.RUNNING

    def start_together(self, index: int, now: float) -> None:
        """Mark entry ``index`` as running in one call with others; no body is kept, for none of them can be blamed."""
        base = _HEADER + index * _ENTRY
        _F64.pack_into(self._view, base + _STARTED, now)
        self._view[base + _COMPANY] = 1
        self._view[base + _STATE] = LeaseState.RUNNING

    def pause(self, index: int) -> float:
        """Stop the clock of a running call, which goes on running; return when it began (monotonic s)."""
        at = _HEADER + index * _ENTRY + _STARTED
        started: float = _F64.unpack_from(self._view, at)[0]
        _F64.pack_into(self._view, at, math.inf)
        return started

    def resume(self, index: int, started: float) -> None:
        """Have the clock of a paused call go on as if it had begun at ``started``."""
        _F64.pack_into(self._view, _HEADER + index * _ENTRY + _STARTED, started)

    def late_for(self, index: int) -> Cause | None:
        """Return why the supervisor has marked the call of entry ``index`` as late; None: it has not."""
        word = self._words[_BLAMED]
        if not word or (word & 0xFFFF) != index + 1:
            return None
        cause = Cause(word >> 16 & 0xFFFF)
        same = _U32.unpack_from(self._view, _HEADER + index * _ENTRY)[0] == word >> 32
        return cause if same and cause in _LATE else None

    def lost(self, index: int) -> bool:
        """Tell whether the keeper found the lease at ``index`` lost."""
        base = _HEADER + index * _ENTRY
        same = _U32.unpack_from(self._view, base + _KEPT_GENERATION) == _U32.unpack_from(self._view, base)
        return bool(same and self._view[base + _KEPT_LOST])

    def deadline(self, index: int) -> float:
        """Return until when (``lease_now``) the lease at ``index`` is known to hold."""
        lease = self.read(index)
        return lease.deadline if lease else 0.0

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, index: int, queues: tuple[str, ...] = ()) -> Lease | None:
        """Return a consistent copy of entry ``index``; None if it is free or was changing."""
        base = _HEADER + index * _ENTRY
        state = self._view[base + _STATE]
        if state == LeaseState.FREE:
            return None
        raw = bytes(self._view[base : base + _ENTRY])
        generation, queue, *lengths, receives, charges, received_at, deadline, sent_at = _FIXED.unpack_from(raw)
        a, b, c = lengths
        text = raw[_TEXT_AT : _TEXT_AT + a + b + c]
        if _CRC.unpack_from(raw, _CRC_AT)[0] != zlib.crc32(text, zlib.crc32(raw[: _FIXED.size])):
            return None
        # Both copies: an entry may have been freed, written anew and brought to the same state in between.
        if raw[_STATE] != state or self._view[base + _STATE] != state:
            return None
        if _U32.unpack_from(self._view, base)[0] != generation:
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
        """Yield all entries in use; those changing this very moment are left out."""
        states = bytes(self._view[_HEADER + _STATE : _HEADER + LEASES * _ENTRY : _ENTRY])
        for index, state in enumerate(states):
            if state and (lease := self.read(index, queues)) is not None:
                yield lease

    def body(self, lease: Lease, calls: int) -> str | None:
        """Return the body of a running message; None if it is not there."""
        found = self._copy(lease, calls)
        return None if found is None else found[0].decode("utf-8", "surrogatepass")

    def attributes(self, lease: Lease, calls: int) -> tuple[Attribute, ...]:
        """Return the attributes that the body of a running message goes with."""
        found = self._copy(lease, calls)
        return () if found is None else unpacked(found[1])

    def _copy(self, lease: Lease, calls: int) -> tuple[bytes, bytes] | None:
        for call in range(calls):
            at = REGION_BYTES + call * _SEAT
            index, generation, size, rest = struct.unpack_from("<IIII", self._view, at)
            if index == lease.index and generation == lease.generation and size:
                raw = bytes(self._view[at + _BODY_HEADER : at + _BODY_HEADER + size + rest])
                return raw[:size], raw[size:]
        return None
