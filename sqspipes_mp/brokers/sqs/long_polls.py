"""The long polls under way of one connection, which an interrupt cuts off (a worker's process).

Only the sending half of a poll's connection is shut: SQS sees its end, as a client's that has gone, and gives no
message to it any more. A reply that is on its way is read all the same, so that its messages can be given back.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

from sqspipes_mp.brokers.sqs.http_connect import Socket

#: Bytes of one read.
_CHUNK = 256 << 10
#: Seconds for which a poll is left alone: one of a queue that has messages is answered by then.
_YOUNG = 0.5


class Cut(Exception):
    """A long poll was cut off, and no reply had come."""


class LongPolls:
    """Knows the sockets of the polls; any thread may cut them off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[Any] = set()
        #: Polls are cut off: True from ``cut_off`` to ``go_on``.
        self.cut = False

    @contextlib.contextmanager
    def under_way(self, sock: Socket, timeout: float) -> Iterator[bytes]:
        """Have the poll whose request was sent on ``sock`` cut off, within the block, when that is asked for.

        Gives the first bytes of a reply that comes early. ``timeout``: of the socket afterwards, seconds.
        """
        # Not by the descriptor's readiness: TLS has messages of its own.
        sock.settimeout(_YOUNG)
        try:
            first = sock.recv(_CHUNK)
        except TimeoutError:
            first = b""
        sock.settimeout(timeout)
        if first:
            yield first
            return
        with self._lock:
            self._sockets.add(sock)
            if self.cut:
                _shut(sock)
        try:
            yield b""
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def cut_off(self) -> None:
        """Cut off the polls that are under way, and those that begin before ``go_on``."""
        with self._lock:
            self.cut = True
            for sock in self._sockets:
                _shut(sock)

    def go_on(self) -> None:
        """Cut off no more polls."""
        self.cut = False


def _shut(sock: Any) -> None:
    """Shut the sending half, below TLS: its other half may be read by a thread just now."""
    with contextlib.suppress(OSError):
        # Of urllib3's TLS within TLS the socket below it.
        socket.socket.shutdown(getattr(sock, "socket", sock), socket.SHUT_WR)
