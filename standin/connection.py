"""HTTP/1.1 with keep-alive: bytes become requests, replies become bytes; one request at a time on a connection."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from standin.errors import SqsError
from standin.faults import Fate
from standin.service import Call, Count, Service

_TARGET = b"x-amz-target: amazonsqs."
_JSON = "Content-Type: application/x-amz-json-1.0\r\n"
#: Most bytes of a request's body; SQS's largest batch, escaped, stays below it.
_MOST_BYTES = 16 * 1_048_576
#: Pieces of a slow reply, and seconds between two of them.
_DROPS = 10
_DROP_SECONDS = 0.02


@dataclass(slots=True)
class Gate:
    """The gate before every answer. While it is closed, the stand-in reads requests and answers none."""

    closed: bool = False
    held: list[Callable[[], None]] = field(default_factory=list)

    def pass_through(self, do: Callable[[], None]) -> None:
        """Do something now, or once the gate is open."""
        if self.closed:
            self.held.append(do)
        else:
            do()

    def open(self) -> None:
        """Open the gate; do everything that was held."""
        self.closed = False
        held, self.held = self.held, []
        for do in held:
            do()


class Connection(asyncio.Protocol):
    """One client's connection. ``control``: answers requests under ``/-/``, given method, path and body."""

    def __init__(self, service: Service, gate: Gate, control: Callable[[str, str, bytes], str]) -> None:
        self._service = service
        self._gate = gate
        self._control = control
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._busy = False
        self._call: Call | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (asyncio's signature)
        self._transport = None
        call, self._call = self._call, None
        if call is not None and call.withdraw is not None and not self._service.options.ghost_polls:
            call.withdraw()
            self._service.count(call.operation).under_way -= 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._busy:
            self._next()

    def _next(self) -> None:
        """Handle the next request, if all of it has come."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[: end + 2])
        low = head.lower()
        length = int(_header(low, low, b"\r\ncontent-length:") or 0)
        if length > _MOST_BYTES:
            self._reset()
            return
        stop = end + 4 + length
        if len(self._buffer) < stop:
            if b"\r\nexpect: 100-continue" in low and len(self._buffer) == end + 4 and self._transport is not None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        body = bytes(self._buffer[end + 4 : stop])
        del self._buffer[:stop]
        self._busy = True
        method, path, _ = head.split(b" ", 2)
        if path.startswith(b"/-/"):
            self._answer_control(method.decode(), path.decode(), body)
            return
        self._gate.pass_through(lambda: self._begin(head, low, body))

    def _begin(self, head: bytes, low: bytes, body: bytes) -> None:
        """Decide the fate of a request and hand it to the service."""
        service = self._service
        start = low.find(_TARGET) + len(_TARGET)
        operation = head[start : low.find(b"\r", start)].decode() if start >= len(_TARGET) else ""
        count = service.begins(operation)
        count.bytes_in += len(head) + 2 + len(body)
        fate = service.dice.fate(operation)
        if fate.reset_before:
            count.under_way -= 1
            self._reset()
            return
        call = Call(operation, {}, fate, lambda reply: self._reply(call, reply))
        self._call = call
        try:
            call.request = json.loads(body or b"{}")
        except ValueError:
            call.reply(SqsError("InvalidParameterValueException", "The request is no JSON."))
            return
        service.call(call, _header(head, low, b"\r\nauthorization:"))

    def _reply(self, call: Call, reply: str | SqsError) -> None:
        self._call = None
        if isinstance(reply, SqsError):
            body = reply.body.encode()
            first = f"{reply.status} Error\r\nx-amzn-query-error: {reply.code};{reply.fault}"
        else:
            body = reply.encode()
            first = "200 OK"
        number = self._service.count(call.operation)
        number.bytes_out += len(body)
        head = (
            f"HTTP/1.1 {first}\r\nx-amzn-RequestId: r-{number.requests}\r\nDate: {self._service.clock.date()}\r\n"
            f"{_JSON}Content-Length: {len(body)}\r\n\r\n"
        )
        data = head.encode() + body
        if call.fate.delay:
            loop = asyncio.get_running_loop()
            loop.call_later(call.fate.delay, self._gate.pass_through, lambda: self._send(data, call.fate, number))
        else:
            self._gate.pass_through(lambda: self._send(data, call.fate, number))

    def _send(self, data: bytes, fate: Fate, number: Count) -> None:
        number.under_way -= 1
        number.last = time.monotonic()
        if fate.lost_reply:
            self._reset()
        elif fate.slow:
            self._drip(data, max(1, len(data) // _DROPS))
        elif self._transport is not None:
            self._transport.write(data)
            self._done()

    def _drip(self, data: bytes, size: int) -> None:
        """Write a reply in pieces."""
        if self._transport is None:
            return
        self._transport.write(data[:size])
        if len(data) > size:
            asyncio.get_running_loop().call_later(_DROP_SECONDS, self._drip, data[size:], size)
        else:
            self._done()

    def _done(self) -> None:
        self._busy = False
        if self._buffer:
            self._next()

    def _answer_control(self, method: str, path: str, body: bytes) -> None:
        try:
            status, text = "200 OK", self._control(method, path, body)
        except (ValueError, KeyError, TypeError) as error:
            status, text = "400 Bad Request", json.dumps({"error": repr(error)})
        data = text.encode()
        if self._transport is not None:
            self._transport.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        self._done()

    def _reset(self) -> None:
        """Close the connection with a reset."""
        if self._transport is not None:
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._transport.abort()


def _header(head: bytes, low: bytes, name: bytes) -> str:
    """Return a header's value, "" without one.

    ``low``: the head in lower case; ``name``: from the line end before it to its colon, in lower case.
    """
    start = low.find(name)
    if start < 0:
        return ""
    start += len(name)
    return head[start : low.find(b"\r", start)].decode("latin-1").strip()
