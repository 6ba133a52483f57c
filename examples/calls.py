"""Ask a service that limits its rate, and refuses some items, for many answers; look at the refused, and go on.

::

    python calls.py serve                       # elsewhere: 50 calls a second, no answer for numbers that end in 13
    python calls.py ask 300                     # the answers go to calls.sqlite
    sqspipes-mp dead list calls:engine
    python calls.py serve --all                 # elsewhere, in its place: the service is mended
    sqspipes-mp dead redrive calls:engine --all
    python calls.py ask 300                     # nothing new is sent; the rest is done

Killed at any moment, ``kill -9`` included, ``ask`` goes on where it was.
"""

import json
import os
import sqlite3
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import urlopen

from sqspipes_mp import Engine, Reject, Retry, Task

ADDRESS = os.environ.get("CALLS_ADDRESS", "127.0.0.1:8765")
STORE = "calls.sqlite"


def fetch(number: int) -> dict[str, int]:
    """Ask the service about a number."""
    try:
        with urlopen(f"http://{ADDRESS}/{number}", timeout=10) as reply:
            answer: dict[str, int] = json.load(reply)
            return answer
    except HTTPError as error:
        if error.code == 429:
            # Not the item's fault: it comes again, and has used up no attempt.
            raise Retry(float(error.headers["Retry-After"]), charge=False) from error
        if error.code == 422:
            raise Reject(f"the service refuses {number}: {error.read().decode()}") from None
        # Anything else, a connection that breaks too, is tried again by on_error="retry".
        raise


class Store:
    """Writes an answer once, however often its message comes."""

    def __init__(self) -> None:
        self.database = sqlite3.connect(STORE, isolation_level=None)
        self.database.execute("CREATE TABLE IF NOT EXISTS answers (number PRIMARY KEY, square)")

    def __call__(self, answer: dict[str, int]) -> None:
        """Write a row."""
        self.database.execute("INSERT OR REPLACE INTO answers VALUES (:number, :square)", answer)

    def close(self) -> None:
        """Close the file at the worker's end."""
        self.database.close()


# 16 calls wait for the service at once, in one process.
engine = Engine(
    [Task(fetch, input=True, threads=16, timeout=60), Task(Store)],
    domain="calls",
    broker="sqlite:///calls.db",
    on_error="retry",
)


class Service(BaseHTTPRequestHandler):
    """The service: the square of a number."""

    lock = threading.Lock()
    #: When the next call is welcome, monotonic seconds.
    free = 0.0
    pause = 0.02
    refuses = True

    def do_GET(self) -> None:
        """Answer, or say when to come again."""
        number = int(self.path.strip("/"))
        with self.lock:
            now = time.monotonic()
            early = Service.free - now
            if early <= 0.2:
                Service.free = max(Service.free, now) + self.pause
        if early > 0.2:
            self._reply(429, b"too many", {"Retry-After": f"{early:.2f}"})
        elif self.refuses and number % 100 == 13:
            self._reply(422, b"unlucky")
        else:
            self._reply(200, json.dumps({"number": number, "square": number * number}).encode())

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def serve(refuses: bool) -> None:
    """Serve until Ctrl-C."""
    Service.refuses = refuses
    host, port = ADDRESS.split(":")
    with ThreadingHTTPServer((host, int(port)), Service) as server:
        print(f"serving on {host}:{server.server_port}", flush=True)
        server.serve_forever()


def ask(count: int) -> None:
    """Ask about so many numbers, of which those that were asked before are dropped by their key."""
    new = engine.put_many(range(count), key=str)
    summary = engine.run(until="drained", idle=0)
    answers, total = sqlite3.connect(STORE).execute("SELECT count(*), sum(square) FROM answers").fetchone()
    print(f"{new} new; {answers} answers, their sum is {total}; {summary.dead} refused")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(refuses="--all" not in sys.argv)
    elif sys.argv[1:2] == ["ask"]:
        ask(int(sys.argv[2]))
    else:
        sys.exit(__doc__)
