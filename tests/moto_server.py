"""moto's SQS in a process of its own, on a free loopback port.

``with moto_server() as url:`` for tests. The process ends with the ``with``, and by itself when its starter dies.
It is no measure of SQS's speed: its receive looks at every message of the queue, so keep backlogs below a hundred.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: What a process needs so that it can never reach AWS: dummy credentials, and no metadata service to look for others.
HARMLESS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """Start moto's server, yield its URL, stop it."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **HARMLESS},
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"moto's server did not start (exit code {server.wait(40)}): pip install 'moto[server]'")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stdin.close()
        server.terminate()
        server.wait(40)
        server.stdout.close()


def _receive_in_turn() -> None:
    """Have one receive at a time pick its messages: moto's threads give the same message to two of them."""
    from moto.sqs.models import SQSBackend  # noqa: PLC0415  (large, and read by the server alone)

    pick, turn = SQSBackend.receive_message, threading.Lock()

    def receive(backend: Any, queue: str, count: int, wait: float, *rest: Any) -> Any:
        until = time.monotonic() + wait
        while True:
            with turn:
                found = pick(backend, queue, count, 0, *rest)
            if found or time.monotonic() >= until:
                return found
            backend.get_queue(queue).wait_for_messages(1)

    SQSBackend.receive_message = receive  # type: ignore[assignment,method-assign]


def _serve() -> None:
    from moto.server import ThreadedMotoServer  # noqa: PLC0415  (large, and read by the server alone)

    _receive_in_turn()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
