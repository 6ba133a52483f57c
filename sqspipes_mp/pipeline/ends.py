"""Values whose results are kept (``map(keep_results=True)``): the mark in their messages, and their ends. Pure.

The mark travels with every message of the value, so that whoever deletes one, a ``run`` say, records its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqspipes_mp.brokers.base import End
from sqspipes_mp.errors import DecodeError
from sqspipes_mp.messages.envelope import Message, decode
from sqspipes_mp.messages.ids import token

#: Key of ``meta``: the queue that the value was fed to.
KEEP = "keep"


def is_kept(meta: Mapping[str, Any]) -> bool:
    """Tell whether a message's value has its results kept."""
    return type(meta.get(KEEP)) is str


def end_of(message: Message, results: tuple[str, ...] = ()) -> End | None:
    """Return the end of a message with its results in JSON; None where its value's results are not kept."""
    queue = message.meta.get(KEEP)
    return End(queue, token(message.id), results) if type(queue) is str else None


def end_of_body(body: str, message_id: str) -> End | None:
    """Return the end of a message that is given up; None where its value's results are not kept, or it is unreadable.

    ``message_id``: the broker's.
    """
    try:
        return end_of(decode(body, message_id))
    except DecodeError:
        return None
