"""What a FIFO group may be called. Pure; any process that sends."""

from __future__ import annotations

import hashlib
import re

#: Amazon SQS API Reference, SendMessage: MessageGroupId.
_GROUP = re.compile(r"[A-Za-z0-9!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]{1,128}")


def group_name(key: object) -> str:
    """Return the group for a key: itself where SQS allows it, else a digest; any text may be a key."""
    group = str(key)
    if _GROUP.fullmatch(group):
        return group
    return hashlib.sha256(group.encode("utf-8", "surrogatepass")).hexdigest()
