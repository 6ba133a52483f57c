"""Serves one socket until the process, or who asked for it, ends (the HTTP process)."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from sqspipes_mp.ipc.running.http_token import token
from sqspipes_mp.observer.access import Access
from sqspipes_mp.observer.connections import BoundedProtocol


def access_to(sock: socket.socket) -> Access:
    """Return the rules for who reaches a socket."""
    return Access(str(sock.getsockname()[0]), token())


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals alone, and ends when ``over`` says so."""

    def __init__(self, app: ASGIApp, over: Callable[[], bool]) -> None:
        # Each bad request would be a line of the log.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        super().__init__(
            uvicorn.Config(
                app, http=BoundedProtocol, loop="asyncio", ws="none", lifespan="off", log_config=None,
                access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        self._over = over

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signal."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Tell whether to end; called every 0.1 s."""
        return self._over() or await super().on_tick(counter)
