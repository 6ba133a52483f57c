"""The lean HTTP path: SQS's four hot calls in a fraction of boto3's CPU (any process with a connection open).

JSON over kept connections. The path knows the ordinary replies only and raises ``Unsure`` for any other; the call is
boto3's then. ``Target`` has the credentials and the endpoint that botocore resolved; connections, TLS and proxies are
urllib3's (``http_connect``). Wire: Amazon SQS Developer Guide, "Making requests using the AWS JSON protocol";
signature: IAM User Guide, "AWS Signature Version 4".

Own code buys these microseconds of CPU per call, of which a message takes 0.3 (``python -m benchmarks.requests
--certificate``: batches of ten, one kept connection, loopback, Python 3.11, urllib3 2.8, botocore 1.44):

======================================  ===========  ========
way                                     plain HTTP   over TLS
======================================  ===========  ========
this module                             62           73
urllib3's requests and replies          180          203
``botocore.auth.SigV4Auth``             121          134
boto3                                   534          558
======================================  ===========  ========

A message may cost the engine 130 microseconds: urllib3's requests would take 27 % of them more, botocore's signature
14 %.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import random
import select
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from sqspipes_mp.brokers.sqs.faults import CallFailed, Fault, classify_code, malformed, malformed_reply, no_keys
from sqspipes_mp.brokers.sqs.http_connect import Connector, Socket, Unreachable
from sqspipes_mp.brokers.sqs.long_polls import Cut, LongPolls

#: The operations that the path makes.
OPERATIONS = frozenset(
    {"ReceiveMessage", "SendMessageBatch", "DeleteMessageBatch", "ChangeMessageVisibilityBatch"},
)
#: Error codes that are tried again here, as botocore's standard mode does, beside 5xx and lost connections.
_THROTTLING = frozenset(
    {"RequestThrottled", "RequestThrottledException", "Throttling", "ThrottlingException", "ThrottledException"}
)
#: Error codes of signatures and clocks, which are left to boto3: it may know better, and users can look its answer up.
_SIGNATURE_CODES = frozenset(
    {
        "IncompleteSignature",
        "InvalidSignatureException",
        "RequestExpired",
        "RequestInTheFuture",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)
#: Most connections kept open: one for each request that a worker may have under way.
_KEPT = 50
#: Longest pause before the second try, seconds (botocore's standard mode draws from 0 to 1).
_PAUSE = 1.0
#: Most bytes of a reply's head and of its body. Ten messages of 1 MiB in all stay below it with every byte escaped.
_MOST_HEAD = 64 << 10
_MOST_BODY = 16 << 20
#: Most digits of a content-length; int() refuses thousands.
_MOST_DIGITS = 20
#: Bytes of one read.
_CHUNK = 256 << 10


class Keys(Protocol):
    """Credentials as botocore freezes them."""

    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...
    @property
    def token(self) -> str | None: ...


class TimedOut(Unreachable):
    """No answer in time."""

    def __init__(self, text: str) -> None:
        super().__init__(text, code="ReadTimeoutError")


class BadReply(CallFailed):
    """SQS answered with an error."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(Fault(classify_code(code, message, status=status), code, message))
        self.code, self.status = code, status


class Malformed(CallFailed):
    """The reply cannot be SQS's."""

    def __init__(self, text: str) -> None:
        super().__init__(malformed_reply(text))


class Unsure(Exception):
    """Not the ordinary case: this call and all later ones are boto3's."""


class TooLong(Unsure):
    """A reply that is too long for the path: this call is boto3's, later ones are not."""


class _Ended(Exception):
    """The connection ended within a reply; ``begun``: whether any byte of the reply had come."""

    def __init__(self, *, begun: bool) -> None:
        super().__init__()
        self.begun = begun


class _Stale(Exception):
    """A kept connection had been closed by the server."""


@dataclass(frozen=True, slots=True)
class Target:
    """Endpoint and credentials, as botocore resolved them for this process."""

    connect: Connector
    region: str
    #: Returns the current credentials; botocore refreshes them in it.
    keys: Callable[[], Keys]
    user_agent: str = "sqspipes-mp"


class Signer:
    """Signs requests to SQS in one region; the key of a day is derived once."""

    def __init__(self, region: str) -> None:
        self._region = region
        #: Secret key and day, and the key derived from both. One tuple: threads read and replace it whole.
        self._known: tuple[str, str, bytes] = ("", "", b"")

    def headers(self, keys: Keys, authority: str, operation: str, body: bytes, when: time.struct_time) -> str:
        """Return the signed lines of a request's head, and the line with the signature."""
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
        """Return the signing key of a secret key and a day."""
        known = self._known
        if known[0] == secret and known[1] == day:
            return known[2]
        key = f"AWS4{secret}".encode()
        for part in (day, self._region, "sqs", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        self._known = (secret, day, key)
        return key


class Lean:
    """Makes hot calls for any thread.

    ``connect_timeout``: seconds; ``tries``: most tries of a call whose failure may pass, as botocore's; ``opened``:
    called with each new socket.
    """

    def __init__(
        self, target: Target, *, connect_timeout: float, tries: int, opened: Callable[[Socket], None] | None = None
    ) -> None:
        self._target = target
        self._signer = Signer(target.region)
        connect = target.connect
        self._authority = connect.authority
        fields = {"user-agent": target.user_agent, "accept-encoding": "identity"}
        if connect.forwards:
            fields |= connect.proxy_headers
        #: First line and unsigned fields of each request's head.
        self._first = f"POST {f'http://{connect.authority}' if connect.forwards else ''}/ HTTP/1.1\r\n"
        self._fields = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
        self._connect_timeout = connect_timeout
        self._tries = tries
        self._idle: list[Socket] = []
        self._opened = opened
        self._closed = threading.Event()

    def __call__(
        self, operation: str, params: Mapping[str, Any], timeout: float, polls: LongPolls | None = None
    ) -> dict[str, Any]:
        """Make a call; return the reply.

        Args:
            operation: one of ``OPERATIONS``.
            params: the request.
            timeout: seconds without a byte after which a try fails.
            polls: for a long poll: may cut it off. Then ``Cut`` is raised, unless a reply is on its way.

        Raises ``CallFailed`` (``BadReply``, ``Unreachable``, ``TimedOut``, and itself for credentials that cannot be
        had) and ``Unsure``.
        """
        body = json.dumps(params, separators=(",", ":"), default=_blob).encode()
        tries = 0
        while True:
            tries += 1
            try:
                return self._once(operation, body, timeout, polls)
            except (_Stale, Unreachable) as ended:
                if polls is not None and polls.cut:
                    raise Cut from None
                if isinstance(ended, Unreachable):
                    if tries >= self._tries:
                        raise
                    self._closed.wait(random.uniform(0, _PAUSE))
                    continue
                # The server has closed the idle connection: not counted as a try. A send may have been done before
                # that, so it is counted, and not repeated more often than botocore would.
                if operation != "SendMessageBatch":
                    tries -= 1
                elif tries >= self._tries:
                    raise Unreachable("the server closed the connection") from None
            except BadReply as error:
                if tries >= self._tries or not _may_pass(error):
                    raise
                self._closed.wait(random.uniform(0, _PAUSE))

    def close(self) -> None:
        """Close the connections; one in use is closed when its call ends."""
        self._closed.set()
        self._drop_idle()

    def _once(self, operation: str, body: bytes, timeout: float, polls: LongPolls | None) -> dict[str, Any]:
        """Sign and send one request; return its reply."""
        keys = frozen(self._target.keys)
        if not keys.access_key or not keys.secret_key:
            raise Unsure("the credentials are of an unknown kind")
        head = self._signer.headers(keys, self._authority, operation, body, time.gmtime())
        request = f"{self._first}{head}{self._fields}content-length: {len(body)}\r\n\r\n".encode("ascii")
        sock = self._take_idle()
        reused = sock is not None
        if sock is None:
            sock = self._target.connect(self._connect_timeout)
            if self._opened is not None:
                self._opened(sock)
        keep = False
        try:
            sock.settimeout(timeout)
            # In one write: a second one could wait for the acknowledgement of the first.
            sock.sendall(request + body)
            with nullcontext(b"") if polls is None else polls.under_way(sock, timeout) as first:
                status, fields, content = read_reply(sock, first)
            # One that was cut off sends nothing any more.
            keep = fields.get(b"connection", b"").lower() != b"close" and not (polls is not None and polls.cut)
        except TimeoutError:
            raise TimedOut(f"no answer within {timeout:g} s") from None
        except _Ended as error:
            if reused and not error.begun:
                raise _Stale from None
            raise Unreachable("the connection was closed before the reply was complete") from None
        except OSError as error:
            if reused and isinstance(error, ConnectionError | ssl.SSLEOFError):
                raise _Stale from None
            raise Unreachable(str(error)) from error
        finally:
            if keep:
                self._keep(sock)
            else:
                _close(sock)
        return parse_reply(status, fields, content)

    def _take_idle(self) -> Socket | None:
        """Return an idle connection that the server has not closed; None where there is none."""
        while True:
            try:
                sock = self._idle.pop()
            except IndexError:
                return None
            if sock.fileno() < 0:
                # The parent's, closed after the fork (see ``sockets``).
                continue
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            if not poll.poll(0):
                return sock
            # Readable without a request: the server has closed it, or sent more than a reply.
            _close(sock)

    def _keep(self, sock: Socket) -> None:
        """Keep a connection for later calls, or close it."""
        if len(self._idle) >= _KEPT:
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


def frozen(keys: Callable[[], Keys]) -> Keys:
    """Return the current credentials. Raises ``CallFailed`` where there are none, or none that a request can carry."""
    try:
        found = keys()
    except Exception as error:
        raise CallFailed(no_keys(error)) from error
    shown = f"{found.access_key}{found.secret_key}{found.token or ''}"
    if not (shown.isascii() and shown.isprintable() and " " not in shown) and (fault := malformed(found)) is not None:
        raise CallFailed(fault)
    return found


def _blob(value: object) -> str:
    """Return the Base64 of a Binary attribute's bytes, for json.dumps."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"no JSON for a {type(value).__name__}")


def _close(sock: Socket) -> None:
    with contextlib.suppress(OSError):
        sock.close()


def _may_pass(error: BadReply) -> bool:
    """Tell whether an error of SQS may pass by itself."""
    return error.status >= 500 or error.status == 429 or error.code in _THROTTLING


def read_reply(sock: Socket, first: bytes = b"") -> tuple[int, dict[bytes, bytes], bytes]:
    """Read one reply; return its status, its header fields (names in lower case) and its body.

    ``first``: bytes of it that were read already. Raises ``Unsure`` for a reply of another shape, ``Malformed``,
    ``TimeoutError`` and other ``OSError``.
    """
    data = bytearray(first)
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > _MOST_HEAD:
            raise Unsure("the reply's head does not end")
        _read_more(sock, data)
    first, *lines = bytes(data[:end]).split(b"\r\n")
    version, _, rest = first.partition(b" ")
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or not rest[:3].isdigit():
        raise Unsure(f"no HTTP/1.1: {first[:40]!r}")
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or name[:1].isspace():
            raise Unsure(f"no header field: {line[:40]!r}")
        fields[name.lower()] = value.strip()
    if version == b"HTTP/1.0":
        fields.setdefault(b"connection", b"close")
    length = fields.get(b"content-length", b"")
    if b"transfer-encoding" in fields or b"content-encoding" in fields or not length.isdigit():
        raise Unsure("a reply without a plain body of known length")
    if len(length) > _MOST_DIGITS:
        raise Malformed(f"a content-length of {len(length)} digits")
    if int(length) > _MOST_BODY:
        raise TooLong(f"a reply of {int(length)} bytes")
    stop = end + 4 + int(length)
    while len(data) < stop:
        _read_more(sock, data)
    if len(data) > stop:
        raise Unsure("more than one reply")
    return int(rest[:3]), fields, bytes(data[end + 4 :])


def _read_more(sock: Socket, data: bytearray) -> None:
    """Append the next bytes of a reply to ``data``."""
    piece = sock.recv(_CHUNK)
    if not piece:
        raise _Ended(begun=bool(data))
    data += piece


def parse_reply(status: int, fields: Mapping[bytes, bytes], content: bytes) -> dict[str, Any]:
    """Return the JSON object of a reply.

    Raises ``BadReply`` for an error, ``Malformed`` for JSON without an end, ``Unsure`` for any other reply.
    """
    try:
        told = json.loads(content or b"{}")
    except ValueError:
        told = None
    except RecursionError:
        raise Malformed("JSON that is nested too deeply") from None
    if status == 200 and isinstance(told, dict):
        return told
    if status >= 500 and not isinstance(told, dict):
        # A load balancer's page.
        raise BadReply(str(status), "", status)
    if not isinstance(told, dict) or not 400 <= status < 600:
        raise Unsure(f"a reply with status {status} that is no JSON object")
    code = str(told.get("__type") or status).partition(":")[0].rpartition("#")[2]
    legacy, semicolon, _ = fields.get(b"x-amzn-query-error", b"").decode("latin-1").partition(";")
    code = legacy if semicolon and legacy else code
    message = str(told.get("message") or told.get("Message") or "")
    if code in _SIGNATURE_CODES or "ignature" in message:
        raise Unsure(f"{code}: {message}")
    raise BadReply(code, message, status)
