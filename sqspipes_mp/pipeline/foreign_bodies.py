"""Reads bodies of other programs (``Task(input=NAME)``): never as an envelope, unless ``decode`` does. Pure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from sqspipes_mp.brokers.base import Received
from sqspipes_mp.messages.attributes import values_of
from sqspipes_mp.messages.envelope import Envelope, Message, load, message_of

Decode: TypeAlias = Callable[[str], Any] | Callable[[str, Mapping[str, str | bytes]], Any]
Read: TypeAlias = Callable[[Received], Message | None]


def reader(decode: Callable[..., Any] | None) -> Read:
    """Return a function from a body to its message; the function returns None where ``decode`` does.

    Nothing in a body becomes an id, a priority or meta, unless ``decode`` returns an ``Envelope``. The function raises
    the exceptions of ``decode``, which count as the task's own; without a ``decode`` it raises ``DecodeError`` for a
    body that is not JSON.
    """
    if decode is None:
        return _as_json
    takes_attributes = wants_attributes(decode)

    def read(received: Received) -> Message | None:
        more = (values_of(received.attributes),) if takes_attributes else ()
        value = decode(received.body, *more)
        if value is None:
            return None
        ident = received.handle.message_id
        return message_of(value, ident) if isinstance(value, Envelope) else Message(value, {}, ident, ident, 0)

    return read


def wants_attributes(decode: Callable[..., Any]) -> bool:
    """Tell whether ``decode`` takes the sender's attributes: it has two positional parameters, both required.

    A second parameter with a default is none for attributes.
    """
    try:
        parameters = inspect.signature(decode).parameters.values()
    except Exception:
        # Built-ins may have none. A fault of the user's descriptors shows at the call.
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is each.empty for each in parameters) == 2


def _as_json(received: Received) -> Message:
    ident = received.handle.message_id
    complaint = "the body is not JSON (give the task decode=, a function from the body to the value)"
    return Message(load(received.body, complaint), {}, ident, ident, 0)
