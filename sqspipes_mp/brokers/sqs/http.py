"""SQS's hot calls in a fraction of boto3's CPU: JSON over kept connections, signed here (any process with one open).

Knows only the ordinary case, and says ``Unsure`` to everything else; the caller then asks boto3 instead. Imports
neither boto3 nor botocore: credentials, endpoint and certificates are botocore's own, handed in. Wire: Amazon SQS
Developer Guide, "Making requests using the AWS JSON protocol"; signature: IAM User Guide, "AWS Signature Version 4".
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sqspipes_mp.brokers.sqs.http_reply import BadReply, Ended, Socket, Unsure, read, understood

OPERATIONS = frozenset(
    {"ReceiveMessage", "SendMessageBatch", "DeleteMessageBatch", "ChangeMessageVisibilityBatch"},
)
#: What botocore's standard mode tries again by itself, beside 5xx and lost connections.
_THROTTLING = frozenset(
    {"RequestThrottled", "RequestThrottledException", "Throttling", "ThrottlingException", "ThrottledException"}
)
#: Connections kept open: one for each request that a worker may have under way.
_KEPT = 50
#: Seconds before the second try, at most (botocore's standard mode: drawn from 0 to 1).
_PAUSE = 1.0


class Keys(Protocol):
    """Credentials as botocore freezes them."""

    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...
    @property
    def token(self) -> str | None: ...


class ConnectionClosedError(Exception):
    """The connection cannot be made or ended too early; named as botocore's, by which it is judged."""


class ReadTimeoutError(ConnectionClosedError):
    """No answer in time; named as botocore's."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to and as whom: what botocore resolved for this process."""

    host: str
    port: int
    tls: bool
    region: str
    keys: Callable[[], Keys]
    certificates: str | None = None
    user_agent: str = "sqspipes-mp"

    @property
    def authority(self) -> str:
        """The Host header: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class Signer:
    """Signs requests to SQS in one region; a day's key is derived once."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._known: tuple[str, str, bytes] = ("", "", b"")

    def headers(self, keys: Keys, authority: str, operation: str, body: bytes, when: time.struct_time) -> str:
        """Return the lines of the request's head that are signed, and the one with the signature."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", when)
        scope = f"{stamp[:8]}/{self._region}/sqs/aws4_request"
        fields = [("content-type", "application/x-amz-json-1.0"), ("host", authority), ("x-amz-date", stamp)]
        if keys.token:
            fields.append(("x-amz-security-token", keys.token))
        fields += [("x-amz-target", f"AmazonSQS.{operation}"), ("x-amzn-query-mode", "true")]
        signed = ";".join([name for name, _ in fields])
        lines = "".join([f"{name}:{value}\n" for name, value in fields])
        request = f"POST\n/\n\n{lines}\n{signed}\n{hashlib.sha256(body).hexdigest()}"
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        signature = hmac.digest(self._key(keys.secret_key, stamp[:8]), text.encode(), "sha256").hex()
        authorization = (
            f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
        )
        return "".join([f"{name}: {value}\r\n" for name, value in fields]) + f"authorization: {authorization}\r\n"

    def _key(self, secret: str, day: str) -> bytes:
        known = self._known
        if known[0] == secret and known[1] == day:
            return known[2]
        key = f"AWS4{secret}".encode()
        for part in (day, self._region, "sqs", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        self._known = (secret, day, key)
        return key


class Lean:
    """Makes hot calls, safe from several threads; ``tries`` in all where a failure may pass, as botocore does."""

    def __init__(self, target: Target, *, connect_timeout: float, tries: int) -> None:
        self._target = target
        self._signer = Signer(target.region)
        self._authority = target.authority
        self._connect_timeout = connect_timeout
        self._tries = tries
        self._idle: list[Socket] = []
        self._pid = os.getpid()
        self._closed = threading.Event()
        self._context: ssl.SSLContext | None = None

    def __call__(self, operation: str, params: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Make a call, each try within ``timeout`` seconds of silence.

        Raises ``BadReply``, ``ConnectionClosedError``, ``ReadTimeoutError``, ``Unsure``, and whatever botocore raises
        for credentials that cannot be had.
        """
        body = json.dumps(params, separators=(",", ":"), default=_blob).encode()
        tries = 0
        while True:
            tries += 1
            try:
                return self._once(operation, body, timeout)
            except _Stale:
                # The server closed it while it was idle: nobody's failure. A send may have been done all the same,
                # and is repeated no more often than botocore would.
                if operation != "SendMessageBatch":
                    tries -= 1
                elif tries >= self._tries:
                    raise ConnectionClosedError("the server closed the connection") from None
            except ConnectionClosedError:
                if tries >= self._tries:
                    raise
                self._closed.wait(random.uniform(0, _PAUSE))
            except BadReply as error:
                if tries >= self._tries or not _may_pass(error):
                    raise
                self._closed.wait(random.uniform(0, _PAUSE))

    def close(self) -> None:
        """Close the sockets; one in use closes when its call ends."""
        self._closed.set()
        self._drop_idle()

    def _once(self, operation: str, body: bytes, timeout: float) -> dict[str, Any]:
        keys = self._target.keys()
        shown = keys.access_key + (keys.token or "")
        if not keys.access_key or not keys.secret_key or not shown.isascii() or not shown.isprintable() or " " in shown:
            raise Unsure("the credentials are of an unknown kind")
        head = self._signer.headers(keys, self._authority, operation, body, time.gmtime())
        request = (
            f"POST / HTTP/1.1\r\n{head}user-agent: {self._target.user_agent}\r\naccept-encoding: identity\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode("ascii")
        sock = self._take()
        reused = sock is not None
        if sock is None:
            sock = self._connect()
        keep = False
        try:
            sock.settimeout(timeout)
            # In one piece while it is small: two writes would wait for each other's acknowledgement.
            sock.sendall(request + body)
            status, fields, content = read(sock)
            keep = fields.get(b"connection", b"").lower() != b"close"
        except TimeoutError:
            raise ReadTimeoutError(f"no answer within {timeout:g} s") from None
        except Ended as error:
            if reused and not error.begun:
                raise _Stale from None
            raise ConnectionClosedError("the connection was closed before the reply was complete") from None
        except OSError as error:
            if reused and isinstance(error, ConnectionError | ssl.SSLEOFError):
                raise _Stale from None
            raise ConnectionClosedError(str(error)) from error
        finally:
            if keep:
                self._give(sock)
            else:
                _close(sock)
        return understood(status, fields, content)

    def _connect(self) -> Socket:
        target = self._target
        try:
            sock: Socket = socket.create_connection((target.host, target.port), self._connect_timeout)
        except OSError as error:
            raise ConnectionClosedError(f"{target.authority}: {error}") from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if target.tls:
                sock = self._tls().wrap_socket(sock, server_hostname=target.host)
        except ssl.SSLCertVerificationError as error:
            _close(sock)
            raise Unsure(f"the certificate of {target.authority}: {error.verify_message}") from error
        except OSError as error:
            _close(sock)
            raise ConnectionClosedError(f"{target.authority}: {error}") from error
        return sock

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            context = ssl.create_default_context(cafile=self._target.certificates)
            context.set_alpn_protocols(["http/1.1"])
            self._context = context
        return self._context

    def _take(self) -> Socket | None:
        """Take an idle connection that the server has not closed meanwhile."""
        if self._pid != os.getpid():
            # Forked: these are the parent's. Closing the copies ends nothing there.
            self._drop_idle()
            self._pid = os.getpid()
        while True:
            try:
                sock = self._idle.pop()
            except IndexError:
                return None
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            if not poll.poll(0):
                return sock
            # Readable though nothing was asked: closed, or out of step.
            _close(sock)

    def _give(self, sock: Socket) -> None:
        if len(self._idle) >= _KEPT or self._pid != os.getpid():
            _close(sock)
            return
        self._idle.append(sock)
        if self._closed.is_set():
            self._drop_idle()

    def _drop_idle(self) -> None:
        while True:
            try:
                _close(self._idle.pop())
            except IndexError:
                return


class _Stale(Exception):
    """A kept connection turned out to be closed."""


def _blob(value: object) -> str:
    """Return the JSON form of what JSON has none for: the bytes of a Binary attribute."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"no JSON for a {type(value).__name__}")


def _close(sock: Socket) -> None:
    with contextlib.suppress(OSError):
        sock.close()


def _may_pass(error: BadReply) -> bool:
    return error.status >= 500 or error.status == 429 or error.code in _THROTTLING
