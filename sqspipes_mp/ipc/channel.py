"""Frames over the socket pair that a parent shares with each child, and the meaning of exit codes (any process).

One ``socket.socketpair()`` per child. The child's end blocks; the parent's never does, because a child can be stopped
or killed in the middle of a frame. A frame is: kind (1 byte), header length, blob length, JSON header, raw blob.
"""

import json
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

#: Kind, header length, blob length.
_PREFIX = struct.Struct("!BIQ")
#: Most bytes of a header; values and reports travel in the blob, so a longer header is garbage.
MAX_HEADER = 65_536
#: Most bytes of one frame: a result for ``iterate`` or ``map``, pickled.
MAX_FRAME = 1 << 30
#: Bytes read from one child per turn, so that a child that sends much cannot starve the others.
READ_BUDGET = 1 << 18
_CHUNK = 1 << 16
# Without this flag a write to a dead child kills a process that has reset SIGPIPE (macOS has no such flag).
_SEND_FLAGS: int = getattr(socket, "MSG_NOSIGNAL", 0)

#: The child has done all that it was asked for.
EXIT_OK = 0
#: The task failed, and FAILED was sent; also Python's code for an uncaught exception.
EXIT_TASK = 1
#: The child failed before READY (import, setup, init, credentials). Not 2, Python's code for a wrong command line.
EXIT_BOOT = 3
#: The broker refuses for good; FAULT was sent.
EXIT_FAULT = 4
#: The parent is gone.
EXIT_ORPHAN = 5
#: Stands for an exit status that nobody could read; no process has it.
EXIT_UNKNOWN = 1 << 16

_MEANING = {
    EXIT_TASK: "a task or the child itself failed",
    EXIT_BOOT: "failed before it was ready",
    EXIT_FAULT: "the broker refused",
    EXIT_ORPHAN: "its parent was gone",
}


class Kind(IntEnum):
    """The one meaning of a frame. Kinds below 32 go up, from child to parent, and kinds from 32 on go down.

    The supervisor is the child of a caller that iterates. It passes RESULT, STEP, DEAD_LETTERED and DRAINED on to the
    caller, and ACK, LET_GO and WATCH on to its own children.
    """

    #: A supervisor hears signals from now on.
    HELLO = 1
    #: The child has booted and is about to receive.
    READY = 2
    #: A user's exception; blob: its Report. Header ``boot``: the child had not said READY.
    FAILED = 3
    #: A value for ``iterate`` or ``map``; blob: pickled.
    RESULT = 4
    #: A worker receives no more.
    STOPPED = 5
    #: A source's generator has ended.
    ENDED = 6
    #: The keeper has seen every queue empty and settled.
    DRAINED = 7
    #: The engine cannot go on; blob: a Report.
    FAULT = 8
    #: A worker is about to leave for a successor. Header ``reason``, and ``starved``: it has no memory for messages.
    RECYCLE = 9
    #: The child is done and about to exit as asked; a supervisor's blob: the pickled Outcome.
    BYE = 10
    #: Messages are about to become others, or have made some (map); blob: a JSON list of the ledger's reports.
    STEP = 11
    #: A message is about to be dead-lettered (map); blob: a Report, or none and a header that says why.
    DEAD_LETTERED = 12
    #: The run ends, and results that the caller was not given are back in their queue.
    TAKEN_BACK = 13
    #: A worker's answer to STACK; blob: the text.
    STACK_TOLD = 14
    #: A worker of a paused stage receives no more. Header ``order``: that of PAUSE.
    PAUSED = 15

    #: A child finishes the messages that it holds, and receives no more. Header: to a worker ``until``, monotonic
    #: seconds at which it is killed; to a supervisor ``reason``.
    DRAIN = 32
    #: A worker that drains, or is paused, releases the messages that it holds.
    RELEASE = 33
    #: The caller is done with results: it was given each and has asked for the next.
    ACK = 34
    #: The keeper judges the leases of dead workers.
    JUDGE = 35
    #: The keeper looks for drained queues until it can say DRAINED.
    WATCH = 36
    #: The keeper judges the leases that are left, and leaves.
    QUIT = 37
    #: A worker leaves after its message: for a successor, or because there are to be fewer. Header ``reason``.
    REPLACE = 38
    #: A worker that is to be replaced leaves without its ACKs: the caller waits for its successor's results.
    LET_GO = 39
    #: The supervisor kills the workers that still run.
    HASTEN = 40
    #: A worker says where its threads are.
    STACK = 41
    #: A worker looks on the scoreboard whether its stage is paused. Header ``order``: the order's number.
    PAUSE = 42
    #: The keeper counts queues for a while: somebody looks.
    LOOK = 43


#: Kinds that a parent hears.
UP = frozenset(kind for kind in Kind if kind < 32)
#: Kinds that a child hears.
DOWN = frozenset(Kind) - UP


class BadFrame(Exception):
    """The bytes are no frame: the child at the other end is broken."""


class FrameTooLarge(ValueError):
    """A frame that the other side would refuse; no byte of it was sent."""


class ParentGone(Exception):
    """The other end of the channel is closed."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message between a parent and its child."""

    kind: Kind
    #: Primitives only.
    header: dict[str, Any]
    blob: bytes = b""


def pack(kind: Kind, header: Mapping[str, Any] | None = None, blob: bytes = b"") -> bytes:
    """Encode one frame. Raises ``FrameTooLarge`` over MAX_HEADER or MAX_FRAME bytes."""
    head = json.dumps(dict(header or {}), separators=(",", ":")).encode("ascii")
    if len(head) > MAX_HEADER:
        raise FrameTooLarge(f"the header of {kind.name} has {len(head)} bytes, at most {MAX_HEADER} are allowed")
    if len(head) + len(blob) > MAX_FRAME:
        raise FrameTooLarge(f"{kind.name} has {len(blob)} bytes, at most {MAX_FRAME} are allowed")
    return b"".join((_PREFIX.pack(kind, len(head), len(blob)), head, blob))


class FrameReader:
    """Turns a stream of bytes into frames; a frame that is incomplete at its end is dropped."""

    def __init__(self, kinds: Collection[int], limit: int = MAX_FRAME) -> None:
        """Accept frames of ``kinds`` alone, with ``limit`` bytes of header and blob at most."""
        self._kinds = kinds
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that ``data`` completes. Raises ``BadFrame`` after the frames before it were returned."""
        self._buffer += data
        frames: list[Frame] = []
        start = 0
        try:
            while (end := self._end(start)) is not None:
                frames.append(self._frame(start, end))
                start = end
        except BadFrame:
            # The frames before the garbage often tell its reason; the next call raises.
            if not frames:
                raise
        finally:
            del self._buffer[:start]
        return frames

    def _end(self, start: int) -> int | None:
        if len(self._buffer) - start < _PREFIX.size:
            return None
        kind, head, blob = _PREFIX.unpack_from(self._buffer, start)
        if kind not in self._kinds or head > MAX_HEADER or head + blob > self._limit:
            raise BadFrame(f"kind {kind}, header of {head} bytes, blob of {blob} bytes")
        end = start + _PREFIX.size + int(head) + int(blob)
        return end if end <= len(self._buffer) else None

    def _frame(self, start: int, end: int) -> Frame:
        kind, head, _ = _PREFIX.unpack_from(self._buffer, start)
        body = start + _PREFIX.size
        try:
            header = json.loads(self._buffer[body : body + head])
        except (ValueError, RecursionError) as error:
            raise BadFrame("a header that is not JSON") from error
        if not isinstance(header, dict):
            raise BadFrame("a header that is not a JSON object")
        with memoryview(self._buffer) as view:
            return Frame(Kind(kind), header, bytes(view[body + head : end]))


class Channel:
    """The child's end: blocks. Any thread may send, one thread receives. Wrap the socket after the fork."""

    def __init__(self, sock: socket.socket) -> None:
        # The user may have called socket.setdefaulttimeout().
        sock.setblocking(True)
        self._sock = sock
        self._lock = threading.Lock()
        self._reader = FrameReader(DOWN)
        self._frames: deque[Frame] = deque()

    def send(self, kind: Kind, header: Mapping[str, Any] | None = None, blob: bytes = b"") -> None:
        """Send a frame, waiting while the parent is busy. Raises ``ParentGone``, ``FrameTooLarge``."""
        data = pack(kind, header, blob)
        with self._lock:
            try:
                self._sock.sendall(data, _SEND_FLAGS)
            except OSError as error:
                # The parent is gone, or the user's function has closed this descriptor.
                raise ParentGone from error

    def recv(self) -> Frame | None:
        """Wait for the next frame; None once the parent has closed its end or died."""
        while not self._frames:
            try:
                data = self._sock.recv(_CHUNK)
            except OSError:
                # The parent closed its end with frames unread, or the user's function closed this descriptor.
                return None
            if not data:
                return None
            self._frames.extend(self._reader.feed(data))
        return self._frames.popleft()

    @property
    def waiting(self) -> bool:
        """Whether ``recv`` has a frame that is read already, so that the descriptor does not become readable for it."""
        return bool(self._frames)

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close this end; the parent reads the frames that were sent, then the end of file."""
        self._sock.close()


class ParentChannel:
    """The parent's end: never blocks; one thread. A supervisor has one for its caller as well, and hears DOWN there."""

    def __init__(self, sock: socket.socket, hears: Collection[int] = UP) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = FrameReader(hears)
        self._outgoing = bytearray()
        self._deaf = False
        #: Whether the other end is closed and all its frames were read.
        self.eof = False

    def read(self, budget: int = READ_BUDGET) -> list[Frame]:
        """Return the frames that have arrived, of ``budget`` bytes at most. Raises ``BadFrame``."""
        frames: list[Frame] = []
        while budget > 0 and not self.eof:
            try:
                data = self._sock.recv(min(_CHUNK, budget))
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            self.eof = not data
            budget -= len(data)
            try:
                frames += self._reader.feed(data)
            except BadFrame:
                # As in FrameReader: first the frames before it. The reader raises again at the next turn.
                if not frames:
                    raise
                break
        return frames

    def queue(self, kind: Kind, header: Mapping[str, Any] | None = None, blob: bytes = b"") -> None:
        """Take a frame for ``flush``; dropped once the other end is closed. Raises ``FrameTooLarge``."""
        data = pack(kind, header, blob)
        if not self._deaf:
            self._outgoing += data

    def flush(self) -> bool:
        """Write as much as the socket takes; True: nothing is left to write."""
        while self._outgoing:
            try:
                sent = self._sock.send(self._outgoing, _SEND_FLAGS)
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                # No end of file yet: frames of a dead child may still be unread.
                self._deaf = True
                self._outgoing.clear()
            else:
                del self._outgoing[:sent]
        return True

    @property
    def wants_write(self) -> bool:
        """Whether ``flush`` has bytes left to write."""
        return bool(self._outgoing)

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close this end; the child's ``recv`` returns None, its ``send`` raises ``ParentGone``."""
        self._sock.close()


def describe_death(exitcode: int) -> str:
    """Describe the death of a worker that had booted: its exit status is the user's, none of the engine's codes."""
    return describe_exit(exitcode) if exitcode < 0 or exitcode == EXIT_UNKNOWN else f"exit status {exitcode}"


def describe_exit(exitcode: int) -> str:
    """Describe an exit code in a few words; negative: a signal, as in ``Process.exitcode``."""
    if exitcode == EXIT_OK:
        return "clean exit"
    if exitcode == EXIT_UNKNOWN:
        return "exit status unknown"
    if exitcode > 0:
        meaning = _MEANING.get(exitcode)
        return f"exit status {exitcode} ({meaning})" if meaning else f"exit status {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name
