"""Opens a socket that listens for TCP connections (supervisor, the command line)."""

from __future__ import annotations

import socket

#: Connections that wait to be accepted; while the HTTP process is started again they wait here.
_BACKLOG = 256


def listen(host: str, port: int) -> socket.socket:
    """Listen at a host's first address; an empty host: every interface. ``port`` 0: one that is free.

    Raises ``OSError``: the port is taken or not allowed, or the host is no name of this machine.
    """
    if host:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return socket.create_server((str(where[0]), int(where[1])), family=family, backlog=_BACKLOG)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", port), backlog=_BACKLOG)


def address_of(sock: socket.socket) -> str:
    """Return where a socket listens, as the host and port of a URL; every interface is told as localhost."""
    host, port = sock.getsockname()[:2]
    if host in {"", "::", "0.0.0.0"}:  # noqa: S104  (compared, not bound)
        host = "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
