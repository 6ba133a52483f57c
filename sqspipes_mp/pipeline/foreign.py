"""Bodies of others, for a task with ``input=NAME``: opaque, whatever they look like (worker, caller). Pure."""

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
    """Return what makes messages of such bodies; None from it: ``decode`` gave None, so there is nothing to run.

    Nothing in a body becomes an id, a priority or meta, unless ``decode`` returns what ``envelope`` does. What
    ``decode`` raises passes through as the task's own failure; without it, ``DecodeError`` is raised for what is not
    JSON.
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
    """Tell whether ``decode`` is to be given the sender's attributes: it has two positional parameters, both required.

    A second one with a default is something else of the user's.
    """
    try:
        parameters = inspect.signature(decode).parameters.values()
    except Exception:
        # Built-ins may have none, and what the user's descriptors raise is the call's to tell.
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is each.empty for each in parameters) == 2


def _as_json(received: Received) -> Message:
    ident = received.handle.message_id
    complaint = "the body is not JSON (give the task decode=, a function from the body to the value)"
    return Message(load(received.body, complaint), {}, ident, ident, 0)
