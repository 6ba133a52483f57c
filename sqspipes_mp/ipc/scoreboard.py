"""Shared memory all processes of one engine see: slots, counters, source positions, lease regions (any process).

No locks that anybody waits for: every field has one writer, named beside it, and is one aligned word. It outlives any
worker, so a replacement goes on with its predecessor's counters and source position, and the keeper finds a dead
worker's leases. It is an anonymous file (no name to leak) mapped by all; forkserver and spawn children get its
descriptor.

::

    header | wallet | stages | slots | charge tables (one per slot, one for the keeper) | regions (leases.py)
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence
from multiprocessing import reduction
from typing import Any

from sqspipes_mp.ipc.histogram import BUCKETS, bucket
from sqspipes_mp.ipc.leases import REGION_BYTES, LeaseTable, body_bytes

_WORD = 8
_HEADER_WORDS = 8
_WALLET_WORDS = 1024
_STAGE_WORDS = 8
_SLOT_WORDS = 32 + BUCKETS
_CHARGE = struct.Struct("<16sQ")
#: Failed attempts one writer remembers at once; the oldest give way (then the receive count is the cap).
_CHARGES = 512
_CHARGE_BYTES = _CHARGES * _CHARGE.size
#: In a charge entry, beside the count: its message ran beside others when their worker died, so it runs alone.
_ALONE = 1 << 63
#: Turns of calls: nanoseconds for each byte locked, and bits for the time, above which is the stage.
_TURN = 1_000
_STAGE_BITS = 52

# Slot fields and who writes them.
STATE = 0  # worker: one of the S_* below
PID = 1  # worker
REGION = 2  # supervisor: where its leases are
INCARNATION = 3  # supervisor: how many workers sat here, the present one included
DONE = 4  # worker (outbox): messages, or a source's calls, completed
FAILED = 5  # worker (outbox): calls of the function that raised
RETRIED = 6  # worker (outbox): messages made visible again after a failure
DEAD = 7  # worker (outbox): messages dead-lettered
DROPPED = 8  # worker (its threads): outputs dropped (None, EmptyTaskOutput), and messages that decode made None of
BUSY_NS = 9  # worker (main): time in the user's function
ACCEPTED = 10  # worker (outbox): a source's calls (or a generator's yields) accepted downstream, in a row
FINISHED = 11  # worker (outbox): 1 once a generator source has ended and all of it was accepted
RECEIVED = 12  # worker (intake): messages received
SENT = 13  # worker (outbox): outputs accepted downstream
CALL_STARTED = 14  # worker (main): monotonic ns at which the running call began; 0 between calls
RUNNING = 15  # worker (its threads, where it has several): calls running, while CALL_STARTED says that one is
CALL_MEMORY = 16  # worker (main): bytes of its own when the running call began, where WATCHES_MEMORY; 0: not known
ACCEPTED_WINDOW = 17  # worker (outbox): a bit for each of a source's calls beyond ACCEPTED, WINDOW_WORDS words
WINDOW_WORDS = 15
RUN_TIMES = 32  # worker (main): calls by how long they took, BUCKETS words (histogram.py)

S_EMPTY, S_BOOTING, S_READY, S_DRAINING = range(4)

# Header fields.
_RUN_ID = 0  # two words, supervisor
KEEPER_BEAT = 2  # keeper: monotonic ns of its last turn
KEEPER_EXTENDED = 3  # keeper: leases extended
KEEPER_LOST = 4  # keeper: leases found lost
_CONTINUED_AT = 6  # supervisor: monotonic ns when the whole engine went on after it had stood still (Ctrl-Z)
_STOOD_STILL = 7  # supervisor: ns that calls begun before that have more
WATCHES_MEMORY = 5  # supervisor: 1 where it may kill a worker for its memory, before any worker begins

# Stage fields.
NEXT_CALL = 0  # any worker: monotonic ns at which the next turn may be free; a hint
KEEPER_RELEASED = 1  # keeper: messages of dead workers given back
KEEPER_CHARGED = 2  # keeper: of these, charged with an attempt
KEEPER_DEAD = 3  # keeper: of these, dead-lettered
WAITING = 4  # keeper: messages in its input queues that nobody has received, plus 1; 0: not counted
ONE_GROUP_TOLD = 5  # any worker: 1 once it is said that everything comes in one FIFO group
NOTHING_TOLD = 6  # any worker: 1 once it is said that decode gave None


class Scoreboard:
    """The mapping and its fields."""

    def __init__(self, fd: int, stages: int, slots: int, calls: int) -> None:
        self._fd = fd
        self._shape = (stages, slots, calls)
        self.stages = stages
        self.slots = slots
        self.regions = 2 * slots + 2
        self._region_bytes = REGION_BYTES + body_bytes(calls)
        self._calls = calls
        self._stage_at = _HEADER_WORDS + _WALLET_WORDS
        self._slot_at = self._stage_at + stages * _STAGE_WORDS
        self._charges_at = (self._slot_at + slots * _SLOT_WORDS) * _WORD
        start = self._charges_at + (slots + 1) * _CHARGE_BYTES
        self._regions_at = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        self.size = self._regions_at + self.regions * self._region_bytes
        if os.fstat(fd).st_size < self.size:
            os.ftruncate(fd, self.size)
        self._map = mmap.mmap(fd, self.size)
        self._view = memoryview(self._map)
        self._words = self._view[: self._charges_at].cast("Q")
        self._looked_at: dict[int, LeaseTable] = {}
        self._turning = threading.Lock()
        #: Until when this process has turns, by stage (monotonic ns).
        self._taken_until: dict[int, int] = {}

    @classmethod
    def create(cls, stages: int, slots: int, calls: int = 1) -> Scoreboard:
        """Map a fresh, zeroed board for so many stages, slots and calls running at once in one worker."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("sqspipes_mp")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        board = cls(fd, stages, slots, calls)
        board._view[_RUN_ID * _WORD : (_RUN_ID + 2) * _WORD] = os.urandom(16)
        return board

    def __reduce__(self) -> tuple[Any, ...]:
        # Only while multiprocessing starts a child (forkserver, spawn): the descriptor travels with it.
        return _attach, (reduction.DupFd(self._fd), *self._shape)

    def fileno(self) -> int:
        """Return the descriptor behind the mapping."""
        return self._fd

    def close(self) -> None:
        """Close descriptor and mapping, once, and every region with them: an error may hold them for long."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        os.close(fd)
        for region in self._looked_at.values():
            region.release()
        self._words.release()
        self._view.release()
        # Nothing but the wallet, which is the children's, could still look at it.
        with contextlib.suppress(BufferError):
            self._map.close()

    # -- header -------------------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """The id of this run, 32 hex digits."""
        return bytes(self._view[_RUN_ID * _WORD : (_RUN_ID + 2) * _WORD]).hex()

    def header(self, field: int) -> int:
        return self._words[field]

    def set_header(self, field: int, value: int) -> None:
        self._words[field] = value

    def stood_still(self, now: int, nanoseconds: int) -> None:
        """Note that the whole engine was stopped for so long, until now (monotonic ns): it is no time of its calls'."""
        last = self.header(_CONTINUED_AT)
        if any(0 < self.get(slot, CALL_STARTED) < last for slot in range(self.slots)):
            # A call that was stopped before has both.
            nanoseconds += self.header(_STOOD_STILL)
        self.set_header(_STOOD_STILL, nanoseconds)
        self.set_header(_CONTINUED_AT, now)

    def credit(self, started: int) -> int:
        """Return the ns that a call begun at ``started`` (monotonic ns) has beyond its timeout."""
        return self.header(_STOOD_STILL) if started < self.header(_CONTINUED_AT) else 0

    @property
    def wallet(self) -> SharedText:
        """A text the keeper shares with the workers."""
        start = _HEADER_WORDS * _WORD
        return SharedText(self._view[start : start + _WALLET_WORDS * _WORD])

    # -- stages -------------------------------------------------------------------------------------------------

    def stage(self, stage: int, field: int) -> int:
        return self._words[self._stage_at + stage * _STAGE_WORDS + field]

    def set_stage(self, stage: int, field: int, value: int) -> None:
        self._words[self._stage_at + stage * _STAGE_WORDS + field] = value

    def add_stage(self, stage: int, field: int, amount: int) -> None:
        self._words[self._stage_at + stage * _STAGE_WORDS + field] += amount

    def reserve_call(self, stage: int, now: int, gap: Callable[[], int]) -> int:
        """Take the stage's next turn and return when it is; all times are monotonic ns.

        A turn is a kernel record lock on its time (a byte for each us): two of them cannot overlap, it is taken in one
        call that waits for nobody, and it dies with its holder. The word only says where to look first.
        """
        word = self._stage_at + stage * _STAGE_WORDS + NEXT_CALL
        length = -(-gap() // _TURN)
        if length <= 0:
            return max(now, self._words[word])
        first = (stage + 1) << _STAGE_BITS
        with self._turning:
            # A process's own locks do not keep it out.
            at = -(-max(now, self._words[word], self._taken_until.get(stage, 0)) // _TURN)
            while True:
                locked = self._try_lock(first + at, length)
                behind = -(-self._words[word] // _TURN)
                if locked and behind <= at:
                    break
                if locked:
                    # Others took turns while this thread stood: its own may lie in the past, whose locks are gone.
                    fcntl.lockf(self._fd, fcntl.LOCK_UN, length, first + at)
                at = max(behind, at if locked else at + length)
            until = self._taken_until[stage] = (at + length) * _TURN
            self._words[word] = max(self._words[word], until)
            if (past := now // _TURN) > 0:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, past, first)
        return at * _TURN

    def leave(self, slot: int, others: Sequence[int]) -> bool:
        """Let a worker go for a planned restart, and note it, unless one of the others of its stage is away by now.

        Nor while another of them is just asking: waiting for that one would be waiting for its GIL.
        """
        place = (self._slot_at + min(slot, *others) * _SLOT_WORDS + STATE) * _WORD
        if not self._try_lock(place, _WORD):
            return False
        try:
            there = all(self.get(other, STATE) == S_READY for other in others)
            if there:
                self.put(slot, STATE, S_DRAINING)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, _WORD, place)
        return there

    def _try_lock(self, start: int, length: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except (BlockingIOError, PermissionError):
            return False
        return True

    # -- slots --------------------------------------------------------------------------------------------------

    def get(self, slot: int, field: int) -> int:
        return self._words[self._slot_at + slot * _SLOT_WORDS + field]

    def put(self, slot: int, field: int, value: int) -> None:
        self._words[self._slot_at + slot * _SLOT_WORDS + field] = value

    def add(self, slot: int, field: int, amount: int) -> None:
        """Add to a counter; only its one writing thread may."""
        self._words[self._slot_at + slot * _SLOT_WORDS + field] += amount

    def took(self, slot: int, nanoseconds: int) -> None:
        """Count a call by how long it took."""
        self._words[self._slot_at + slot * _SLOT_WORDS + RUN_TIMES + bucket(nanoseconds)] += 1

    def run_times(self, slots: Sequence[int]) -> list[int]:
        """Return how many calls of these slots fell into each bucket."""
        starts = [self._slot_at + slot * _SLOT_WORDS + RUN_TIMES for slot in slots]
        return [sum(self._words[start + place] for start in starts) for place in range(BUCKETS)]

    # -- attempts -----------------------------------------------------------------------------------------------

    def charges(self, digest: bytes) -> int:
        """Return the failed attempts of a message that any writer has noted; ``digest`` from ``leases.id_digest``."""
        return max(self._charge_entry(writer, digest)[1] & ~_ALONE for writer in range(self.slots + 1))

    def charge(self, writer: int, digest: bytes, attempts: int) -> None:
        """Note in ``writer``'s table (its slot; the keeper's is ``slots``) how many attempts of a message failed.

        ``attempts`` is the number so far, not an increment: a charge that two processes note counts once.
        """
        offset, count = self._charge_entry(writer, digest)
        _CHARGE.pack_into(self._map, offset, digest, max(attempts, count & ~_ALONE) | count & _ALONE)

    def isolate(self, writer: int, digest: bytes) -> None:
        """Have a message run alone from now on, so that the next death it is in can be told from others'."""
        offset, count = self._charge_entry(writer, digest)
        _CHARGE.pack_into(self._map, offset, digest, count | _ALONE)

    def isolated(self, digest: bytes) -> bool:
        """Tell whether a message has to run alone."""
        return any(self._charge_entry(writer, digest)[1] & _ALONE for writer in range(self.slots + 1))

    def forget_charges(self, writer: int, digest: bytes) -> None:
        """Drop what ``writer`` knows of a message that is done."""
        offset, count = self._charge_entry(writer, digest)
        if count:
            _CHARGE.pack_into(self._map, offset, digest, 0)

    def _charge_entry(self, writer: int, digest: bytes) -> tuple[int, int]:
        """Return (offset, count) of the entry for ``digest``, or of the one to use for it, with count 0."""
        base = self._charges_at + writer * _CHARGE_BYTES
        home = int.from_bytes(digest[:4], "little")
        spare = -1
        for step in range(16):
            offset = base + ((home + step) % _CHARGES) * _CHARGE.size
            known, count = _CHARGE.unpack_from(self._map, offset)
            if known == digest:
                return offset, count
            if spare < 0 and not count:
                spare = offset
        return (spare if spare >= 0 else base + (home % _CHARGES) * _CHARGE.size), 0

    # -- regions ------------------------------------------------------------------------------------------------

    def region(self, index: int) -> LeaseTable:
        """Return one lease region."""
        known = self._looked_at.get(index)
        if known is not None:
            return known
        start = self._regions_at + index * self._region_bytes
        return self._looked_at.setdefault(index, LeaseTable(self._view[start : start + self._region_bytes], index))

    def free_region(self) -> LeaseTable | None:
        """Return a region nobody uses (supervisor); None while the keeper still has to judge them all."""
        for index in range(self.regions):
            region = self.region(index)
            if region.free:
                return region
        return None


class SharedText:
    """A text with one writer; a reader that meets it half-written looks again."""

    _HEAD = struct.Struct("<II")

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def read(self) -> str | None:
        """Return the text; None while there is none."""
        for _ in range(100):
            size, crc = self._HEAD.unpack_from(self._view)
            raw = bytes(self._view[self._HEAD.size : self._HEAD.size + size])
            if zlib.crc32(raw) == crc:
                return raw.decode() if raw else None
        return None

    def write(self, text: str) -> None:
        """Replace the text; one that is too long is not kept."""
        raw = text.encode()
        if len(raw) <= len(self._view) - self._HEAD.size:
            self._view[self._HEAD.size : self._HEAD.size + len(raw)] = raw
            self._HEAD.pack_into(self._view, 0, len(raw), zlib.crc32(raw))


def _attach(handle: Any, stages: int, slots: int, calls: int) -> Scoreboard:
    return Scoreboard(handle.detach(), stages, slots, calls)
