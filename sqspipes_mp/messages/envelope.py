"""The envelope: bodies to messages, values to bodies, and the ids that tie a hop's output to its input.

Pure; runs in workers once or more per message, and in the keeper and the caller where they read or send one.
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
#: What ``hop_id`` makes; anything else in a hop's place was never one.
_is_hop = re.compile(r"[0-9a-f]{64}").fullmatch


@dataclass(frozen=True, slots=True)
class Message:
    """A decoded body.

    ``id`` is the root's id (``meta.id``, else the broker's message id), ``parent`` what this message's outputs derive
    their hop ids from (``meta.hop`` where it can be one, else ``id``), ``priority`` an int >= 0, not yet clamped to any
    task's levels.
    """

    value: Any
    meta: dict[str, Any]
    id: str
    parent: str
    priority: int


def decode(body: str, message_id: str) -> Message:
    """Read an envelope. Raises ``DecodeError``, and nothing else, for whatever is not one.

    NaN and lone surrogates are read (other senders write them); unknown ``meta`` keys are kept; a ``meta`` that is
    missing or no object counts as empty.
    """
    found = _opened(body)
    return _message(found["value"], found.get("meta"), message_id)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What ``envelope`` returns; the task is given its ``value``."""

    value: Any
    meta: Any


def envelope(body: str) -> Envelope:
    """Read a body that sqspipes or another pipeline of ours has sent: ``Task(input=NAME, decode=envelope)``.

    Its value is what the task gets, and its priority, ids and meta count as in a queue of the pipeline's own. Raises
    ``DecodeError`` for what is no envelope. A decode of your own may return what this returns.
    """
    found = _opened(body)
    return Envelope(found["value"], found.get("meta"))


def message_of(read: Envelope, message_id: str) -> Message:
    """Return the message that an envelope is, ``message_id`` being its id at the broker."""
    return _message(read.value, read.meta, message_id)


def _opened(body: str) -> dict[str, Any]:
    found = load(body, "the body is not JSON")
    if type(found) is not dict:
        raise DecodeError(f"the body is a JSON {_json_type(found)}, not an envelope (an object with a value)", body)
    if "value" not in found:
        raise DecodeError("the envelope has no 'value'", body)
    return found


def load(body: str, complaint: str) -> Any:
    """Return what a JSON body says. Raises ``DecodeError``, beginning with ``complaint``, and nothing else."""
    try:
        return _parse(body)
    except RecursionError:
        reason = f"{complaint}: it is nested too deeply"
    except ValueError as error:
        reason = f"{complaint}: {error}"
    raise DecodeError(reason, body)


def _message(value: Any, meta: Any, message_id: str) -> Message:
    if type(meta) is not dict:
        return Message(value, {}, message_id, message_id, 0)
    root, hop, priority = meta.get("id"), meta.get("hop"), meta.get("priority")
    if type(root) is not str or not root:
        root = message_id
    if type(hop) is not str or not _is_hop(hop):
        # Hops of ours are digests; a made-up one would have outputs of different messages look the same.
        hop = root
    return Message(value, meta, root, hop, priority if type(priority) is int and priority > 0 else 0)


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


class Encoder:
    """Makes the bodies of one stage's outputs (``stage`` None: of what is fed); safe to share between threads."""

    __slots__ = ("_default", "_encode", "_what")

    def __init__(self, stage: str | None, default: Callable[[Any], Any] | None) -> None:
        self._what = "the value" if stage is None else f"stage {stage!r}: the output"
        self._default = default
        self._encode = json.JSONEncoder(default=self._convert, allow_nan=False, separators=(",", ":")).encode

    def encode(self, value: object, meta: Mapping[str, Any]) -> str:
        """Return compact ASCII JSON of at most ``MAX_BODY`` bytes.

        Raises ``OutputError`` (no JSON for it) and ``MessageTooLarge``, naming stage, place, type or size, and cure.
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
        # Outside the except blocks, so that no context keeps the culprit, which may not pickle, on the report.
        where = f"{self._what} ({describe(value)})"
        raise OutputError(f"{where} cannot become JSON: {text}") from cause

    def _convert(self, culprit: Any) -> Any:
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
    """No JSON form is known for ``culprit``; the cause is what ``json_default`` raised."""

    def __init__(self, culprit: object) -> None:
        self.culprit = culprit


def outgoing_meta(message: Message | None, root_id: str, priority: int, hop: str) -> dict[str, Any]:
    """Return an output's meta: the input's, unknown keys too, with our three set."""
    ours = {"priority": priority, "id": root_id, "hop": hop}
    return ours if message is None else {**message.meta, **ours}


def clamp_priority(priority: object, levels: int) -> int:
    """Return the level, 0 to ``levels`` - 1, that a priority means. Raises ``ConfigError`` for what is no int."""
    # Asking about a protocol costs as much as all the rest of an output.
    if type(priority) is not int and not isinstance(priority, SupportsIndex):
        raise ConfigError("priority", priority, "an int, 0 (lowest) to 15", "Look at what the callable returns")
    return max(0, min(operator.index(priority), levels - 1))
