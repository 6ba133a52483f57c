"""The stand-in's process. It prints its ports, and ends with its standard input: with the process that started it."""

import asyncio
import gc
import os
import ssl
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
    ports = [options.port]
    if options.certificate:
        secured = await loop.create_server(
            lambda: Connection(service, gate, control), "127.0.0.1", ssl=_context(options), backlog=1024
        )
        ports.append(secured.sockets[0].getsockname()[1])
    print(*ports, flush=True)
    await server.serve_forever()


def _context(options: Options) -> ssl.SSLContext:
    """Return the server's side of TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(options.certificate)
    if options.client_bundle:
        context.load_verify_locations(options.client_bundle)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


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
