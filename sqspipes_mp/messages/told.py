"""A message as errors and logs name it: its id, its key where it has one, a cut of its value. Pure (any process)."""

from __future__ import annotations

import re

from sqspipes_mp.messages.envelope import Message
from sqspipes_mp.messages.plain import one_line

#: Characters shown of an id, a key and a value.
_ID, _KEY, _VALUE = 16, 40, 80
#: Ids that nobody chose: a hop id, a UUID with or without dashes, the id of a message in an SQLite file.
_MADE = re.compile(r"[0-9a-f]{64}|[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{16}-[0-9]+")


def short_id(hop: str) -> str:
    """Return the beginning of a message's hop id for a log line; ``sqspipes-mp dead show`` takes it."""
    return one_line(hop, _ID).encode("ascii", "backslashreplace").decode()


def key_of(message: Message) -> str | None:
    """Return the key that the sender of the root value gave; None where the id is made, or the queue service's."""
    chosen = message.meta.get("id") == message.id and _MADE.fullmatch(message.id) is None
    return message.id if chosen else None


def tell(message: Message) -> str:
    """Return a message's id, key and value on one line."""
    key = key_of(message)
    named = "" if key is None else f"key {_cut(repr(key), _KEY)}, "
    return f"{short_id(message.parent)} ({named}value {value_text(message.value, _VALUE)})"


def value_text(value: object, most: int) -> str:
    """Return the beginning of a value's ``repr`` on one line; a value of ``decode`` has code of the user's in it."""
    try:
        return _cut(repr(value), most)
    except Exception as error:
        return f"<repr() raised {type(error).__name__}>"


def _cut(text: str, most: int) -> str:
    shown = one_line(text, most)
    return shown if len(text) <= most else f"{shown}..."
