"""What messages, values and FIFO groups are known by. Pure; any process that sends."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Literal

#: What stands in a hop id where another message's has the stage that made it; no task can be called so.
FED = "--input"
#: Amazon SQS API Reference, SendMessage: MessageGroupId.
_GROUP = re.compile(r"[A-Za-z0-9!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]{1,128}")


def hop_id(parent: str, stage: str, index: int) -> str:
    """Return the id of output number ``index`` (from 0) that ``stage`` makes of the message ``parent``."""
    return _digest(parent, stage, str(index))


def moved_id(hop: str, kind: Literal["dead", "redrive"], message_id: str) -> str:
    """Return the deduplication id for moving a copy to or from a dead-letter queue; never the original's."""
    return _digest(hop, kind, message_id)


def source_parent(run_id: str, slot: str, call: int) -> str:
    """Return the parent of what a source's call number ``call`` in ``slot`` of one run puts out."""
    return f"{run_id}/{slot}/{call}"


def _digest(*parts: str) -> str:
    # Ids come from others' JSON too, where "\ud800" is legal: surrogatepass, or the message could never move.
    return sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def token(root: str) -> str:
    """Return what names a fed value, from its origin id: the hop id of the message it was sent as."""
    return hop_id(root, FED, 0)


def mark(hop: str) -> int:
    """Return 64 bits that stand for a message."""
    return int.from_bytes(sha256(hop.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def group_name(key: object) -> str:
    """Return the group for a key: itself where SQS allows it, else a digest; any text may be a key."""
    group = str(key)
    if _GROUP.fullmatch(group):
        return group
    return sha256(group.encode("utf-8", "surrogatepass")).hexdigest()
