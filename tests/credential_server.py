"""The credential endpoint of a container, on a free loopback port, in a process of its own or in this one.

As a program: ``python credential_server.py LOG SECONDS`` prints its port, writes a line per request to LOG, and ends
when its standard input closes.
"""

import contextlib
import datetime as dt
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def serve(lives: float, note: Callable[[str], None], secret: str) -> ThreadingHTTPServer:
    """Make a server whose credentials live for so many seconds and are other ones at every request."""
    count = iter(range(1, 1_000_000))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            expires = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=lives)
            key = f"AKIA{next(count):04}"
            note(key)
            body = json.dumps(
                {
                    "AccessKeyId": key,
                    "SecretAccessKey": secret,
                    "Token": f"{secret}-token",
                    "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@contextlib.contextmanager
def serving(
    lives: float,
    before: Callable[[str], None] | None = None,
    secret: str = "secret",  # noqa: S107
) -> Iterator[tuple[str, list[str]]]:
    """Serve from a thread; yields the URL and the keys given out. ``before``: called with a key before it is."""
    given: list[str] = []

    def note(key: str) -> None:
        if before is not None:
            before(key)
        given.append(key)

    server = serve(lives, note, secret)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/creds", given
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def serving_apart(log: Path, lives: float) -> Iterator[str]:
    """Serve from another process; yields the URL."""
    server = subprocess.Popen(
        [sys.executable, __file__, str(log), str(lives)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}/creds"
    finally:
        server.stdin.close()
        server.wait(30)
        server.stdout.close()


def _main() -> None:
    path, lives = sys.argv[1], float(sys.argv[2])

    def note(key: str) -> None:
        with Path(path).open("a") as log:
            log.write(f"{key}\n")

    server = serve(lives, note, "secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _main()
