"""The scoreboard: shared memory with slots, counters, source positions and lease regions (any process).

No process waits for a lock: every field has one writer, named beside it, and is one aligned word. The board outlives
any worker, so a replacement goes on with its predecessor's counters and source position, and the keeper finds a dead
worker's leases. The board is an anonymous file, which leaves no name behind, and each process maps it; children of
forkserver and spawn get its descriptor.

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
from typing import Any, NewType

from sqspipes_mp.ipc.histogram import BUCKETS, bucket
from sqspipes_mp.ipc.leases import REGION_BYTES, LeaseTable, body_bytes

_WORD = 8
_HEADER_WORDS = 8
_WALLET_WORDS = 1024
_STAGE_WORDS = 8
_SLOT_WORDS = 32 + BUCKETS
_CHARGE = struct.Struct("<16sQ")
#: Messages whose failed attempts one writer remembers; others take their place (then the receive count is the cap).
_CHARGES = 512
_CHARGE_BYTES = _CHARGES * _CHARGE.size
#: A bit of a charge entry's count: the message ran beside others when their worker died, so it runs alone.
_ALONE = 1 << 63
#: Nanoseconds of a turn for each byte that is locked.
_TURN = 1_000
#: Bits of a locked byte's offset that are the time; the stage is above them.
_STAGE_BITS = 52

#: A word of one slot, of one stage, or of the board. Types of their own, so that a type checker refuses one for
#: another; plain ints at run time (an IntEnum's attribute costs 100 ns a message on Python 3.11).
SlotField = NewType("SlotField", int)
StageField = NewType("StageField", int)
HeaderField = NewType("HeaderField", int)

# Slot fields; beside each the one thread that writes it.
#: Worker: one of S_BOOTING, S_READY, S_DRAINING; 0: the slot has had no worker yet.
STATE = SlotField(0)
#: Worker.
PID = SlotField(1)
#: Supervisor: index of the lease region.
REGION = SlotField(2)
#: Supervisor: workers that the slot has had, the present one included.
INCARNATION = SlotField(3)
#: Worker (outbox): messages, or a source's calls, completed.
DONE = SlotField(4)
#: Worker (outbox): calls of the function that raised.
FAILED = SlotField(5)
#: Worker (outbox): messages made visible again after a failure.
RETRIED = SlotField(6)
#: Worker (outbox): messages dead-lettered.
DEAD = SlotField(7)
#: Worker (its threads): outputs dropped (None, EmptyTaskOutput), and messages for which decode gave None.
OUTPUTS_DROPPED = SlotField(8)
#: Worker (main): nanoseconds in the user's function.
BUSY_NS = SlotField(9)
#: Worker (outbox): a source's calls, or a generator's yields, accepted downstream without a gap.
ACCEPTED = SlotField(10)
#: Worker (outbox): 1 once a generator has ended and all its outputs were accepted.
FINISHED = SlotField(11)
#: Worker (intake): messages received.
RECEIVED = SlotField(12)
#: Worker (outbox): outputs accepted downstream.
SENT = SlotField(13)
#: Worker (main): when the running call began, monotonic nanoseconds; 0: no call runs.
CALL_STARTED = SlotField(14)
#: Worker (its threads, where it has several): calls running while CALL_STARTED is not 0.
RUNNING = SlotField(15)
#: Worker (main): its own bytes when the running call began, where WATCHES_MEMORY; 0: not known.
CALL_MEMORY = SlotField(16)
#: Worker (outbox): a bit for each of a source's calls beyond ACCEPTED, WINDOW_WORDS words (send/accepted_calls.py).
ACCEPTED_WINDOW = SlotField(17)
WINDOW_WORDS = 15
#: Worker (main): calls by their run time, BUCKETS words (histogram.py).
RUN_TIMES = SlotField(32)

S_BOOTING, S_READY, S_DRAINING = range(1, 4)

# Header fields.
#: Supervisor: two words.
_RUN_ID = HeaderField(0)
#: Keeper: when it last moved, monotonic nanoseconds.
KEEPER_BEAT = HeaderField(2)
#: Keeper: leases extended.
KEEPER_EXTENDED = HeaderField(3)
#: Keeper: leases found lost.
KEEPER_LOST = HeaderField(4)
#: Supervisor: 1 where it may kill a worker for its memory; written before the first worker starts.
WATCHES_MEMORY = HeaderField(5)
#: Supervisor: when the whole engine last went on after it had been stopped (Ctrl-Z), monotonic nanoseconds.
_CONTINUED_AT = HeaderField(6)
#: Supervisor: nanoseconds that calls begun before _CONTINUED_AT have beyond their timeout.
_STOOD_STILL = HeaderField(7)

# Stage fields.
#: Any worker: when the next turn may be free, monotonic nanoseconds; a hint.
NEXT_CALL = StageField(0)
#: Keeper: messages of dead workers released.
KEEPER_RELEASED = StageField(1)
#: Keeper: messages of dead workers charged with an attempt.
KEEPER_CHARGED = StageField(2)
#: Keeper: messages of dead workers dead-lettered.
KEEPER_DEAD = StageField(3)
#: Keeper: messages in the stage's input queues that nobody has received, plus 1; 0: not counted.
WAITING = StageField(4)
#: Any worker: 1 once the warning was logged that all messages come in one FIFO group.
ONE_GROUP_TOLD = StageField(5)
#: Any worker: 1 once the warning was logged that decode gave None.
NOTHING_TOLD = StageField(6)


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
        """Map a fresh, zeroed board. ``calls``: those that run at once in one worker."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("sqspipes_mp")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        board = cls(fd, stages, slots, calls)
        board._view[_RUN_ID * _WORD : (_RUN_ID + 2) * _WORD] = os.urandom(16)
        return board

    def __reduce__(self) -> tuple[Any, ...]:
        # Only multiprocessing pickles a board, to start a child by forkserver or spawn; the descriptor goes along.
        return _attach, (reduction.DupFd(self._fd), *self._shape)

    def fileno(self) -> int:
        """Return the descriptor behind the mapping."""
        return self._fd

    def close(self) -> None:
        """Close descriptor, mapping and regions, once: an error's frames may hold the board for long."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        os.close(fd)
        for region in self._looked_at.values():
            region.release()
        self._words.release()
        self._view.release()
        # Only the wallet, which children use, could still have a view of the mapping.
        with contextlib.suppress(BufferError):
            self._map.close()

    # -- header -------------------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """The id of this run, 32 hex digits."""
        return bytes(self._view[_RUN_ID * _WORD : (_RUN_ID + 2) * _WORD]).hex()

    def header(self, field: HeaderField) -> int:
        """Return a word of the board."""
        return self._words[field]

    def set_header(self, field: HeaderField, value: int) -> None:
        """Write a word of the board."""
        self._words[field] = value

    def stood_still(self, now: int, nanoseconds: int) -> None:
        """Note that the whole engine was stopped for ``nanoseconds`` until ``now`` (monotonic ns).

        No timeout of a running call counts that time.
        """
        last = self.header(_CONTINUED_AT)
        if any(0 < self.get(slot, CALL_STARTED) < last for slot in range(self.slots)):
            # A call that runs since before the last stop is credited with both.
            nanoseconds += self.header(_STOOD_STILL)
        self.set_header(_STOOD_STILL, nanoseconds)
        self.set_header(_CONTINUED_AT, now)

    def credit(self, started: int) -> int:
        """Return the ns that a call begun at ``started`` (monotonic ns) has beyond its timeout."""
        return self.header(_STOOD_STILL) if started < self.header(_CONTINUED_AT) else 0

    @property
    def wallet(self) -> SharedText:
        """The text that the keeper shares with the workers: temporary credentials."""
        start = _HEADER_WORDS * _WORD
        return SharedText(self._view[start : start + _WALLET_WORDS * _WORD])

    # -- stages -------------------------------------------------------------------------------------------------

    def stage(self, stage: int, field: StageField) -> int:
        """Return a word of a stage."""
        return self._words[self._stage_at + stage * _STAGE_WORDS + field]

    def set_stage(self, stage: int, field: StageField, value: int) -> None:
        """Write a word of a stage."""
        self._words[self._stage_at + stage * _STAGE_WORDS + field] = value

    def add_stage(self, stage: int, field: StageField, amount: int) -> None:
        """Add to a counter of a stage; only the keeper may."""
        self._words[self._stage_at + stage * _STAGE_WORDS + field] += amount

    def reserve_call(self, stage: int, now: int, gap: Callable[[], int]) -> int:
        """Take the stage's next turn and return when it begins; all times are monotonic nanoseconds.

        A turn is a kernel record lock on its time, one byte for each microsecond. Two turns cannot overlap. A turn is
        taken in one call that waits for nobody, and it ends with its holder. ``NEXT_CALL`` is only the first guess.

        Args:
            stage: the stage's index.
            now: the earliest begin.
            gap: returns the length of a turn, nanoseconds.
        """
        word = self._stage_at + stage * _STAGE_WORDS + NEXT_CALL
        length = -(-gap() // _TURN)
        if length <= 0:
            return max(now, self._words[word])
        first = (stage + 1) << _STAGE_BITS
        with self._turning:
            # A process's own record locks do not keep its other threads out.
            at = -(-max(now, self._words[word], self._taken_until.get(stage, 0)) // _TURN)
            while True:
                locked = self._try_lock(first + at, length)
                behind = -(-self._words[word] // _TURN)
                if locked and behind <= at:
                    break
                if locked:
                    # Other workers took turns while this thread stood still; the locks of past turns are dropped, so
                    # this one may overlap theirs.
                    fcntl.lockf(self._fd, fcntl.LOCK_UN, length, first + at)
                at = max(behind, at if locked else at + length)
            until = self._taken_until[stage] = (at + length) * _TURN
            self._words[word] = max(self._words[word], until)
            if (past := now // _TURN) > 0:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, past, first)
        return at * _TURN

    def leave(self, slot: int, others: Sequence[int]) -> bool:
        """Let a worker go for a planned restart, and note that; False while one of ``others`` of its stage is away.

        False as well while another worker is asking: a wait for that one would be a wait for its GIL.
        """
        word = (self._slot_at + min(slot, *others) * _SLOT_WORDS + STATE) * _WORD
        if not self._try_lock(word, _WORD):
            return False
        try:
            there = all(self.get(other, STATE) == S_READY for other in others)
            if there:
                self.put(slot, STATE, S_DRAINING)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, _WORD, word)
        return there

    def _try_lock(self, start: int, length: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except (BlockingIOError, PermissionError):
            return False
        return True

    # -- slots --------------------------------------------------------------------------------------------------

    def get(self, slot: int, field: SlotField) -> int:
        """Return a word of a slot."""
        return self._words[self._slot_at + slot * _SLOT_WORDS + field]

    def put(self, slot: int, field: SlotField, value: int) -> None:
        """Write a word of a slot."""
        self._words[self._slot_at + slot * _SLOT_WORDS + field] = value

    def add(self, slot: int, field: SlotField, amount: int) -> None:
        """Add to a counter of a slot; only its one writing thread may."""
        self._words[self._slot_at + slot * _SLOT_WORDS + field] += amount

    def took(self, slot: int, nanoseconds: int) -> None:
        """Count a call by its run time."""
        self._words[self._slot_at + slot * _SLOT_WORDS + RUN_TIMES + bucket(nanoseconds)] += 1

    def run_times(self, slots: Sequence[int]) -> list[int]:
        """Return the number of calls of these slots in each bucket of the histogram."""
        starts = [self._slot_at + slot * _SLOT_WORDS + RUN_TIMES for slot in slots]
        return [sum(self._words[start + index] for start in starts) for index in range(BUCKETS)]

    # -- attempts -----------------------------------------------------------------------------------------------

    def charges(self, digest: bytes) -> int:
        """Return the most failed attempts that a writer has noted of a message; ``digest``: ``leases.id_digest``."""
        return max(self._charge_entry(writer, digest)[1] & ~_ALONE for writer in range(self.slots + 1))

    def charge(self, writer: int, digest: bytes, attempts: int) -> None:
        """Note that a message has failed ``attempts`` times so far; a charge that two processes note counts once.

        ``writer``: the worker's slot; the keeper's is ``slots``.
        """
        offset, count = self._charge_entry(writer, digest)
        _CHARGE.pack_into(self._map, offset, digest, max(attempts, count & ~_ALONE) | count & _ALONE)

    def isolate(self, writer: int, digest: bytes) -> None:
        """Have a message run alone from now on, so that the next death is charged to the right message."""
        offset, count = self._charge_entry(writer, digest)
        _CHARGE.pack_into(self._map, offset, digest, count | _ALONE)

    def isolated(self, digest: bytes) -> bool:
        """Tell whether a message has to run alone."""
        return any(self._charge_entry(writer, digest)[1] & _ALONE for writer in range(self.slots + 1))

    def forget_charges(self, writer: int, digest: bytes) -> None:
        """Drop ``writer``'s charges of a message that is done."""
        offset, count = self._charge_entry(writer, digest)
        if count:
            _CHARGE.pack_into(self._map, offset, digest, 0)

    def _charge_entry(self, writer: int, digest: bytes) -> tuple[int, int]:
        """Return the offset and count of the entry for ``digest``; without one, of the entry to write, and 0."""
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
        """Return a region without a worker (supervisor); None while the keeper still has to judge every dead one's."""
        for index in range(self.regions):
            region = self.region(index)
            if region.free:
                return region
        return None


class SharedText:
    """A text with one writer; a reader that meets a half-written one reads again."""

    _HEAD = struct.Struct("<II")

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def read(self) -> str | None:
        """Return the text; None while none is written."""
        for _ in range(100):
            size, crc = self._HEAD.unpack_from(self._view)
            raw = bytes(self._view[self._HEAD.size : self._HEAD.size + size])
            if zlib.crc32(raw) == crc:
                return raw.decode() if raw else None
        return None

    def write(self, text: str) -> None:
        """Replace the text; a text that does not fit is dropped."""
        raw = text.encode()
        if len(raw) <= len(self._view) - self._HEAD.size:
            self._view[self._HEAD.size : self._HEAD.size + len(raw)] = raw
            self._HEAD.pack_into(self._view, 0, len(raw), zlib.crc32(raw))


def _attach(handle: Any, stages: int, slots: int, calls: int) -> Scoreboard:
    return Scoreboard(handle.detach(), stages, slots, calls)
