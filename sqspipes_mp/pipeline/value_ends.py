"""The ends of values that a map has fed: the marks in their messages, and their results in JSON. Pure.

The marks travel with every message of a value, so that whoever deletes one, a ``run`` say, records its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqspipes_mp.brokers.base import End
from sqspipes_mp.errors import DecodeError
from sqspipes_mp.messages.envelope import Message, decode
from sqspipes_mp.messages.ids import token

#: Keys of ``meta``, both with the queue that the value was fed to: its results are kept (``map(keep_results=True)``),
#: or the map may be resumed, and is to have the results that a ``run`` made of the value meanwhile (``map(key=)``).
KEEP, RESUME = "keep", "resume"


def is_kept(meta: Mapping[str, Any]) -> bool:
    """Tell whether a message's value has its results kept."""
    return type(meta.get(KEEP)) is str


def is_awaited(meta: Mapping[str, Any]) -> bool:
    """Tell whether a map that may be resumed waits for the results of a message's value."""
    return type(meta.get(RESUME)) is str


def end_of(message: Message, results: tuple[str, ...] = ()) -> End | None:
    """Return the end of a message with its results in JSON; None where none is to be recorded."""
    if is_kept(message.meta):
        return End(message.meta[KEEP], token(message.id), results)
    if results and is_awaited(message.meta):
        return End(message.meta[RESUME], token(message.id), results, kept=False)
    return None


def end_of_body(body: str, message_id: str) -> End | None:
    """Return the end of a message that is given up; None where none is to be recorded, or it is unreadable.

    ``message_id``: the broker's.
    """
    try:
        return end_of(decode(body, message_id))
    except DecodeError:
        return None
