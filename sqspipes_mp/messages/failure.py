"""The reason of a dead letter: the JSON of the String attribute ``sqspipes_mp.failure``.

Pure; written by workers and the keeper, read by the caller and the command line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqspipes_mp.messages.attributes import MAX_ATTRIBUTES, Attribute, size_of
from sqspipes_mp.messages.limits import FAILURE_ATTRIBUTE, MAX_BODY, MAX_BYTES
from sqspipes_mp.messages.shorten import cut_middle

#: A message attribute counts with its name, type and value (Amazon SQS API Reference, SendMessage).
_OVERHEAD = len(FAILURE_ATTRIBUTE) + len("String")
#: Most bytes of the value: ``MAX_BODY`` leaves them free.
MAX_FAILURE = MAX_BYTES - MAX_BODY - _OVERHEAD
#: Fields that are shortened where room is short, in this order, and the bytes that are left of each.
_CUTS = (("traceback", 2_000), ("stack", 2_000), ("text", 1_000), ("traceback", 0), ("stack", 0), ("text", 0))
#: Fields that are left out where shortening is not enough, in this order.
_LAST = ("host", "pid", "first_seen", "failed_at", "signal", "attempts", "source", "stage")
#: Numbers of a failure are below this; epoch seconds of the year 9999 are.
_MOST_NUMBER = 1 << 40

#: Added to the log's text where the message has no room for its reason.
NO_ROOM = " (its own size or attributes leave no room for the reason, which is told here only)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The failure that made a message a dead letter."""

    #: The exception's type name, or the cause of the worker's death.
    error: str
    #: The exception's message.
    text: str = ""
    traceback: str = ""
    #: Name of the stage that failed.
    stage: str = ""
    #: Number of failed attempts.
    attempts: int = 0
    #: Name of the signal that killed the worker; None: no signal did.
    signal: str | None = None
    #: Stack dump of a killed worker.
    stack: str = ""
    #: Name of the worker's machine.
    host: str = ""
    #: Process id of the worker.
    pid: int | None = None
    #: Time of the message's send, epoch seconds.
    first_seen: float | None = None
    #: Time of the failure, epoch seconds.
    failed_at: float | None = None
    #: The queue that the message was received from.
    source: str = ""


def failure_text(failure: Mapping[str, Any], body_bytes: int, attributes: Sequence[Attribute] = ()) -> str | None:
    """Return ``failure`` as ASCII JSON that fits into a message beside a body of ``body_bytes`` bytes.

    ``attributes``: the sender's, which keep their room. A failure that is too long loses the middle of traceback and
    stack, then of the text, then whole fields. None: the error's type does not fit, or the message has the most
    attributes already.
    """
    if len(attributes) >= MAX_ATTRIBUTES:
        return None
    room = min(MAX_FAILURE, MAX_BYTES - _OVERHEAD - body_bytes - size_of(attributes))
    # A character takes at least a byte: texts are cut to the room before they are encoded again and again.
    plain = {str(key): _plain(value, max(room, 0)) for key, value in failure.items()}
    for name, floor in _CUTS:
        excess = len(_dump(plain)) - room
        if excess <= 0:
            break
        if isinstance(text := plain.get(name), str):
            plain[name] = _shorten(text, max(floor, len(_dump(text)) - excess))
    known = {field.name for field in fields(Failure)}
    for name in (*(key for key in plain if key not in known), "traceback", "stack", "text", *_LAST):
        if len(_dump(plain)) <= room:
            break
        plain.pop(name, None)
    if len(_dump(plain)) > room and isinstance(error := plain.get("error"), str):
        plain["error"] = _shorten(error, len(_dump(error)) - (len(_dump(plain)) - room))
    text = _dump(plain)
    return text if len(text) <= room and plain.get("error", True) else None


def parse_failure(text: str) -> Failure:
    """Return the failure that an attribute says. Never raises.

    An unreadable attribute becomes the ``text`` of the failure; a field of another type, or with an impossible number,
    has its default.
    """
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        return Failure(error="unknown", text=text)
    kinds: dict[str, type | tuple[type, ...]] = {"attempts": int, "pid": int}
    kinds |= dict.fromkeys(("first_seen", "failed_at"), (int, float))
    found = {
        field.name: loaded[field.name]
        for field in fields(Failure)
        if isinstance(loaded.get(field.name), kinds.get(field.name, str)) and not _odd(loaded[field.name])
    }
    return Failure(**{"error": "unknown", **found})


def _odd(value: object) -> bool:
    """Tell whether a value is no number of a failure: anybody may have sent the message, with any."""
    return isinstance(value, bool) or (isinstance(value, (int, float)) and not 0 <= value < _MOST_NUMBER)


def _plain(value: object, most: int) -> object:
    """Return a field as a JSON value; texts cut to ``most`` characters."""
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value.bit_length() < 64):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    text = value if isinstance(value, str) else f"<{type(value).__name__}>"
    return cut_middle(text, most)


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _shorten(text: str, most: int) -> str:
    """Cut the middle out of ``text`` until its JSON has at most ``most`` bytes (the empty string if nothing fits)."""
    if len(_dump(text)) <= most:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(_dump(cut_middle(text, middle))) <= most:
            low = middle
        else:
            high = middle - 1
    return cut_middle(text, low) if low else ""
