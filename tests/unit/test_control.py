"""control.py: frames over a real socket pair, whole, split, cut off and garbled."""

import multiprocessing
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

import sqspipes_mp
from sqspipes_mp.ipc import channel as control
from sqspipes_mp.ipc.channel import (
    DOWN,
    MAX_HEADER,
    UP,
    BadFrame,
    Channel,
    Frame,
    FrameReader,
    FrameTooLarge,
    Kind,
    ParentChannel,
    ParentGone,
    describe_exit,
    pack,
)

PACKAGE = Path(sqspipes_mp.__file__).parent
FRAMES = [
    Frame(Kind.READY, {}, b""),
    Frame(Kind.FAILED, {"slot": 3, "id": "é\ud800", "x": None}, b"\x00" * 70_000),
    Frame(Kind.QUIT, {"grace": 2.5}, b"{"),
]


def packed(frames=FRAMES):
    return b"".join(pack(f.kind, f.header, f.blob) for f in frames)


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    parent, child = ParentChannel(ours), Channel(theirs)
    yield parent, child
    parent.close()
    child.close()


def wait_readable(channel):
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        assert selector.select(60)


def read_until_eof(parent):
    frames = []
    while not parent.eof:
        wait_readable(parent)
        frames += parent.read()
    return frames


def read_some(parent, count):
    frames: list[Frame] = []
    while len(frames) < count:
        wait_readable(parent)
        frames += parent.read()
    return frames


# --- frames ---


def test_frames_survive_whole():
    assert FrameReader(UP | DOWN).feed(packed()) == FRAMES


def test_frames_survive_any_split():
    data, rng = packed(), random.Random(7)
    for _ in range(30):
        cuts = sorted(rng.sample(range(len(data)), 12))
        reader = FrameReader(UP | DOWN)
        got = [f for a, b in pairwise([0, *cuts, len(data)]) for f in reader.feed(data[a:b])]
        assert got == FRAMES


def test_frames_survive_byte_by_byte():
    data = packed([FRAMES[0], FRAMES[2]])
    reader = FrameReader(UP | DOWN)
    assert [f for i in range(len(data)) for f in reader.feed(data[i : i + 1])] == [FRAMES[0], FRAMES[2]]


def test_partial_frame_is_kept_back():
    reader = FrameReader(UP | DOWN)
    assert reader.feed(packed()[:-1]) == FRAMES[:-1]
    assert reader.feed(packed()[-1:]) == FRAMES[-1:]


@pytest.mark.parametrize(
    "data",
    [
        b"Traceback (most recent call last):\n",
        bytes(100),
        control._PREFIX.pack(99, 2, 0) + b"{}",
        control._PREFIX.pack(Kind.READY, 2, 0) + b"[]",
        control._PREFIX.pack(Kind.READY, 2, 0) + b"\xff\xfe",
        control._PREFIX.pack(Kind.READY, 50_000, 0) + b"[" * 50_000,
        control._PREFIX.pack(Kind.READY, MAX_HEADER + 1, 0),
        control._PREFIX.pack(Kind.READY, 2, 1 << 62),
    ],
)
def test_garbage_is_refused(data):
    with pytest.raises(BadFrame):
        FrameReader(UP | DOWN).feed(data)


def test_limit_is_exact_and_known_from_the_prefix():
    data = pack(Kind.RESULT, {}, b"x" * 98)
    assert len(FrameReader(UP | DOWN, limit=100).feed(data)[0].blob) == 98
    with pytest.raises(BadFrame):
        FrameReader(UP | DOWN, limit=99).feed(data[:13])


def test_what_was_said_before_garbage_is_heard():
    reader = FrameReader(UP | DOWN)
    assert reader.feed(packed() + b"\xff" * 20) == FRAMES
    with pytest.raises(BadFrame):
        reader.feed(b"")


def test_too_large_frames_are_not_packed(monkeypatch):
    with pytest.raises(FrameTooLarge, match="header of READY"):
        pack(Kind.READY, {"x": "y" * MAX_HEADER})
    monkeypatch.setattr(control, "MAX_FRAME", 1000)
    with pytest.raises(FrameTooLarge, match="RESULT has 1001 bytes"):
        pack(Kind.RESULT, {}, b"x" * 1001)


def test_kinds_have_distinct_values_that_fit_a_byte():
    assert len({k.value for k in Kind}) == len(Kind.__members__)
    assert all(0 < k < 256 for k in Kind)


# --- the protocol's rule ---


def test_kinds_below_32_go_up_and_the_others_down():
    assert {kind for kind in Kind if kind < 32} == UP
    assert {kind for kind in Kind if kind >= 32} == DOWN


@pytest.mark.parametrize("kind", sorted(DOWN))
def test_a_parent_takes_what_goes_down_for_garbage(ends, kind):
    parent, child = ends
    child.send(kind)
    with pytest.raises(BadFrame):
        parent.read()


@pytest.mark.parametrize("kind", sorted(UP))
def test_a_child_takes_what_goes_up_for_garbage(ends, kind):
    parent, child = ends
    parent.queue(kind)
    assert parent.flush()
    with pytest.raises(BadFrame):
        child.recv()


def test_each_kind_is_said_by_somebody_and_heard_by_somebody():
    said, heard = set[str](), set[str]()
    # brokers/sqs has kinds of its own, of faults.
    for path in (path for path in PACKAGE.rglob("*.py") if "brokers" not in path.parts):
        text = path.read_text()
        hears = r"\.kind (?:is Kind\.\w+|in \{[^}]+\})"
        heard |= set(re.findall(r"Kind\.(\w+)", "".join(re.findall(hears, text))))
        said |= set(re.findall(r"\bKind\.(\w+)", re.sub(hears, "", text)))
    # JUDGE only wakes the keeper, which looks for the dead at each turn.
    assert said == heard | {"JUDGE"} == set(Kind.__members__)


# --- channels ---


def test_both_directions(ends):
    parent, child = ends
    child.send(Kind.READY, {"pid": 1})
    assert read_some(parent, 1) == [Frame(Kind.READY, {"pid": 1})]
    parent.queue(Kind.DRAIN, {"grace": 2}, b"b")
    parent.queue(Kind.QUIT)
    assert parent.wants_write
    assert parent.flush()
    assert not parent.wants_write
    assert child.recv() == Frame(Kind.DRAIN, {"grace": 2}, b"b")
    assert child.recv() == Frame(Kind.QUIT, {})


def test_reading_nothing_never_blocks(ends):
    parent, _ = ends
    assert parent.read() == []
    assert not parent.eof


def test_child_hears_end_of_file(ends):
    parent, child = ends
    parent.queue(Kind.DRAIN)
    parent.flush()
    parent.close()
    assert child.recv() == Frame(Kind.DRAIN, {})
    assert child.recv() is None
    assert child.recv() is None


def test_child_hears_end_of_file_though_it_was_not_heard(ends):
    parent, child = ends
    child.send(Kind.READY)
    parent.close()
    assert child.recv() is None


def test_sending_to_nobody_is_parent_gone(ends):
    parent, child = ends
    parent.close()
    with pytest.raises(ParentGone):
        child.send(Kind.READY)


@pytest.fixture
def cut_off():
    """A channel whose descriptor the user's function has closed, and its parent's end."""
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    os.close(channel.fileno())
    yield channel, ours
    # Python still believes it to be open.
    theirs.detach()
    ours.close()


def test_sending_on_a_descriptor_closed_by_others_is_parent_gone(cut_off):
    channel, _ = cut_off
    with pytest.raises(ParentGone):
        channel.send(Kind.READY)


def test_receiving_on_a_descriptor_closed_by_others_is_the_end(cut_off):
    channel, _ = cut_off
    assert channel.recv() is None
    assert channel.recv() is None


def test_a_closed_channel_has_nobody_at_the_other_end(ends):
    parent, child = ends
    parent.queue(Kind.DRAIN)
    parent.flush()
    child.close()
    assert child.recv() is None
    assert not child.waiting
    with pytest.raises(ParentGone):
        child.send(Kind.READY)


def test_frames_read_along_are_waiting_where_the_descriptor_says_nothing(ends):
    parent, child = ends
    assert not child.waiting
    for kind in (Kind.DRAIN, Kind.RELEASE, Kind.QUIT):
        parent.queue(kind)
    assert parent.flush()
    assert not child.waiting
    assert child.recv().kind is Kind.DRAIN
    assert child.waiting
    with selectors.DefaultSelector() as selector:
        selector.register(child, selectors.EVENT_READ)
        assert selector.select(0) == []
    assert child.recv().kind is Kind.RELEASE
    assert child.waiting
    assert child.recv().kind is Kind.QUIT
    assert not child.waiting


def test_half_a_frame_is_not_waiting():
    ours, theirs = socket.socketpair()
    child = Channel(theirs)
    ours.sendall(packed([FRAMES[2], FRAMES[2]])[:-1])
    assert child.recv() == FRAMES[2]
    assert not child.waiting
    ours.sendall(packed([FRAMES[2]])[-1:])
    assert child.recv() == FRAMES[2]
    child.close()
    ours.close()


def test_parent_gone_does_not_kill_where_sigpipe_is_default():
    script = """
import signal, socket
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
from sqspipes_mp.ipc.channel import Channel, Kind, ParentChannel, ParentGone
ours, theirs = socket.socketpair()
child = Channel(theirs); ours.close()
try: child.send(Kind.READY)
except ParentGone: print("gone")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "gone\n", done.stderr


def test_channel_blocks_despite_a_default_timeout():
    socket.setdefaulttimeout(0.001)
    try:
        ours, theirs = socket.socketpair()
    finally:
        socket.setdefaulttimeout(None)
    with ours:
        channel = Channel(theirs)
        assert theirs.gettimeout() is None
        channel.close()


def test_last_words_of_a_dead_child_are_read(ends):
    parent, child = ends
    child.send(Kind.FAILED, {}, b"why")
    child.close()
    parent.queue(Kind.DRAIN)
    assert parent.flush()
    assert not parent.wants_write
    assert read_until_eof(parent) == [Frame(Kind.FAILED, {}, b"why")]
    parent.queue(Kind.DRAIN)
    assert not parent.wants_write


def test_last_words_are_read_though_the_child_left_orders_unread(ends):
    parent, child = ends
    parent.queue(Kind.DRAIN)
    parent.flush()
    child.send(Kind.FAILED, {}, b"why")
    child.close()
    assert read_until_eof(parent) == [Frame(Kind.FAILED, {}, b"why")]


def test_partial_frame_at_the_end_is_dropped():
    ours, theirs = socket.socketpair()
    parent = ParentChannel(ours)
    theirs.sendall(packed([FRAMES[0]]) + packed([FRAMES[1]])[:500])
    theirs.close()
    assert read_until_eof(parent) == [FRAMES[0]]
    parent.close()


def test_garbled_child_is_a_bad_frame():
    ours, theirs = socket.socketpair()
    parent = ParentChannel(ours)
    theirs.sendall(b"\xff" * 50)
    with pytest.raises(BadFrame):
        parent.read()
    parent.close()
    theirs.close()


def test_chatty_child_is_read_within_a_budget(ends):
    parent, child = ends
    for _ in range(40):
        child.send(Kind.RESULT, {}, b"x" * 1000)
    first = parent.read(budget=8_000)
    assert 0 < len(first) < 9
    assert len(first) + len(read_some(parent, 40 - len(first))) == 40


def test_orders_nobody_reads_wait_in_the_buffer(ends):
    parent, child = ends
    blob = os.urandom(3_000_000)
    parent.queue(Kind.RELEASE, {}, blob)
    assert not parent.flush()
    assert parent.wants_write
    got = []
    thread = threading.Thread(target=lambda: got.append(child.recv()))
    thread.start()
    with selectors.DefaultSelector() as selector:
        selector.register(parent, selectors.EVENT_WRITE)
        while not parent.flush():
            assert selector.select(20)
    thread.join(20)
    assert got[0].blob == blob


def test_large_result_comes_in_turns(ends):
    parent, child = ends
    blob = os.urandom(5_000_000)
    thread = threading.Thread(target=child.send, args=(Kind.RESULT, {"n": 1}, blob))
    thread.start()
    (frame,) = read_some(parent, 1)
    thread.join(20)
    assert frame == Frame(Kind.RESULT, {"n": 1}, blob)


def test_threads_do_not_mix_their_frames(ends):
    parent, child = ends

    def say(i):
        for n in range(10):
            child.send(Kind.RESULT, {"i": i, "n": n}, bytes([i]) * 400_000)

    threads = [threading.Thread(target=say, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    frames = read_some(parent, 40)
    for thread in threads:
        thread.join(20)
    assert all(f.blob == bytes([f.header["i"]]) * 400_000 for f in frames)
    for i in range(4):
        assert [f.header["n"] for f in frames if f.header["i"] == i] == list(range(10))


def child_of_any_method(sock):
    channel = Channel(sock)
    channel.send(Kind.HELLO, {"pid": os.getpid()})
    order = channel.recv()
    channel.send(Kind.STOPPED, {"told": int(order.kind)})


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_socket_reaches_children_of_every_start_method(method):
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context(method).Process(target=child_of_any_method, args=(theirs,))
    process.start()
    theirs.close()
    parent = ParentChannel(ours)
    parent.queue(Kind.DRAIN)
    assert parent.flush()
    if method == "fork":
        # The child holds our end as well and would never hear the end of file; that is its first duty elsewhere.
        assert [f.kind for f in read_some(parent, 2)] == [Kind.HELLO, Kind.STOPPED]
    else:
        assert [f.kind for f in read_until_eof(parent)] == [Kind.HELLO, Kind.STOPPED]
    process.join(60)
    parent.close()
    assert process.exitcode == 0


# --- exit codes ---


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "clean exit"),
        (7, "exit status 7"),
        (control.EXIT_BOOT, "exit status 3 (failed before it was ready)"),
        (control.EXIT_ORPHAN, "exit status 5 (its parent was gone)"),
        (-signal.SIGKILL, "SIGKILL (out of memory?)"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (-signal.SIGTERM, "SIGTERM"),
        (-50, "signal 50"),
    ],
)
def test_exit_codes_in_words(code, text):
    assert describe_exit(code) == text
