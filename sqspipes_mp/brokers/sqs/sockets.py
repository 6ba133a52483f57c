"""The sockets of a connection to SQS, which a forked child closes without a byte on the wire (any process).

A goodbye of the child's (TLS has one) would end the parent's connection. And while a child has a copy of a socket, the
server does not see the parent close its own.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any

from sqspipes_mp.brokers.sqs.http_connect import Socket
from sqspipes_mp.host import fork_guard as forks


class Sockets:
    """Knows the open sockets of one connection."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[Any] = weakref.WeakSet()
        #: Connections of urllib3, of boto3's clients.
        self._pooled: weakref.WeakSet[Any] = weakref.WeakSet()
        forks.protect(self)

    def add(self, sock: Socket) -> None:
        """Know a socket from now on."""
        self._sockets.add(sock)

    def watch(self, client: Any) -> None:
        """Know the sockets of a boto3 client which has made none yet.

        botocore has no public name for its pools; those of another version are not known.
        """
        # The client holds this object, which is alive as long as the client.
        sockets = self

        def noting(pool: type[Any]) -> type[Any]:
            class Noting(pool):  # type: ignore[misc]
                def _new_conn(self) -> Any:
                    made = super()._new_conn()
                    sockets._pooled.add(made)
                    return made

            return Noting

        with contextlib.suppress(AttributeError):
            pools = client._endpoint.http_session._pool_classes_by_scheme
            pools.update({scheme: noting(pool) for scheme, pool in pools.items()})

    def hold(self, patience: float) -> None:
        """Before a fork: do nothing."""

    def resume(self, *, child: bool) -> None:
        """After a fork, in the child: close its copies, those in use by the parent's threads too."""
        if not child:
            return
        for sock in list(self._sockets):
            _close_copy(sock)
        for connection in list(self._pooled):
            sock, connection.sock = connection.sock, None
            if sock is not None:
                _close_copy(sock)


def _close_copy(sock: Any) -> None:
    """Close a descriptor, whoever still reads from the socket, and without TLS's goodbye."""
    # Of urllib3's TLS within TLS the socket below it.
    sock = getattr(sock, "socket", sock)
    with contextlib.suppress(OSError):
        if (fd := sock.detach()) >= 0:
            os.close(fd)
