"""Sends an order to a running engine and waits for the answer (any process).

A line of JSON each way on its socket: ``{"id": 1, "do": "stop"}`` gets ``{"id": 1, "ok": true, ...}`` or
``{"id": 1, "error": ...}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from sqspipes_mp.ipc.running.folders import Engine, Unanswered, open_folder
from sqspipes_mp.ipc.running.served import Served

#: Seconds that an answer may take; the supervisor answers within a turn, ``stack`` within its own time.
PATIENCE = 15.0
#: Most bytes of an answer.
_MOST = 8 << 20


def ask(engine: Engine, order: Mapping[str, object], patience: float = PATIENCE) -> dict[str, Any]:
    """Return the answer to an order. Raises ``Unanswered``; ``patience``: seconds."""
    if isinstance(engine, Served):
        return engine.ask(order, patience)
    with _connected(engine, patience) as sock:
        answer, fds = _exchange(sock, order)
    for fd in fds:
        os.close(fd)
    return answer


def ask_for_statistics(engine: Engine, patience: float = PATIENCE) -> int:
    """Return a read-only descriptor of the engine's statistics, which is the caller's to close."""
    with _connected(engine, patience) as sock:
        _, fds = _exchange(sock, {"do": "statistics"})
    if not fds:
        raise Unanswered("the engine sent no statistics")
    for fd in fds[1:]:
        os.close(fd)
    return fds[0]


@contextlib.contextmanager
def _connected(engine: Engine, patience: float) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patience)
        try:
            folder = open_folder(engine.folder)
            try:
                sock.connect(socket_path(folder, engine.folder, engine.run))
            finally:
                os.close(folder)
            yield sock
        except OSError as error:
            # The supervisor stands still, or has just ended.
            raise Unanswered(f"no answer from pid {engine.number('pid')}: {error}") from error


def socket_path(folder: int, path: str, run: str) -> str:
    """Return a path of a run's socket that fits into an address (107 bytes; unix(7)).

    ``folder``: an open descriptor of the folder at ``path``.
    """
    link = f"/proc/self/fd/{folder}"
    return f"{link if os.path.exists(link) else path}/{run}.sock"


def _exchange(sock: socket.socket, order: Mapping[str, object]) -> tuple[dict[str, Any], list[int]]:
    sock.sendall(json.dumps({"id": 1, **order}).encode() + b"\n")
    raw, fds = bytearray(), []
    while not raw.endswith(b"\n") and len(raw) < _MOST:
        data, more, _, _ = socket.recv_fds(sock, 1 << 16, 4)
        fds += more
        if not data:
            break
        raw += data
    try:
        answer = json.loads(raw)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and answer.get("ok") is True:
        return answer, fds
    for fd in fds:
        os.close(fd)
    raise Unanswered(str(answer.get("error")) if isinstance(answer, dict) else "the engine ended before it answered")
