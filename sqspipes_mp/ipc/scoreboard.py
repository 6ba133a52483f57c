"""The scoreboard: shared memory with slots, counters, source positions and lease regions (any process).

No process waits for a lock: every field has one writer, named beside it, and is one aligned word. The board outlives
any worker, so a replacement goes on with its predecessor's counters and source position, and the keeper finds a dead
worker's leases. The board is two anonymous files, which leave no name behind, and each process maps both; children of
forkserver and spawn get their descriptors. One is the statistics (``statistics.py``), which others may look at. The
other is for the engine's processes alone::

    wallet | cancelled messages | charge tables (one per slot, one for the keeper) | regions (leases.py), by stage

A stage has reserved slots and regions beyond those of its workers. Nobody looks at them before they have a worker, so
that they cost no memory and no time.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import reduction
from typing import Any, NamedTuple

from sqspipes_mp.ipc.histogram import BUCKETS, bucket
from sqspipes_mp.ipc.leases import REGION_BYTES, LeaseTable, body_bytes
from sqspipes_mp.ipc.running import fixed
from sqspipes_mp.ipc.shared_text import SharedText
from sqspipes_mp.ipc.statistics import (
    CALL,
    CALL_STARTED,
    CANCELS,
    CONTINUED_AT,
    LANE_WORDS,
    LANES,
    NEXT_CALL,
    QUEUE_WAIT_NS,
    QUEUE_WAITS,
    REGIONS,
    RUN_TIMES,
    S_DRAINING,
    S_READY,
    SEATS,
    STATE,
    STOOD_STILL,
    HeaderField,
    RunningCall,
    Shape,
    SlotField,
    StageField,
    Statistics,
    about_text,
    write_progress,
)

_WORD = 8
_WALLET_BYTES = 8192
_CHARGE = struct.Struct("<16sQ")
#: Messages whose failed attempts one writer remembers; others take their place (then the receive count is the cap).
_CHARGES = 512
_CHARGE_BYTES = _CHARGES * _CHARGE.size
#: A bit of a charge entry's count: the message ran beside others when their worker died, so it runs alone.
_ALONE = 1 << 63
#: Bytes of a digest (``leases.id_digest``), and the number of messages that were cancelled last and are remembered.
_DIGEST, _CANCELLED = 16, 256
#: Nanoseconds of a turn for each byte that is locked.
_TURN = 1_000
#: Bits of a locked byte's offset that are the time; the stage is above them.
_STAGE_BITS = 52


class Block(NamedTuple):
    """The slots of one stage on the board."""

    #: The stage's index.
    stage: int
    slots: int
    #: Calls that run at once in one worker.
    calls: int
    #: Lease regions: one for each living worker, and some whose workers are dead and not judged yet.
    regions: int


class Scoreboard:
    """The mappings and their fields."""

    def __init__(self, fd: int, looks: int, stages: int, blocks: Sequence[Block], lanes: int) -> None:
        """Map the files behind two descriptors; ``looks``: that of the statistics."""
        slots = sum(block.slots for block in blocks)
        self._fd = fd
        self._looks = looks
        self._given = (stages, tuple(blocks), lanes)
        self.shape = Shape(stages, slots, lanes)
        self.stages = stages
        self.slots = slots
        self._blocks = {block.stage: block for block in blocks}
        #: The first slot of each stage, and the number of its first region.
        self._first_slot: dict[int, int] = {}
        self._first_region: dict[int, int] = {}
        self._stage_at, self._stage_words = self.shape.stage_at, self.shape.stage_words
        self._slot_at, self._slot_words = self.shape.slot_at, self.shape.slot_words
        self._cancelled_at = _WALLET_BYTES
        self._charges_at = self._cancelled_at + _CANCELLED * _DIGEST
        start = self._charges_at + (slots + 1) * _CHARGE_BYTES
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        #: Begin and end of each region.
        self._places: list[tuple[int, int]] = []
        slot = 0
        for block in blocks:
            self._first_slot[block.stage], self._first_region[block.stage] = slot, len(self._places)
            slot += block.slots
            size = REGION_BYTES + body_bytes(block.calls)
            self._places += [(start + place * size, start + (place + 1) * size) for place in range(block.regions)]
            start += block.regions * size
        self.regions = len(self._places)
        self.size = start
        for each, size in ((fd, self.size), (looks, self.shape.size)):
            if os.fstat(each).st_size < size:
                os.ftruncate(each, size)
        self._map, self._looks_map = mmap.mmap(fd, self.size), mmap.mmap(looks, self.shape.size)
        self._view, self._looks_view = memoryview(self._map), memoryview(self._looks_map)
        self._words = self._looks_view.cast("Q")
        self._looked_at: dict[int, LeaseTable] = {}
        self._turning = threading.Lock()
        #: Until when this process has turns, by stage (monotonic ns).
        self._taken_until: dict[int, int] = {}

    @classmethod
    def create(cls, stages: int, slots: int, calls: int = 1, lanes: int = 1) -> Scoreboard:
        """Map a fresh board with all slots in stage 0, each in use; arguments as of ``create_for``, ``Block``."""
        board = cls.create_for(stages, [Block(0, slots, calls, 2 * slots + 2)], max(calls, lanes))
        board.set_stage(0, SEATS, slots)
        return board

    @classmethod
    def create_for(cls, stages: int, blocks: Sequence[Block], lanes: int) -> Scoreboard:
        """Map a fresh, zeroed board.

        Args:
            stages: of the pipeline.
            blocks: the stages that run here, in their order.
            lanes: messages that run at once in one worker.
        """
        board = cls(_anonymous("sqspipes_mp"), _anonymous("sqspipes_mp-statistics"), stages, blocks, lanes)
        board._looks_view[fixed.RUN_ID * _WORD : (fixed.RUN_ID + 2) * _WORD] = os.urandom(16)
        board.shape.write(board._words)
        _seal(board._looks)
        return board

    def __reduce__(self) -> tuple[Any, ...]:
        # Only multiprocessing pickles a board, to start a child by forkserver or spawn; the descriptors go along.
        return _attach, (reduction.DupFd(self._fd), reduction.DupFd(self._looks), *self._given)

    def fileno(self) -> int:
        """Return the descriptor behind leases, charges and wallet, which no other program gets."""
        return self._fd

    @property
    def statistics_fd(self) -> int:
        """The descriptor behind the statistics; it is writable."""
        return self._looks

    def open_statistics(self) -> int:
        """Return a new descriptor of the statistics, read-only. Raises ``OSError`` on a system without ``/proc``."""
        return os.open(f"/proc/self/fd/{self._looks}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close descriptors, mappings and regions, once: an error's frames may hold the board for long."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        os.close(fd)
        os.close(self._looks)
        for region in self._looked_at.values():
            region.release()
        for view in (self._words, self._looks_view, self._view):
            view.release()
        self._looks_map.close()
        # Only the wallet, which children use, could still have a view of the mapping.
        with contextlib.suppress(BufferError):
            self._map.close()

    # -- header -------------------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """The id of this run, 32 hex digits."""
        return bytes(self._looks_view[fixed.RUN_ID * _WORD : (fixed.RUN_ID + 2) * _WORD]).hex()

    def describe(self, text: str) -> None:
        """Write the JSON text that describes the run to readers (supervisor); one that is too long is dropped."""
        about_text(self._looks_view).write(text)

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
        last = self.header(CONTINUED_AT)
        if any(0 < self.get(slot, CALL_STARTED) < last for slot in range(self.slots)):
            # A call that runs since before the last stop is credited with both.
            nanoseconds += self.header(STOOD_STILL)
        self.set_header(STOOD_STILL, nanoseconds)
        self.set_header(CONTINUED_AT, now)

    def credit(self, started: int) -> int:
        """Return the ns that a call begun at ``started`` (monotonic ns) has beyond its timeout."""
        return self.header(STOOD_STILL) if started < self.header(CONTINUED_AT) else 0

    @property
    def wallet(self) -> SharedText:
        """The text that the keeper shares with the workers: temporary credentials."""
        return SharedText(self._view[:_WALLET_BYTES])

    # -- stages -------------------------------------------------------------------------------------------------

    def stage(self, stage: int, field: StageField) -> int:
        """Return a word of a stage."""
        return self._words[self._stage_at + stage * self._stage_words + field]

    def set_stage(self, stage: int, field: StageField, value: int) -> None:
        """Write a word of a stage."""
        self._words[self._stage_at + stage * self._stage_words + field] = value

    def add_stage(self, stage: int, field: StageField, amount: int) -> None:
        """Add to a counter of a stage; only the keeper may."""
        self._words[self._stage_at + stage * self._stage_words + field] += amount

    def reserve_call(self, stage: int, now: int, gap: Callable[[], int]) -> int:
        """Take the stage's next turn and return when it begins; all times are monotonic nanoseconds.

        A turn is a kernel record lock on its time, one byte for each microsecond. Two turns cannot overlap. A turn is
        taken in one call that waits for nobody, and it ends with its holder. ``NEXT_CALL`` is only the first guess.

        Args:
            stage: the stage's index.
            now: the earliest begin.
            gap: returns the length of a turn, nanoseconds.
        """
        word = self._stage_at + stage * self._stage_words + NEXT_CALL
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
        word = (self._slot_at + min(slot, *others) * self._slot_words + STATE) * _WORD
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

    def used(self, stage: int) -> range:
        """Return the slots of a stage that have had a worker, or were to have one."""
        first = self._first_slot[stage]
        return range(first, first + self.stage(stage, SEATS))

    def get(self, slot: int, field: SlotField) -> int:
        """Return a word of a slot."""
        return self._words[self._slot_at + slot * self._slot_words + field]

    def put(self, slot: int, field: SlotField, value: int) -> None:
        """Write a word of a slot."""
        self._words[self._slot_at + slot * self._slot_words + field] = value

    def add(self, slot: int, field: SlotField, amount: int) -> None:
        """Add to a counter of a slot; only its one writing thread may."""
        self._words[self._slot_at + slot * self._slot_words + field] += amount

    def took(self, slot: int, nanoseconds: int) -> None:
        """Count a call by its run time."""
        self._words[self._slot_at + slot * self._slot_words + RUN_TIMES + bucket(nanoseconds)] += 1

    def begins(self, slot: int, lane: int, started: int, hop: str, waited: int | None, lease: int = -1) -> None:
        """Tell readers of a message's call.

        Args:
            slot: the worker's.
            lane: the call's number among those that run at once; only the thread that runs it writes there.
            started: when the call begins, monotonic nanoseconds.
            hop: the message's.
            waited: nanoseconds that the message waited in its queue until this call, its first; negative where clocks
                differ, which counts as 0. None: not its first call, or not known.
            lease: the number of the message's lease.
        """
        words, base = self._words, self._slot_at + slot * self._slot_words
        at = base + LANES + lane * LANE_WORDS
        try:
            raw = hop.encode()
        except UnicodeEncodeError:
            raw = hop.encode("utf-8", "replace")
        # Odd while the lane is written, also where a predecessor was killed in the middle.
        generation = words[at] | 1
        words[at] = generation
        CALL.pack_into(self._looks_view, (at + 1) * _WORD, started, -1.0, len(raw), 0, lease + 1, raw)
        words[at] = generation + 1
        if waited is not None:
            words[base + QUEUE_WAITS + bucket(waited)] += 1
            if waited > 0:
                words[base + QUEUE_WAIT_NS] += waited

    def running(self, slot: int) -> list[RunningCall]:
        """Return the calls that run in a slot now, without one that changed while it was read."""
        statistics = Statistics(self._looks_view)
        try:
            return statistics.calls(slot)
        finally:
            statistics.close()

    def progressed(self, slot: int, lane: int, fraction: float, text: str) -> None:
        """Tell readers of the progress of a lane's call: 0 to 1, negative where it is not known."""
        at = self._slot_at + slot * self._slot_words + LANES + lane * LANE_WORDS
        write_progress(self._looks_view, self._words, at, fraction, text)

    def run_times(self, slots: Sequence[int]) -> list[int]:
        """Return the number of calls of these slots in each bucket of the histogram."""
        starts = [self._slot_at + slot * self._slot_words + RUN_TIMES for slot in slots]
        return [sum(self._words[start + index] for start in starts) for index in range(BUCKETS)]

    # -- attempts -----------------------------------------------------------------------------------------------

    def charges(self, digest: bytes, stage: int = 0) -> int:
        """Return the most failed attempts that a writer of a stage has noted of a message, or the keeper.

        ``digest``: ``leases.id_digest``.
        """
        return max(self._charge_entry(writer, digest)[1] & ~_ALONE for writer in (self.slots, *self.used(stage)))

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
        """Tell whether a message has to run alone; the keeper alone says so."""
        return bool(self._charge_entry(self.slots, digest)[1] & _ALONE)

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

    # -- cancelled messages -------------------------------------------------------------------------------------

    def cancel(self, digest: bytes) -> None:
        """Note that a message's running call is cancelled (supervisor); ``digest``: ``leases.id_digest``."""
        place = self.header(CANCELS) % _CANCELLED
        at = self._cancelled_at + place * _DIGEST
        self._view[at : at + _DIGEST] = digest
        self.set_header(CANCELS, self.header(CANCELS) + 1)

    def cancelled(self, digest: bytes) -> bool:
        """Tell whether a message's running call was cancelled."""
        return self.header(CANCELS) > 0 and self._cancelled_place(digest) is not None

    def forget_cancelled(self, digest: bytes) -> None:
        """Drop the note that a message was cancelled: it is done, or dead-lettered."""
        if self.header(CANCELS) and (at := self._cancelled_place(digest)) is not None:
            self._view[at : at + _DIGEST] = bytes(_DIGEST)

    def _cancelled_place(self, digest: bytes) -> int | None:
        size = min(self.header(CANCELS), _CANCELLED) * _DIGEST
        for at in range(self._cancelled_at, self._cancelled_at + size, _DIGEST):
            if self._view[at : at + _DIGEST] == digest:
                return at
        return None

    # -- regions ------------------------------------------------------------------------------------------------

    def region(self, index: int) -> LeaseTable:
        """Return one lease region."""
        known = self._looked_at.get(index)
        if known is not None:
            return known
        start, end = self._places[index]
        return self._looked_at.setdefault(index, LeaseTable(self._view[start:end], index))

    def used_regions(self) -> Iterator[LeaseTable]:
        """Yield the regions that have had a worker."""
        for stage, first in self._first_region.items():
            for index in range(first, first + self.stage(stage, REGIONS)):
                yield self.region(index)

    def free_region(self, stage: int = 0) -> LeaseTable | None:
        """Return a stage's region without a worker (supervisor); None while the keeper still has to judge each."""
        first, used = self._first_region[stage], self.stage(stage, REGIONS)
        for place in range(self._blocks[stage].regions):
            region = self.region(first + place)
            if region.free:
                self.set_stage(stage, REGIONS, max(used, place + 1))
                return region
        return None


def _anonymous(name: str) -> int:
    """Return the descriptor of a new file without a name in any folder."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _seal(fd: int) -> None:
    """Have no process shrink or grow a file: a reader's mapping would end it."""
    if hasattr(fcntl, "F_ADD_SEALS"):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def _attach(fd: Any, looks: Any, stages: int, blocks: Sequence[Block], lanes: int) -> Scoreboard:
    return Scoreboard(fd.detach(), looks.detach(), stages, blocks, lanes)
