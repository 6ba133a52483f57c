"""Serves all engines that are registered, as they come and go: ``sqspipes-mp serve`` (the command line's process)."""

from __future__ import annotations

import asyncio
import signal
import socket

from sqspipes_mp.observer.app import Observer
from sqspipes_mp.observer.looked import Registered
from sqspipes_mp.observer.server import Server, access_to

#: Seconds between two looks into the registry.
_EVERY = 1.0


def serve_registered(sock: socket.socket, target: str | None) -> None:
    """Serve until SIGINT or SIGTERM; ``target``: only the engines that a person means, as of ``folders.matches``."""
    asyncio.run(_serve(sock, Registered(target)))


async def _serve(sock: socket.socket, registered: Registered) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    there = await asyncio.to_thread(registered.find)
    observer = Observer(lambda: there, access_to(sock))

    async def follow() -> None:
        while True:
            await asyncio.sleep(_EVERY)
            # Not here: an engine whose supervisor stands still answers late.
            found = await asyncio.to_thread(registered.find)
            for gone in [each for each in there if each not in found]:
                observer.collector.ended(gone)
                registered.forget(gone)
            there[:] = found

    following = asyncio.create_task(follow())
    await Server(observer.app(), lambda: stopped.is_set() or following.done()).serve([sock])
    following.cancel()
    if following.done() and not following.cancelled():
        # It never ends by itself.
        following.result()
