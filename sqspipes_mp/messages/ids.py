"""Ids of messages, of fed values and of FIFO groups. Pure (any process that sends)."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Literal

#: The stage's name in the hop id of a fed value; no task can have it.
FED = "--input"
#: Amazon SQS API Reference, SendMessage: MessageGroupId.
_GROUP = re.compile(r"[A-Za-z0-9!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]{1,128}")


def hop_id(parent: str, stage: str, index: int) -> str:
    """Return the hop id of output number ``index`` (from 0) that ``stage`` makes of the message ``parent``."""
    # An id may come from another sender's JSON, where the lone surrogate "\ud800" is legal.
    return sha256(f"{parent}\n{stage}\n{index}".encode("utf-8", "surrogatepass")).hexdigest()


def continued_id(parent: str, stage: str) -> str:
    """Return the hop id of the message that goes on in ``stage`` in place of the message ``parent``."""
    return sha256(f"{parent}\n{stage}\ncontinue".encode("utf-8", "surrogatepass")).hexdigest()


def moved_id(hop: str, kind: Literal["dead", "redrive"], message_id: str) -> str:
    """Return the deduplication id of a copy on its way to or from a dead-letter queue; it is never the original's."""
    return sha256(f"{hop}\n{kind}\n{message_id}".encode("utf-8", "surrogatepass")).hexdigest()


def source_parent(run_id: str, slot: str, call: int) -> str:
    """Return the parent of the outputs of a source's call number ``call`` in ``slot`` of one run."""
    return f"{run_id}/{slot}/{call}"


def token(root: str) -> str:
    """Return the token of a fed value with the origin id ``root``: the hop id of its message."""
    return hop_id(root, FED, 0)


def mark(hop: str) -> int:
    """Return 64 bits that stand for the message with a hop id."""
    return int.from_bytes(sha256(hop.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def group_name(key: object) -> str:
    """Return the FIFO group for a key: the key's text where SQS allows it as a group, else its digest."""
    group = str(key)
    if _GROUP.fullmatch(group):
        return group
    return sha256(group.encode("utf-8", "surrogatepass")).hexdigest()
