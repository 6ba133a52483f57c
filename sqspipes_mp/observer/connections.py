"""The connections of the server: bounded in number and in silence (the HTTP process).

uvicorn lets a client that sends nothing, or trickles, keep its connection for ever; enough of them would use up the
descriptors, and a probe would find no answer. Here such clients lose their place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

#: Connections at once; beyond them the one that has been without a request for longest makes room.
MOST = 256
#: Seconds within which a request is there, and within which its answer is taken.
_SILENCE, _ANSWER = 10.0, 60.0


class BoundedProtocol(H11Protocol):
    """One connection."""

    #: When it was made, or its latest answer was complete; seconds of the loop's clock.
    _idle_since: float
    _check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, and cut off another one where there are too many."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._check = self.loop.call_later(_SILENCE, self._look)
        if len(self.connections) > MOST:
            others: Iterable[Any] = self.connections
            idle = [each for each in others if each is not self and not each.busy]
            if idle:
                min(idle, key=lambda each: each._idle_since).transport.abort()
            else:
                transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._check is not None:
            self._check.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        limit = _SILENCE + _ANSWER if self.busy else _SILENCE
        left = self._idle_since + limit - self.loop.time()
        if left <= 0:
            self.transport.abort()
        else:
            self._check = self.loop.call_later(min(left, _SILENCE), self._look)
