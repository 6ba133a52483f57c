"""A proxy for tests: CONNECT tunnels, and requests with a whole URL; it may ask for credentials, and speak TLS."""

import base64
import contextlib
import selectors
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Proxy:
    """A running proxy, and the requests that it has seen."""

    port: int
    #: "user:password" that clients must show; None: nothing.
    credentials: str | None
    #: First lines of requests to the proxy itself.
    asked: list[str] = field(default_factory=list)
    #: Bytes that clients sent through it.
    bytes_up: int = 0
    #: Both ends of each connection.
    open: list[tuple[socket.socket, socket.socket]] = field(default_factory=list)

    def cut(self) -> None:
        """Close all connections."""
        for pair in self.open:
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def serve(self, client: socket.socket) -> None:
        """Serve one client until one side ends."""
        head = b""
        while b"\r\n\r\n" not in head:
            piece = client.recv(65536)
            if not piece:
                return
            head += piece
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        self.asked.append(f"{method} {target}")
        if self.credentials is not None:
            shown = b"proxy-authorization: basic " + base64.b64encode(self.credentials.encode())
            if shown.lower() not in head.lower():
                client.sendall(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n")
                return
        netloc = target if method == "CONNECT" else urlsplit(target).netloc
        host, _, port = netloc.rpartition(":")
        with socket.create_connection((host, int(port)), 20) as server:
            self.open.append((client, server))
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Go on\r\n\r\n")
            else:
                server.sendall(head)
            self._pump(client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        """Carry bytes both ways."""
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    source: socket.socket = key.fileobj  # type: ignore[assignment]
                    data = source.recv(1 << 20)
                    while isinstance(source, ssl.SSLSocket) and source.pending():
                        data += source.recv(1 << 20)
                    if not data:
                        return
                    if source is client:
                        self.bytes_up += len(data)
                    key.data.sendall(data)


@contextlib.contextmanager
def proxy(*, credentials: str | None = None, certificate: str | None = None) -> Iterator[Proxy]:
    """Run a proxy on loopback. ``certificate``: PEM file with key and certificate, for one that speaks TLS."""
    threads: list[threading.Thread] = []
    context = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)

    def serve(peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer:
            if context is None:
                running.serve(peer)
            else:
                with context.wrap_socket(peer, server_side=True) as inner:
                    running.serve(inner)

    def accept() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(peer,)))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        running = Proxy(server.getsockname()[1], credentials)
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield running
        finally:
            server.shutdown(socket.SHUT_RDWR)
            accepting.join(20)
            running.cut()
            for each in threads:
                each.join(20)
            assert not any(each.is_alive() for each in threads)
