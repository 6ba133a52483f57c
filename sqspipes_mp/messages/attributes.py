"""Message attributes of senders, which SQS carries beside a body. Pure (any process)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

#: Most attributes of one message (Amazon SQS Developer Guide, message metadata).
MAX_ATTRIBUTES = 10

_LENGTHS = struct.Struct("<?HHI")
#: Most bytes that ``packed`` adds to ``size_of``.
PACKED_OVERHEAD = MAX_ATTRIBUTES * _LENGTHS.size


class Attribute(NamedTuple):
    """One message attribute."""

    name: str
    #: Its data type in full, such as "String" or "Number.int".
    kind: str
    #: Bytes of a Binary, text of any other type.
    value: str | bytes


def values_of(attributes: Sequence[Attribute]) -> dict[str, str | bytes]:
    """Return the attributes as users see them: values by names."""
    return {each.name: each.value for each in attributes}


def size_of(attributes: Sequence[Attribute]) -> int:
    """Return the size in bytes as SQS counts it: names, types and values (Amazon SQS API Reference, SendMessage)."""
    return sum(len(part) for each in attributes for part in _encoded(each))


def packed(attributes: Sequence[Attribute]) -> bytes:
    """Return the attributes as bytes, for shared memory."""
    pieces: list[bytes] = []
    for each in attributes:
        parts = _encoded(each)
        pieces += _LENGTHS.pack(isinstance(each.value, bytes), *map(len, parts)), *parts
    return b"".join(pieces)


def unpacked(raw: bytes) -> tuple[Attribute, ...]:
    """Return the attributes that ``packed`` has made bytes of."""
    return tuple(_unpack(raw))


def _unpack(raw: bytes) -> Iterator[Attribute]:
    at = 0
    while at < len(raw):
        binary, *lengths = _LENGTHS.unpack_from(raw, at)
        at += _LENGTHS.size
        parts: list[bytes] = []
        for length in lengths:
            parts.append(raw[at : at + length])
            at += length
        name, kind = (part.decode("utf-8", "surrogatepass") for part in parts[:2])
        yield Attribute(name, kind, parts[2] if binary else parts[2].decode("utf-8", "surrogatepass"))


def _encoded(attribute: Attribute) -> tuple[bytes, bytes, bytes]:
    name, kind, value = attribute
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return name.encode("utf-8", "surrogatepass"), kind.encode("utf-8", "surrogatepass"), data
