"""The control socket: orders of people, a line of JSON each, in the supervisor's one wait (supervisor).

A client disturbs nobody: nothing blocks, lines and answers are bounded, and who is silent is cut off. ``orders`` has
the orders.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import logging
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from sqspipes_mp.host import fork_guard as forks
from sqspipes_mp.ipc.running.asking import socket_path
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.registration import Registration

log = logging.getLogger("sqspipes_mp.supervisor")

#: Clients at once.
_CLIENTS = 16
#: Seconds after which a client that sends nothing is cut off.
_SILENCE = 5.0
#: Most bytes of an order, and of answers that a client has not read.
_LINE, _UNREAD = 65_536, 8 << 20
#: Bytes of unread answers from which no more orders of a client are read, and its orders that may wait for an answer.
_SLOW, _PENDING = 65_536, 8
#: Bytes read from one client per turn, so that a flood does not hold up the turn.
_BUDGET = 4096
#: Seconds without listening where the process has no descriptor left.
_PAUSE = 1.0
# Without this flag a write to a client that is gone kills a process that has reset SIGPIPE (macOS has no such flag).
_SEND_FLAGS: int = getattr(socket, "MSG_NOSIGNAL", 0)
#: The reach of each order, said in its answer.
REACH = "this engine, until it ends; other machines go on"

#: Carries an order out: its keys, and where the answer goes, at once or in a later turn.
Carry = Callable[[dict[str, Any], "Client"], None]


class Refused(Exception):
    """The order is not carried out; the text says why."""


class Client:
    """One client of the socket. It is told of each order by ``answer`` or ``refuse``, once."""

    def __init__(self, control: Control, sock: socket.socket, *, patient: bool = False) -> None:
        self._control = control
        self.sock = sock
        #: Whether its silence is borne (the engine's own caller).
        self.patient = patient
        #: Orders whose answers are still to come.
        self.pending = 0
        #: When it last sent something or took an answer, monotonic seconds.
        self.heard_at = time.monotonic()
        self.read = bytearray()
        self.unsent = bytearray()
        self.closed = self.half_closed = False

    def answer(self, ident: object, descriptor: int | None = None, **keys: object) -> None:
        """Answer the order ``ident``, with a read-only descriptor where one was asked for."""
        self._reply({"id": ident, "ok": True, **keys, "reach": REACH}, descriptor)

    def refuse(self, ident: object, why: str) -> None:
        """Say why the order ``ident`` is not carried out."""
        self._reply({"id": ident, "error": why}, None)

    def _reply(self, keys: dict[str, object], descriptor: int | None) -> None:
        self.pending -= 1
        self.heard_at = time.monotonic()
        if not self.closed:
            self._control.send(self, json.dumps(keys).encode() + b"\n", descriptor)


class Control:
    """The socket and its clients."""

    def __init__(self, events: Events, carry: Carry) -> None:
        self._events = events
        self._carry = carry
        self._listener: socket.socket | None = None
        self._clients: list[Client] = []
        #: When to listen again, monotonic seconds.
        self._listen_at = math.inf
        forks.protect(self)

    def listen(self, registration: Registration) -> None:
        """Take orders beside a run's description; where that cannot be, the run goes on without."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.setblocking(False)
            # Nobody else gets into the folder; the mode only says so.
            path = socket_path(registration.folder, registration.path, registration.run)
            listener.bind(path)
            os.chmod(path, 0o600)  # noqa: PTH101  (a path through a descriptor)
            listener.listen(_CLIENTS)
        except OSError as error:
            listener.close()
            log.warning("this run takes no orders: its socket in %s: %s", registration.path, error)
            return
        self._listener = listener
        self._events.connect(listener, self._accept)

    def adopt(self, sock: socket.socket) -> None:
        """Take orders from a socket of the engine's own program, which may be silent."""
        self._add(sock, patient=True)

    def deadline(self) -> float:
        """Return when ``look`` is due, monotonic seconds."""
        silent = [client.heard_at + _SILENCE for client in self._clients if not (client.patient or client.pending)]
        return min([self._listen_at, *silent])

    def look(self, now: float) -> None:
        """Cut off those who are silent at ``now`` (monotonic seconds)."""
        for client in list(self._clients):
            if not (client.patient or client.pending) and now >= client.heard_at + _SILENCE:
                self._drop(client)
        if now >= self._listen_at and self._listener is not None:
            self._listen_at = math.inf
            self._events.connect(self._listener, self._accept)

    def close(self) -> None:
        """Close the socket and its clients in this process."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        for client in self._clients:
            client.closed = True
            client.sock.close()
        self._clients.clear()

    def hold(self, patience: float) -> None:
        """Do nothing before a fork."""

    def resume(self, *, child: bool) -> None:
        """Close everything in a forked ``child``: else a client would miss the supervisor's end."""
        if child:
            self.close()

    # -- clients ------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                # It would be readable at once again.
                self._events.hang_up(self._listener)
                self._listen_at = time.monotonic() + _PAUSE
            return
        if len(self._clients) >= _CLIENTS or not _is_ours(sock):
            sock.close()
            return
        self._add(sock, patient=False)

    def _add(self, sock: socket.socket, *, patient: bool) -> None:
        sock.setblocking(False)
        client = Client(self, sock, patient=patient)
        self._clients.append(client)
        self._events.connect(sock, lambda: self._serve(client))

    def _serve(self, client: Client) -> None:
        self._flush(client)
        if client.closed or client.half_closed:
            return
        try:
            data = client.sock.recv(_BUDGET)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(client)
            return
        if not data:
            client.half_closed = True
            if not (client.pending or client.unsent):
                self._drop(client)
            else:
                self._events.listen_for(client.sock, read=False, write=bool(client.unsent))
            return
        client.heard_at = time.monotonic()
        client.read += data
        while not client.closed and (end := client.read.find(b"\n")) >= 0:
            line = bytes(client.read[:end])
            del client.read[: end + 1]
            self._take(client, line)
        if len(client.read) > _LINE:
            client.pending += 1
            client.refuse(None, f"an order has at most {_LINE} bytes")
            self._drop(client)

    def _take(self, client: Client, line: bytes) -> None:
        client.pending += 1
        try:
            order = json.loads(line)
        except (ValueError, RecursionError):
            order = None
        if not isinstance(order, dict) or not isinstance(order.get("do"), str):
            client.refuse(None, 'an order is a JSON object a line: {"id": 1, "do": "stop"}')
            return
        if client.pending > _PENDING:
            client.refuse(order.get("id"), f"at most {_PENDING} orders wait for their answers")
            return
        try:
            self._carry(order, client)
        except Refused as why:
            client.refuse(order.get("id"), str(why))
        except Exception:
            # The run is not to end for an order of somebody who looks.
            log.exception("the order %.200s could not be carried out", order)
            client.refuse(order.get("id"), "an error of the engine's own; its log has it")

    def send(self, client: Client, line: bytes, descriptor: int | None) -> None:
        """Send as much of an answer as the client takes, and the rest when it takes more."""
        if descriptor is not None and not client.unsent:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
            with contextlib.suppress(OSError):
                line = line[client.sock.sendmsg([line], rights, _SEND_FLAGS) :]
        client.unsent += line
        self._flush(client)

    def _flush(self, client: Client) -> None:
        try:
            while client.unsent:
                del client.unsent[: client.sock.send(client.unsent, _SEND_FLAGS)]
                client.heard_at = time.monotonic()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._drop(client)
            return
        if len(client.unsent) > _UNREAD or (client.half_closed and not (client.unsent or client.pending)):
            self._drop(client)
        else:
            ready = not client.half_closed and len(client.unsent) < _SLOW
            self._events.listen_for(client.sock, read=ready, write=bool(client.unsent))

    def _drop(self, client: Client) -> None:
        if not client.closed:
            client.closed = True
            self._events.hang_up(client.sock)
            client.sock.close()
            self._clients.remove(client)


def _is_ours(sock: socket.socket) -> bool:
    """Tell whether a client is this user, or root, where the system says so; the folder's mode keeps others out."""
    if not sys.platform.startswith("linux"):
        return True
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", raw)[1] in {0, os.geteuid()}
