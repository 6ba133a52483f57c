"""The envelope: bodies become messages, and values become bodies.

Pure; runs in workers for every message, and in the keeper and the caller where they read or send a message.
The wire format (docs/architecture.rst): ``{"meta": {"priority": p, "id": ..., "hop": ...}, "value": v}``.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, SupportsIndex

from sqspipes_mp.errors import ConfigError, DecodeError, MessageTooLarge, OutputError
from sqspipes_mp.messages.json_errors import describe, explain, scalar
from sqspipes_mp.messages.limits import MAX_BODY

_parse = json.JSONDecoder().decode
#: Matches the ids that ``hop_id`` makes.
_is_hop = re.compile(r"[0-9a-f]{64}").fullmatch


@dataclass(frozen=True, slots=True)
class Message:
    """A decoded body."""

    value: Any
    #: The whole ``meta`` of the envelope, unknown keys included.
    meta: dict[str, Any]
    #: The root's id: ``meta.id``, else the broker's message id.
    id: str
    #: The id that the hop ids of this message's outputs are made of: ``meta.hop`` where it is a hop id, else ``id``.
    parent: str
    #: At least 0; not clamped to a task's levels yet.
    priority: int


def decode(body: str, message_id: str) -> Message:
    """Return the message of a body. Raises ``DecodeError``, and nothing else, for a body that is no envelope.

    ``message_id``: the broker's. NaN and lone surrogates are read, since other senders write them. Unknown keys of
    ``meta`` are kept; a ``meta`` that is missing or no object counts as empty.
    """
    found = _opened(body)
    return _message(found["value"], found.get("meta"), message_id)


@dataclass(frozen=True, slots=True)
class Envelope:
    """The envelope that ``envelope`` has read."""

    #: The task's argument.
    value: Any
    #: The sender's ``meta``, unchecked; None where it is missing.
    meta: Any


def envelope(body: str) -> Envelope:
    """Read a body that sqspipes or another pipeline has sent: ``Task(input=NAME, decode=envelope)``.

    The task gets the envelope's value; priority, ids and meta count as in a queue of the pipeline's own. Raises
    ``DecodeError`` for a body that is no envelope. A ``decode`` of your own may return an ``Envelope``, too.
    """
    found = _opened(body)
    return Envelope(found["value"], found.get("meta"))


def message_of(read: Envelope, message_id: str) -> Message:
    """Return the message of an envelope; ``message_id`` is the broker's."""
    return _message(read.value, read.meta, message_id)


def _opened(body: str) -> dict[str, Any]:
    """Return the JSON object of an envelope. Raises ``DecodeError``."""
    try:
        found = _parse(body)
    except (ValueError, RecursionError):
        found = load(body, "the body is not JSON")
    if type(found) is not dict:
        raise DecodeError(f"the body is a JSON {_json_type(found)}, not an envelope (an object with a value)", body)
    if "value" not in found:
        raise DecodeError("the envelope has no 'value'", body)
    return found


def load(body: str, complaint: str) -> Any:
    """Return the value of a JSON body. Raises ``DecodeError``, its text begun with ``complaint``, and nothing else."""
    try:
        return _parse(body)
    except RecursionError:
        reason = f"{complaint}: it is nested too deeply"
    except ValueError as error:
        reason = f"{complaint}: {error}"
    raise DecodeError(reason, body)


def _message(value: Any, meta: Any, message_id: str) -> Message:
    """Return the message of an envelope's value and meta."""
    if type(meta) is not dict:
        return Message(value, {}, message_id, message_id, 0)
    root, hop, priority = meta.get("id"), meta.get("hop"), meta.get("priority")
    if type(root) is not str or not root:
        root = message_id
    if type(hop) is not str or not _is_hop(hop):
        # A hop id of the engine is a digest. With any other, outputs of different messages could get the same hop id.
        hop = root
    return Message(value, meta, root, hop, priority if type(priority) is int and priority > 0 else 0)


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


class Encoder:
    """Makes the bodies of one stage's outputs; threads may share it.

    ``stage``: its name; None for fed values. ``default``: the user's ``json_default``, which makes a JSON value of an
    object that ``json`` does not know; None: such an object is refused.
    """

    __slots__ = ("_default", "_encode", "_fed", "_what")

    def __init__(self, stage: str | None, default: Callable[[Any], Any] | None) -> None:
        #: Whether the values are the caller's, and not what a function returned.
        self._fed = stage is None
        self._what = "the value" if stage is None else f"stage {stage!r}: the output"
        self._default = default
        self._encode = json.JSONEncoder(default=self._convert, allow_nan=False, separators=(",", ":")).encode

    def encode(self, value: object, meta: Mapping[str, Any]) -> str:
        """Return the envelope of a value as compact ASCII JSON of at most ``MAX_BODY`` bytes.

        Raises ``OutputError`` for a value without a JSON form, and ``MessageTooLarge``; both name the stage, the place
        or the size, and the cure.
        """
        whole = {"meta": meta if isinstance(meta, dict) else dict(meta), "value": value}
        try:
            body = self._encode(whole)
        except _RefusedError as refused:
            text, cause = explain(whole, refused, refused.culprit), refused.__cause__
        except Exception as error:
            text, cause = explain(whole, error), error
        else:
            if len(body) > MAX_BODY:
                self._too_large(value, len(body))
            return body
        # Raised outside the except blocks: as its context, the error would carry the culprit, which may not pickle.
        where = f"{self._what} ({describe(value)})"
        if self._fed:
            text = text.replace(". Return ", ". Give ")
        raise OutputError(f"{where} cannot become JSON: {text}") from cause

    def text(self, result: object) -> str:
        """Return a result that is to be kept as compact ASCII JSON. Raises ``OutputError``."""
        try:
            return self._encode(result)
        except _RefusedError as refused:
            text, cause = explain({"value": result}, refused, refused.culprit), refused.__cause__
        except Exception as error:
            text, cause = explain({"value": result}, error), error
        where = f"{self._what} ({describe(result)})"
        raise OutputError(f"{where} cannot become JSON, in which map(keep_results=True) keeps it: {text}") from cause

    def _convert(self, culprit: Any) -> Any:
        """Return a JSON form of an object that ``json`` does not know: a scalar's, else the user's."""
        plain = scalar(culprit)
        if plain is not None:
            return plain
        if self._default is None:
            raise _RefusedError(culprit)
        try:
            return self._default(culprit)
        except Exception as error:
            raise _RefusedError(culprit) from error

    def _too_large(self, value: object, size: int) -> NoReturn:
        raise MessageTooLarge(
            f"{self._what} ({describe(value)}) makes a message of {size:,} bytes, and at most "
            f"{MAX_BODY:,} fit. Store big data in S3 or a file and send its path, or send it in parts"
        )


class _RefusedError(Exception):
    """An object has no JSON form; the cause is the exception of ``json_default``, if there is one."""

    def __init__(self, culprit: object) -> None:
        self.culprit = culprit


def outgoing_meta(message: Message | None, root_id: str, priority: int, hop: str) -> dict[str, Any]:
    """Return the ``meta`` of an output: the input's, unknown keys included, with the output's priority, id and hop.

    The keys that only the input's stage honours (``messages.chain``) stay behind.
    """
    ours = {"priority": priority, "id": root_id, "hop": hop}
    if message is None:
        return ours
    meta = {**message.meta, **ours}
    if "chain" in meta or "not_before" in meta:
        meta.pop("chain", None)
        meta.pop("not_before", None)
    return meta


def clamp_priority(priority: object, levels: int) -> int:
    """Return the level of a priority, 0 to ``levels`` - 1. Raises ``ConfigError`` for a priority that is no int."""
    # The type is compared first: the check of a protocol costs as much as all the rest of an output.
    if type(priority) is not int and not isinstance(priority, SupportsIndex):
        raise ConfigError("priority", priority, "an int, 0 (lowest) to 15", "Look at what the callable returns")
    return max(0, min(operator.index(priority), levels - 1))
