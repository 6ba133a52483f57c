"""A JSON head and raw bytes in one piece (packed in a worker or the keeper, read in the parent)."""

import json
import struct
from typing import Any

_LENGTH = struct.Struct("!I")


def encode(value: Any) -> bytes:
    """Encode as JSON, in ASCII: names of files may hold lone surrogates, which UTF-8 refuses."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def join(head: Any, *bodies: bytes) -> bytes:
    """Put the length of the head, the head as JSON and the bodies one after the other."""
    data = encode(head)
    return b"".join((_LENGTH.pack(len(data)), data, *bodies))


def split(data: bytes) -> tuple[Any, bytes]:
    """Return the head and all bodies. Raises ``struct.error`` or ``ValueError`` for other bytes."""
    (length,) = _LENGTH.unpack_from(data)
    end = _LENGTH.size + length
    return json.loads(data[_LENGTH.size : end]), data[end:]
