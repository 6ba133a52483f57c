"""The stand-in's process. It prints its port, and ends with its standard input: with the process that started it."""

import asyncio
import gc
import os
import sys
import threading

from standin.connection import Connection, Gate
from standin.control import Control
from standin.manage import MANAGE
from standin.options import Options, parse
from standin.receive import RECEIVE
from standin.send import SEND
from standin.service import Service


async def serve(options: Options) -> None:
    """Serve until the process ends."""
    service, gate = Service(options, {**MANAGE, **SEND, **RECEIVE}), Gate()
    control = Control(service, gate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(service, gate, control), "127.0.0.1", options.port, backlog=1024
    )
    options.port = server.sockets[0].getsockname()[1]
    print(options.port, flush=True)
    await server.serve_forever()


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    # Hundreds of thousands of messages live long and make no cycles, so the collector is run seldom.
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    asyncio.run(serve(parse(sys.argv[1:])))
