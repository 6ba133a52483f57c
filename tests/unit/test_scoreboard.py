import math
import multiprocessing
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqspipes_mp.brokers.base import Handle
from sqspipes_mp.ipc import statistics
from sqspipes_mp.ipc.histogram import BUCKETS
from sqspipes_mp.ipc.leases import LEASES, Blame, Cause, LeaseState, id_digest
from sqspipes_mp.ipc.scoreboard import Block, Scoreboard
from sqspipes_mp.ipc.statistics import (
    DONE,
    ERROR_KINDS,
    KILLED_REASONS,
    NEXT_CALL,
    OPERATIONS,
    QUEUE_STATES,
    RESTART_REASONS,
    S_READY,
    SEATS,
    STATE,
    WINDOW_WORDS,
)
from tests.gates import present


def _write(region, index=0, ident="m", receipt="r", group=None):
    handle = Handle("q1", receipt, ident)
    region.write(index, 1, handle, group, receives=2, charges=1, received_at=10.0, deadline=25.0, sent_at=5.0)


def test_counters_are_seen_across_a_fork():
    board = Scoreboard.create(1, 2)
    pid = os.fork()
    if pid == 0:
        board.add(1, DONE, 7)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (board.get(0, DONE), board.get(1, DONE)) == (0, 7)
    board.close()


def _attached(board):
    board.add(0, DONE, 3)


def test_the_board_travels_to_spawned_children():
    board = Scoreboard.create(1, 1)
    child = multiprocessing.get_context("spawn").Process(target=_attached, args=(board,))
    child.start()
    child.join(40)
    assert child.exitcode == 0
    assert board.get(0, DONE) == 3
    board.close()


#: Words of the fields that have several.
WORDS_OF = {
    "ACCEPTED_WINDOW": WINDOW_WORDS, "RUN_TIMES": BUCKETS, "QUEUE_WAITS": BUCKETS, "REQUESTS": len(OPERATIONS),
    "ERRORS": len(OPERATIONS) * len(ERROR_KINDS), "RESTARTS": len(RESTART_REASONS),
    "KEEPER_FAILED": len(KILLED_REASONS), "QUEUE_COUNTS": 16 * len(QUEUE_STATES),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "room"),
    [("Slot", statistics._SLOT_WORDS), ("Stage", statistics._STAGE_WORDS), ("Header", statistics._HEADER_WORDS)],
)
def test_no_two_fields_of_the_statistics_share_a_word(kind: str, room: int):
    text = Path(statistics.__file__).read_text()
    names = [name for line in re.findall(rf"(?m)^([A-Z_, ]+) = {kind}Field\(", text) for name in line.split(", ")]
    owners: dict[int, str] = {}
    for name in set(names) - {"LANES"}:
        first = getattr(statistics, name)
        for word in range(first, first + WORDS_OF.get(name, 1)):
            assert word < room, name
            assert word not in owners, (name, owners[word])
            owners[word] = name
    assert len(names) >= {"Slot": 35, "Stage": 24, "Header": 12}[kind]


def test_a_lease_reads_back_as_written():
    board = Scoreboard.create(1, 1)
    region = board.region(0)
    region.assign(0)
    _write(region, index=5, ident="é☃", receipt="x" * 1024, group="g" * 128)
    (lease,) = region.leases(("q0", "q1"))
    assert lease.handle == Handle("q1", "x" * 1024, "é☃")
    assert (lease.index, lease.state, lease.group) == (5, LeaseState.HELD, "g" * 128)
    assert (lease.receives, lease.charges, lease.received_at, lease.deadline) == (2, 1, 10.0, 25.0)
    assert not lease.extended
    board.close()


def test_closed_nothing_of_it_stays_open_whoever_still_holds_a_region():
    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    board = Scoreboard.create(1, 1)
    held = [board.region(0), board.free_region()]
    assert descriptors() > before
    board.close()
    assert descriptors() == before, held
    board.close()


def test_a_half_written_entry_is_not_read():
    board = Scoreboard.create(1, 1)
    region = board.region(0)
    region.assign(0)
    _write(region)
    region._view[128 + LEASES + 64] ^= 0xFF
    assert region.read(0) is None
    board.close()


def test_what_the_keeper_says_of_an_old_lease_does_not_touch_the_next_one():
    board = Scoreboard.create(1, 1)
    region = board.region(0)
    region.assign(0)
    _write(region)
    old = present(region.read(0))
    region.keep(old, 99.0)
    assert (region.read(0).deadline, region.read(0).extended) == (99.0, True)
    _write(region)
    assert (region.read(0).deadline, region.read(0).extended) == (25.0, False)
    region.lose(old)
    assert region.held_until(0, 25.0) == 25.0
    region.keep(present(region.read(0)), 99.0)
    assert region.held_until(0, 25.0) == 99.0
    region.lose(present(region.read(0)))
    assert region.held_until(0, 25.0) == 0.0
    board.close()


def test_a_running_messages_body_is_kept_for_the_keeper():
    board = Scoreboard.create(1, 1, calls=2)
    region = board.region(0)
    region.assign(0)
    _write(region, index=3)
    region.start(3, 11.0, 1, "bödy")
    lease = present(region.read(3))
    assert (lease.state, lease.started_at) == (LeaseState.RUNNING, 11.0)
    assert region.body(lease, 2) == "bödy"
    assert region.pause(3) == 11.0
    assert region.read(3) == replace(lease, started_at=math.inf)
    region.resume(3, 12.5)
    assert region.read(3) == replace(lease, started_at=12.5)
    _write(region, index=3)
    assert region.body(present(region.read(3)), 2) is None
    board.close()


def test_a_region_is_free_only_once_its_dead_worker_was_judged():
    board = Scoreboard.create(1, 1)
    first = board.free_region()
    first.assign(0)
    assert (first.free, first.live, first.to_judge) == (False, True, False)
    first.mark_dead(Cause.CRASH, -9, 4711)
    assert (first.live, first.to_judge) == (False, True)
    assert first.death == (Cause.CRASH, -9, 4711)
    assert board.free_region().index != first.index
    first.mark_judged()
    assert (first.free, board.free_region().index) == (True, first.index)
    board.close()


def test_a_call_that_is_blamed_is_known_until_its_entry_is_another_messages():
    board = Scoreboard.create(1, 1)
    region = board.region(0)
    region.assign(0)
    _write(region, index=3)
    region.start(3, 11.0, 0, "body")
    lease = present(region.read(3))
    assert (region.blamed, region.late_for(3), region.runs(lease)) == (None, None, True)
    region.blame(lease, Cause.MEMORY)
    assert (region.blamed, region.late_for(3)) == (Blame(3, lease.generation, Cause.MEMORY), None)
    region.blame(lease, Cause.HOLD)
    assert region.late_for(3) is Cause.HOLD
    region.blame(lease, Cause.TIMEOUT)
    assert (region.blamed.means(lease), region.late_for(3), region.late_for(2)) == (True, Cause.TIMEOUT, None)
    region.set_state(3, LeaseState.DONE)
    assert (region.late_for(3), region.runs(lease)) == (Cause.TIMEOUT, False)
    # It came back by itself, and is charged or given back: a later death has nothing to do with it.
    region.set_state(3, LeaseState.FREE)
    assert region.blamed is None
    _write(region, index=3)
    region.start(3, 12.0, 0, "body")
    assert (region.late_for(3), region.runs(lease), region.blamed) == (None, False, None)
    region.mark_dead(Cause.TIMEOUT, -9, 4711, known=True)
    assert (region.death, region.known) == ((Cause.TIMEOUT, -9, 4711), True)
    region.mark_judged()
    region.assign(0)
    assert region.blamed is None
    region.mark_dead(Cause.TIMEOUT, -9, 4711)
    assert not region.known
    board.close()


def test_a_new_worker_starts_with_no_leases():
    board = Scoreboard.create(1, 1)
    region = board.region(0)
    region.assign(0)
    assert region.empty
    for index in range(LEASES):
        _write(region, index=index)
    assert not region.empty
    region.mark_dead(Cause.CRASH, 1, 1)
    region.mark_judged()
    region.assign(0)
    assert list(region.leases(())) == []
    assert region.empty
    board.close()


def test_turns_of_one_interval_are_shared_between_processes():
    board = Scoreboard.create(1, 1)
    readers = []
    for _ in range(4):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            turns = [board.reserve_call(0, 1_000_000, lambda: 10_000) for _ in range(50)]
            os.write(write, b"".join(t.to_bytes(8, "little") for t in turns))
            os._exit(0)
        os.close(write)
        readers.append((pid, read))
    turns = []
    for pid, read in readers:
        os.waitpid(pid, 0)
        data = os.read(read, 65536)
        os.close(read)
        turns += [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    assert sorted(turns) == [1_000_000 + 10_000 * n for n in range(200)]
    board.close()


def test_nobody_waits_for_a_turn_that_another_process_is_just_taking():
    board = Scoreboard.create(2, 2)
    here, there = os.pipe()
    ended, end = os.pipe()
    pid = os.fork()
    if pid == 0:

        def stopped() -> int:
            os.write(there, b"!")
            os.read(ended, 1)
            return 10_000

        # As it stands where another of its threads keeps the GIL; and just after each of its calls.
        assert board.reserve_call(0, 1_000_000, lambda: 10_000) == 1_000_000
        board.set_stage(0, NEXT_CALL, 0)
        board.reserve_call(0, 1_000_000, stopped)
        os._exit(0)
    assert os.read(here, 1) == b"!"
    # The turn that was taken is not known from the word, as long as its holder has not come to write it.
    assert board.reserve_call(0, 1_000_000, lambda: 10_000) == 1_010_000
    assert board.reserve_call(0, 1_000_000, lambda: 10_000) == 1_020_000
    assert board.reserve_call(1, 1_000_000, lambda: 10_000) == 1_000_000
    os.write(end, b"!")
    assert os.waitpid(pid, 0)[1] == 0
    for fd in (here, there, ended, end):
        os.close(fd)
    board.close()


def test_a_turn_that_others_have_passed_meanwhile_is_not_taken(monkeypatch):
    board = Scoreboard.create(1, 1)
    lock = board._try_lock

    def stands(start, length):
        # Others take turns, and forget the locks of the past, while this thread does not get the GIL.
        if not board.stage(0, NEXT_CALL):
            board.set_stage(0, NEXT_CALL, 1_500_000)
        return lock(start, length)

    monkeypatch.setattr(board, "_try_lock", stands)
    assert board.reserve_call(0, 1_000_000, lambda: 10_000) == 1_500_000
    board.close()


def test_two_workers_that_ask_at_once_do_not_both_leave_nor_wait():
    board = Scoreboard.create(1, 2)
    for slot in range(2):
        board.put(slot, STATE, S_READY)
    here, there = os.pipe()
    ended, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        board.get = lambda *_: (os.write(there, b"!"), os.read(ended, 1), S_READY)[-1]  # type: ignore[method-assign]
        os._exit(0 if board.leave(0, [1]) else 1)
    assert os.read(here, 1) == b"!"
    assert not board.leave(1, [0])
    os.write(end, b"!")
    assert os.waitpid(pid, 0)[1] == 0
    for fd in (here, there, ended, end):
        os.close(fd)
    board.close()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.booleans()), max_size=120))
def test_the_highest_number_any_writer_noted_counts(steps):
    board = Scoreboard.create(1, 2)
    expected: dict[tuple[int, int], int] = {}
    for writer, message, forget in steps:
        digest = id_digest(f"message {message}")
        if forget:
            board.forget_charges(writer, digest)
            expected.pop((writer, message), None)
        else:
            attempts = 1 + message % 3
            board.charge(writer, digest, attempts)
            # A charge that is noted again, or late, counts once.
            board.charge(writer, digest, 1)
            expected[writer, message] = attempts
    for message in range(41):
        most = max((count for (_, known), count in expected.items() if known == message), default=0)
        assert board.charges(id_digest(f"message {message}")) == most
    board.close()


def test_more_charged_messages_than_fit_never_raise():
    board = Scoreboard.create(1, 1)
    for n in range(3000):
        board.charge(0, id_digest(str(n)), 1)
    assert board.charges(id_digest("2999")) == 1
    board.close()


def test_reserved_seats_cost_neither_memory_nor_looks():
    blocks = [Block(0, 640, 1, 650), Block(2, 640, 128, 650)]
    board = Scoreboard.create_for(3, blocks, 128)
    assert (board.slots, list(board.used(2)), list(board.used_regions())) == (1280, [], [])
    for stage, slot in ((0, 0), (2, 640)):
        board.set_stage(stage, SEATS, 1)
        present(board.free_region(stage)).assign(slot)
    assert [region.slot for region in board.used_regions()] == [0, 640]
    assert present(board.free_region(2)).index == present(board.free_region(0)).index + 650
    board.charge(640, id_digest("m"), 2)
    assert (board.charges(id_digest("m"), 2), board.charges(id_digest("m"), 0)) == (2, 0)
    # Of 60 GB of leases and bodies only the pages of those in use have memory.
    assert board.size > 50 << 30
    assert os.fstat(board.fileno()).st_blocks * 512 < 1 << 20
    board.close()


def test_the_newest_cancelled_messages_are_remembered_until_they_are_dealt_with():
    board = Scoreboard.create(1, 1)
    digests = [id_digest(f"{number}") for number in range(300)]
    assert not board.cancelled(digests[0])
    for digest in digests:
        board.cancel(digest)
    assert [board.cancelled(digest) for digest in digests] == [False] * 44 + [True] * 256
    board.forget_cancelled(digests[299])
    board.forget_cancelled(digests[0])
    assert [board.cancelled(digest) for digest in digests[297:]] == [True, True, False]
    board.close()
