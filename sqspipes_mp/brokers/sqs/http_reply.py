"""Reader of SQS's HTTP replies, for ``http``: one that is incomplete or unclear raises (any process with one open)."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Mapping
from typing import Any

#: Signature and clock are botocore's business: it may know better, and its answer is the one users can look up.
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
#: Longest head of a reply, and longest body: ten messages of 1 MiB in all, every byte escaped, stay below it.
_MOST_HEAD = 64 << 10
_MOST_BODY = 16 << 20
_CHUNK = 256 << 10

Socket = socket.socket | ssl.SSLSocket


class Unsure(Exception):
    """Not the ordinary case: leave it, and everything after it, to boto3."""


class BadReply(Exception):
    """An error of SQS; ``response`` has the shape of botocore's ``ClientError``."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.status = code, status
        self.response = {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }


class Ended(Exception):
    """The connection ended; ``begun`` tells whether any of the reply had come."""

    def __init__(self, *, begun: bool) -> None:
        super().__init__()
        self.begun = begun


def read(sock: Socket) -> tuple[int, dict[bytes, bytes], bytes]:
    """Read one reply: its status, its header fields (names in lower case), its body."""
    data = bytearray()
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > _MOST_HEAD:
            raise Unsure("the reply's head does not end")
        _more(sock, data)
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
    if int(length) > _MOST_BODY:
        raise Unsure(f"a reply of {int(length)} bytes")
    stop = end + 4 + int(length)
    while len(data) < stop:
        _more(sock, data)
    if len(data) > stop:
        raise Unsure("more than one reply")
    return int(rest[:3]), fields, bytes(data[end + 4 :])


def _more(sock: Socket, data: bytearray) -> None:
    piece = sock.recv(_CHUNK)
    if not piece:
        raise Ended(begun=bool(data))
    data += piece


def understood(status: int, fields: Mapping[bytes, bytes], content: bytes) -> dict[str, Any]:
    """Return what a reply says; raise ``BadReply`` for an error, ``Unsure`` for what makes no sense."""
    try:
        told = json.loads(content or b"{}")
    except ValueError:
        told = None
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
