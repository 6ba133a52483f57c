"""The caller's connection, kept between two calls of an engine: ``put`` costs a request and not a client (caller).

No thread watches it: its next use looks whether it is too old. A forked child does not use its parent's.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqspipes_mp.brokers.base import Broker, Connection
from sqspipes_mp.errors import BrokerError, PutError, QueueMissing
from sqspipes_mp.host import fork_guard as forks

#: Seconds after its last use from which a connection is not used again: NAT gateways and load balancers cut connections
#: that rest for some minutes.
IDLE = 30.0


@dataclass(slots=True, eq=False)
class _Open:
    """An open connection."""

    broker: Broker
    connection: Connection
    #: Closes it: called by hand, or at the end of the engine or the process.
    close: Callable[[], object]
    #: Calls that use it now.
    users: int = 0
    #: End of its last use, monotonic seconds.
    used_at: float = 0.0
    #: True: closed once its last user is done.
    retired: bool = False


class KeptConnection:
    """Lends one connection to all threads of the process. A pickled copy has none."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may put while its own thread holds the lock.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._open: _Open | None = None
        forks.protect(self)

    def __reduce__(self) -> tuple[type[KeptConnection], tuple[()]]:
        return KeptConnection, ()

    @contextlib.contextmanager
    def use(self, broker: Broker) -> Iterator[Connection]:
        """Lend the connection to ``broker`` for the block; open one where there is none.

        After a ``BrokerError`` of the block the next use opens a new connection: credentials and endpoint are looked up
        anew. Raises as ``Broker.open`` does.
        """
        lent = self._lend(broker)
        try:
            yield lent.connection
        except QueueMissing:
            raise
        except (BrokerError, PutError):
            lent.retired = True
            raise
        finally:
            self._take_back(lent)

    def close(self) -> None:
        """Close the connection, or have its last user close it; a later use opens another."""
        with self._lock:
            if self._open is not None:
                self._retire(self._open)

    def hold(self, patience: float) -> None:
        """Before a fork: do nothing."""

    def resume(self, *, child: bool) -> None:
        """After a fork: another thread of the parent may have held the lock, which is free in the child."""
        if child:
            self._lock = threading.RLock()

    def _lend(self, broker: Broker) -> _Open:
        with self._lock:
            kept = self._open
            if kept is not None and not self._usable(kept, broker):
                self._retire(kept)
                kept = None
            if kept is None:
                kept = self._make(broker)
            kept.users += 1
            return kept

    def _usable(self, kept: _Open, broker: Broker) -> bool:
        if self._pid != os.getpid():
            # Its users are threads of the parent.
            kept.users = 0
            return False
        if kept.retired or kept.broker is not broker:
            return False
        if kept.users:
            return True
        return time.monotonic() - kept.used_at < IDLE and not kept.connection.moved

    def _make(self, broker: Broker) -> _Open:
        # Parsed data of botocore stays in memory: a second connection costs a sixth of the first.
        broker.warm()
        broker.check()
        connection = broker.open(attended=True)
        made = _Open(broker, connection, weakref.finalize(self, connection.close))
        self._open, self._pid = made, os.getpid()
        return made

    def _retire(self, kept: _Open) -> None:
        kept.retired = True
        if self._open is kept:
            self._open = None
        if not kept.users:
            kept.close()

    def _take_back(self, kept: _Open) -> None:
        with self._lock:
            kept.users -= 1
            kept.used_at = time.monotonic()
            if kept.retired:
                self._retire(kept)
