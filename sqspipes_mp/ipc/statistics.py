"""The layout of the statistics memory, which other programs may look at, and its reader (any process).

The memory is an anonymous file of its own. Leases, receipt handles, charges and credentials are in another one
(``scoreboard.py``), which no reader gets. Readers map it read-only. Every field is one aligned word with one writer,
named beside it; a lane, which tells of a running call, has a generation that is odd while it is written.

::

    header | about | stages | slots (one per slot, one for the keeper), each with its lanes

The header's first words never change their place (``running/health.py`` reads them of any version); all else has the
layout ``LAYOUT``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NewType

from sqspipes_mp.ipc.histogram import BUCKETS
from sqspipes_mp.ipc.running import fixed
from sqspipes_mp.ipc.shared_text import SharedText

#: Number of this layout; counted up with each change beyond ``running/fixed.py``.
LAYOUT = 1
_WORD = 8
_HEADER_WORDS = 64
#: Bytes of the text that describes the run: a JSON object (``running/about.py``).
_ABOUT_BYTES = 65_536
_STAGE_WORDS = 96
#: Words of a slot before its lanes.
_SLOT_WORDS = 384
LANE_WORDS = 32

#: A word of one slot, of one stage, or of the engine. Types of their own, so that a type checker refuses one for
#: another; plain ints at run time (an IntEnum's attribute costs 100 ns a message on Python 3.11).
SlotField = NewType("SlotField", int)
StageField = NewType("StageField", int)
HeaderField = NewType("HeaderField", int)

# Slot fields; beside each the one thread that writes it. The keeper has a slot of its own, behind the others.
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
#: Worker (outbox): calls of the function that raised, or were late.
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
#: Worker (main): messages at their first delivery by the time they waited in the queue, BUCKETS words.
QUEUE_WAITS = SlotField(32 + BUCKETS)
_AFTER = 32 + 2 * BUCKETS
#: Supervisor: index of the stage, plus 1; 0: the slot was never used.
STAGE = SlotField(_AFTER)
#: Supervisor: the slot's number in its stage.
SEAT = SlotField(_AFTER + 1)
#: Supervisor: nanoseconds of CPU of the slot's workers, with their ended children; as of the newest beat.
CPU_NS = SlotField(_AFTER + 2)
#: Supervisor: when the present worker was started, monotonic nanoseconds.
STARTED = SlotField(_AFTER + 3)
#: Worker (meter), keeper: when the broker last answered, monotonic nanoseconds; 0: never.
LAST_CONTACT = SlotField(_AFTER + 4)
#: Worker (intake): when a receive last brought a message, monotonic nanoseconds; 0: never.
LAST_RECEIVE = SlotField(_AFTER + 5)
#: Worker (meter): receives that brought nothing.
EMPTY_RECEIVES = SlotField(_AFTER + 6)
#: Worker: messages of lost leases that it let go of.
LEASES_LOST = SlotField(_AFTER + 7)
#: Worker (outbox): calls of FAILED that were late.
FAILED_LATE = SlotField(_AFTER + 8)
#: Worker (outbox): calls of FAILED that the task rejected, and bodies that ``decode`` refused.
REJECTED = SlotField(_AFTER + 9)
#: Worker (outbox): messages that went on as a continuation.
CONTINUED = SlotField(_AFTER + 10)
#: Worker (outbox): messages dead-lettered because a person cancelled them; not in DEAD.
CANCELLED = SlotField(_AFTER + 11)
#: Worker (main): nanoseconds of QUEUE_WAITS together.
QUEUE_WAIT_NS = SlotField(_AFTER + 12)
#: Worker, keeper: when a request to the broker last failed, monotonic nanoseconds; 0: never.
LAST_TROUBLE = SlotField(_AFTER + 13)
#: Worker: 1 while it waits for its turn (``interval``), for the caller, or for a smaller backlog (``max_waiting``).
RESTS = SlotField(_AFTER + 14)
#: Supervisor: 1 while the slot is to have a worker.
EXPECTED = SlotField(_AFTER + 15)
#: Worker (meter), keeper: requests to the broker, a word for each of OPERATIONS.
REQUESTS = SlotField(_AFTER + 16)
OPERATIONS = ("receive", "send", "delete", "extend", "count", "other")
#: Worker (meter), keeper: failed requests, for each of OPERATIONS a word for each of ERROR_KINDS.
ERRORS = SlotField(_AFTER + 16 + len(OPERATIONS))
ERROR_KINDS = ("throttled", "credentials", "network", "server", "refused")
#: Worker (meter), keeper: one of TRANSPORTS, its place plus 1, by which requests go; 0: there is one way only.
TRANSPORT = SlotField(ERRORS + len(OPERATIONS) * len(ERROR_KINDS))
TRANSPORTS = ("fast", "boto3")

S_BOOTING, S_READY, S_DRAINING = range(1, 4)

# Header fields.
#: Supervisor: when its loop last turned, monotonic nanoseconds.
SUPERVISOR_BEAT = HeaderField(fixed.SUPERVISOR_BEAT)
#: Keeper: when it last moved, monotonic nanoseconds.
KEEPER_BEAT = HeaderField(fixed.KEEPER_BEAT)
#: Supervisor: nanoseconds that the keeper may stand still; 0: it boots, or is being replaced, and counts as moving.
KEEPER_LIMIT = HeaderField(fixed.KEEPER_LIMIT)
#: Supervisor: whether the engine is ready, and why not (``fixed.NOT_READY``).
READINESS = HeaderField(fixed.READINESS)
#: Keeper: leases extended.
KEEPER_EXTENDED = HeaderField(16)
#: Keeper: leases found lost.
KEEPER_LOST = HeaderField(17)
#: Supervisor: 1 where it may kill a worker for its memory; written before the first worker starts.
WATCHES_MEMORY = HeaderField(18)
#: Supervisor: when the whole engine last went on after it had been stopped (Ctrl-Z), monotonic nanoseconds.
CONTINUED_AT = HeaderField(19)
#: Supervisor: nanoseconds that calls begun before CONTINUED_AT have beyond their timeout.
STOOD_STILL = HeaderField(20)
#: Supervisor: messages whose running call a person has cancelled.
CANCELS = HeaderField(21)
# The creator: the memory's shape.
_STAGES, _SLOTS, _LANES = HeaderField(24), HeaderField(25), HeaderField(26)

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
#: Supervisor: workers that the stage should have.
WANTED = StageField(7)
#: Supervisor: 1 while the stage is paused.
PAUSED = StageField(8)
#: Keeper: messages of dead workers completed, since their outputs were accepted.
KEEPER_DONE = StageField(9)
#: Keeper: messages of dead workers dead-lettered because a person cancelled them; not in KEEPER_DEAD.
KEEPER_CANCELLED = StageField(10)
#: Keeper: leases of the stage found lost.
KEEPER_LEASES_LOST = StageField(11)
#: Supervisor: workers started in the place of another, a word for each of RESTART_REASONS.
RESTARTS = StageField(12)
RESTART_REASONS = ("crash", "timeout", "memory", "max_tasks", "boot")
#: Keeper: calls that failed with their workers, a word for each of KILLED_REASONS.
KEEPER_FAILED = StageField(17)
KILLED_REASONS = ("crash", "timeout", "memory")
#: Keeper: messages in the dead-letter queue, plus 1; 0: not counted.
DEAD_LETTERS = StageField(20)
#: Supervisor: the stage's slots that have had a worker, or were to have one: the first ones.
SEATS = StageField(21)
#: Supervisor: lease regions of the stage that have had a worker: the first ones.
REGIONS = StageField(22)
#: Any worker: 1 once the warning was logged that continuations come quickly and are held back.
PAUSE_TOLD = StageField(23)
#: Any worker: 1 once the warning was logged that other programs on the queue do not know of continuations.
SHARED_TOLD = StageField(24)
#: Keeper: messages that can be received in the queues that a source with max_waiting sends to, plus 1; 0: not counted.
BACKLOG = StageField(25)
#: Keeper: when that was counted, monotonic nanoseconds.
BACKLOG_AT = StageField(26)
#: Keeper: nanoseconds between two such counts while no worker of the source rests.
COUNT_EVERY = StageField(27)
#: Any worker of the source: 1 while it rests.
RESTING = StageField(28)
#: Keeper: messages in the stage's input queues, for each priority a word for each of QUEUE_STATES, plus 1 each; 0: not
#: counted.
QUEUE_COUNTS = StageField(32)
QUEUE_STATES = ("waiting", "in_flight", "delayed")
_PRIORITIES = 16


class Shape:
    """The places of a statistics memory for so many stages, slots, and lanes of a slot."""

    def __init__(self, stages: int, slots: int, lanes: int) -> None:
        self.stages = stages
        #: Slots of workers; the keeper's is behind them.
        self.slots = slots
        #: Messages that may run at once in one worker.
        self.lanes = lanes
        self.stage_at = _HEADER_WORDS + _ABOUT_BYTES // _WORD
        self.slot_at = self.stage_at + stages * _STAGE_WORDS
        self.stage_words = _STAGE_WORDS
        self.slot_words = _SLOT_WORDS + lanes * LANE_WORDS
        #: Bytes of the memory.
        self.size = (self.slot_at + (slots + 1) * self.slot_words) * _WORD

    def write(self, words: memoryview) -> None:
        """Write the shape into a fresh memory."""
        words[fixed.MAGIC] = fixed.MAGIC_WORD
        words[fixed.LAYOUT] = LAYOUT
        words[fixed.SIZE] = self.size
        for field, value in ((_STAGES, self.stages), (_SLOTS, self.slots), (_LANES, self.lanes)):
            words[field] = value


def about_text(view: memoryview) -> SharedText:
    """Return the text that describes the run, in a view of the whole memory (supervisor)."""
    start = _HEADER_WORDS * _WORD
    return SharedText(view[start : start + _ABOUT_BYTES])


# -- running calls --------------------------------------------------------------------------------------------------
# A lane tells of one message's call; the thread that runs the call writes it.

#: The lane's first word: its generation, odd while the lane is written.
LANES = SlotField(_SLOT_WORDS)
#: Behind it: when the call began (monotonic ns; 0: none runs), progress (negative: not told), bytes of hop id and text,
#: the number of the message's lease plus 1, hop id; then the progress in the call's own words.
CALL = struct.Struct("<QdHHI64s")
_CALL_AT = _WORD
_TEXT_AT = _CALL_AT + CALL.size
#: Most bytes of that text.
_TEXT_BYTES = LANE_WORDS * _WORD - _TEXT_AT
#: Most bytes of a hop id; those of this package have 64.
_HOP = 64
_F64, _U16 = struct.Struct("<d"), struct.Struct("<H")


def lane_started(lane: int) -> SlotField:
    """Return the field with the start of the call that runs in a lane; 0 there ends the call."""
    return SlotField(LANES + lane * LANE_WORDS + 1)


def write_progress(view: memoryview, words: memoryview, at: int, fraction: float, text: str) -> None:
    """Write the progress of a lane's call; ``at``: the lane's first word; a text that is too long is cut."""
    raw = text.encode("utf-8", "replace")[:_TEXT_BYTES]
    start = at * _WORD
    generation = words[at] | 1
    words[at] = generation
    _F64.pack_into(view, start + _CALL_AT + 8, fraction)
    _U16.pack_into(view, start + _CALL_AT + 18, len(raw))
    view[start + _TEXT_AT : start + _TEXT_AT + len(raw)] = raw
    words[at] = generation + 1


@dataclass(frozen=True, slots=True)
class RunningCall:
    """A call that runs now."""

    #: Monotonic nanoseconds.
    started: int
    #: The message's hop id; of a batch several calls have one start.
    hop: str
    #: 0 to 1; None: not told.
    fraction: float | None
    #: The call's own words on its progress.
    text: str
    #: The number of the message's lease in its worker.
    lease: int = -1


# -- reading ----------------------------------------------------------------------------------------------------------


class ForeignLayout(Exception):
    """The memory is no statistics of this layout."""


class Statistics:
    """A reader's view. Values are those of a moment each: the engine goes on meanwhile, and may end."""

    def __init__(self, view: memoryview) -> None:
        """Read ``view``, the whole memory. Raises ``ForeignLayout``."""
        self._view = view[:]
        if len(view) < _HEADER_WORDS * _WORD:
            raise ForeignLayout(f"{len(view)} bytes are no statistics")
        words = view[: len(view) // _WORD * _WORD].cast("Q")
        if words[fixed.MAGIC] != fixed.MAGIC_WORD:
            raise ForeignLayout("the memory has no statistics")
        if words[fixed.LAYOUT] != LAYOUT:
            raise ForeignLayout(f"the engine has layout {words[fixed.LAYOUT]}, this version reads {LAYOUT}")
        numbers = words[_STAGES], words[_SLOTS], words[_LANES]
        if max(numbers) > 1 << 20:
            raise ForeignLayout("the memory's shape cannot be")
        self.shape = Shape(*numbers)
        if self.shape.size > len(view) or self.shape.size != words[fixed.SIZE]:
            raise ForeignLayout("the memory has not the size of its shape")
        self._words = words

    def close(self) -> None:
        """Release the views of the memory, which can be closed then."""
        self._words.release()
        self._view.release()

    @property
    def run_id(self) -> str:
        """The id of the run, 32 hex digits."""
        return bytes(self._view[fixed.RUN_ID * _WORD : (fixed.RUN_ID + 2) * _WORD]).hex()

    @property
    def about(self) -> str | None:
        """The JSON text that describes the run; None while it is not written."""
        return about_text(self._view).read()

    @property
    def fixed_words(self) -> Sequence[int]:
        """A copy of the header's words that never change their place, for the verdict."""
        return self._words[: fixed.WORDS].tolist()

    def header(self, field: HeaderField) -> int:
        """Return a word of the engine."""
        return self._words[field]

    def stage(self, stage: int, field: StageField, offset: int = 0) -> int:
        """Return a word of a stage; ``offset``: in a field of several words."""
        return self._words[self.shape.stage_at + stage * _STAGE_WORDS + field + offset]

    def get(self, slot: int, field: SlotField, offset: int = 0) -> int:
        """Return a word of a slot; ``offset``: in a field of several words."""
        return self._words[self.shape.slot_at + slot * self.shape.slot_words + field + offset]

    def histogram(self, slots: Iterable[int], field: SlotField) -> list[int]:
        """Return the sum of these slots' words of RUN_TIMES or QUEUE_WAITS, BUCKETS numbers."""
        starts = [self.shape.slot_at + slot * self.shape.slot_words + field for slot in slots]
        return [sum(self._words[start + index] for start in starts) for index in range(BUCKETS)]

    def queue_count(self, stage: int, priority: int, state: int) -> int | None:
        """Return the messages of one of QUEUE_STATES (its index) at a priority; None: not counted."""
        if not 0 <= priority < _PRIORITIES:
            return None
        counted = self.stage(stage, QUEUE_COUNTS, priority * len(QUEUE_STATES) + state)
        return counted - 1 if counted else None

    def calls(self, slot: int) -> list[RunningCall]:
        """Return the calls that run in a slot now, without one that changed while it was read."""
        found = (
            self._call(self.shape.slot_at + slot * self.shape.slot_words + LANES + lane * LANE_WORDS)
            for lane in range(self.shape.lanes)
        )
        return [call for call in found if call is not None]

    def _call(self, at: int) -> RunningCall | None:
        for _ in range(10):
            generation = self._words[at]
            raw = bytes(self._view[at * _WORD : (at + LANE_WORDS) * _WORD])
            if generation % 2 or self._words[at] != generation:
                continue
            started, fraction, hop_size, text_size, lease, hop = CALL.unpack_from(raw, _CALL_AT)
            if not started:
                return None
            text = raw[_TEXT_AT : _TEXT_AT + min(text_size, _TEXT_BYTES)]
            return RunningCall(
                started=started,
                hop=hop[: min(hop_size, _HOP)].decode("utf-8", "replace"),
                fraction=fraction if 0 <= fraction <= 1 else None,
                text=text.decode("utf-8", "replace"),
                lease=lease - 1,
            )
        return None
