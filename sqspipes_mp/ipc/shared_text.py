"""A text in shared memory with one writer; a reader that meets a half-written one reads again (any process)."""

from __future__ import annotations

import struct
import zlib

_HEAD = struct.Struct("<II")


class SharedText:
    """A text in a view of shared memory."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def read(self) -> str | None:
        """Return the text; None while none is written."""
        for _ in range(100):
            size, crc = _HEAD.unpack_from(self._view)
            raw = bytes(self._view[_HEAD.size : _HEAD.size + size])
            if zlib.crc32(raw) == crc:
                return raw.decode() if raw else None
        return None

    def write(self, text: str) -> None:
        """Replace the text; a text that does not fit is dropped."""
        raw = text.encode()
        if len(raw) <= len(self._view) - _HEAD.size:
            self._view[_HEAD.size : _HEAD.size + len(raw)] = raw
            _HEAD.pack_into(self._view, 0, len(raw), zlib.crc32(raw))
