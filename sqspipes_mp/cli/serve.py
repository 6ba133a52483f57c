"""``sqspipes-mp serve``: HTTP for engines that were started without it (the command line's process).

One server for all engines of this user here, found by the registry: a sidecar that shares its folder, say.
"""

from __future__ import annotations

from argparse import Namespace

from sqspipes_mp.caller.http import http_address
from sqspipes_mp.cli.console import Console
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.host.listening import address_of, listen


def serve(flags: Namespace, console: Console) -> Exit:
    """Serve until a signal comes. Raises ``Refused`` and ``ConfigError``."""
    address = http_address(flags.http, "--http")
    if address is None:
        raise Refused("--http must name an address: 127.0.0.1:8090")
    from sqspipes_mp.observer.registered import serve_registered  # noqa: PLC0415  (only with the extra)

    try:
        sock = listen(address.host, address.port)
    except OSError as error:
        raise Refused(f"{address.field}={address.text}: {error.strerror or error}", Exit.FAILED) from None
    with sock:
        console.say(f"metrics, health and state of this user's engines are at http://{address_of(sock)}/")
        serve_registered(sock, flags.target)
    return Exit.DONE
