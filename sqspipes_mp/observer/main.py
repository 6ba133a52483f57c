"""The program of a run's HTTP process; ``supervisor/http_process.py`` starts it (the HTTP process)."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Sequence

from sqspipes_mp.host.parent import end_with_parent
from sqspipes_mp.ipc.running import health
from sqspipes_mp.observer.app import Observer
from sqspipes_mp.observer.looked import Looked
from sqspipes_mp.observer.server import Server, access_to


def main(arguments: Sequence[str]) -> None:
    """Serve until the supervisor ends.

    Args:
        arguments: descriptor of the statistics, descriptor of the listening socket, the run's id, the registry's
            folder (empty: none), seconds of the supervisor's silence from which the engine does not live, its pid.
    """
    statistics, listening, run, folder, silence, parent = arguments
    # They are sent to whole groups; the engine drains meanwhile, and is to be seen doing so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    if not end_with_parent(int(parent)):
        return
    health.SILENCE = float(silence)
    looked = Looked.inherited(int(statistics), run, folder)
    os.close(int(statistics))
    sock = socket.socket(fileno=int(listening))
    asyncio.run(_serve(looked, sock, int(parent)))


async def _serve(looked: Looked, sock: socket.socket, parent: int) -> None:
    observer = Observer(lambda: [looked], access_to(sock))
    await Server(observer.app(), lambda: os.getppid() != parent).serve([sock])
