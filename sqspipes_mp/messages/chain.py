"""Chains of continuations, and due times: the two keys of ``meta`` that only one stage honours. Pure.

``meta.chain`` is a JSON object with the keys ``stage``, ``hop``, ``first``, ``yielded``, ``count`` and ``quick``. It is
believed where ``stage`` and ``hop`` are the message's own: a program that copies unknown keys of ``meta`` to its
outputs, as sqspipes does, makes no chain of them. ``meta.not_before`` is an epoch time in seconds. It is believed in a
chain, and in a fed message that the first stage receives. Neither travels on to outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqspipes_mp.messages.envelope import Message
from sqspipes_mp.messages.ids import continued_id, token

#: Continuations in a row, each less than ``QUICK`` seconds after the one before, that are sent without a pause: ten in
#: a minute.
UNPAUSED, QUICK = 10, 6.0
#: Longest pause before a continuation, seconds.
MOST_PAUSE = 30.0


@dataclass(frozen=True, slots=True)
class Chain:
    """The place of a continuation in its chain."""

    #: Hop id of the chain's first message.
    first: str
    #: Outputs that the calls before this one have yielded.
    yielded: int
    #: Number of this continuation, from 1.
    count: int
    #: Continuations up to this one that came quickly, one after the other.
    quick: int

    @property
    def pause(self) -> float:
        """Seconds for which this continuation was held back."""
        beyond = self.quick - UNPAUSED
        return min(MOST_PAUSE, 2.0 ** min(beyond - 1, 5)) if beyond > 0 else 0.0


def chain_of(message: Message, stage: str) -> Chain | None:
    """Return the chain of a message that ``stage`` has received; None: it is no continuation."""
    told = message.meta.get("chain")
    if type(told) is not dict or told.get("stage") != stage or told.get("hop") != message.parent:
        return None
    first, numbers = told.get("first"), [told.get(name, 0) for name in ("yielded", "count", "quick")]
    if type(first) is not str or any(type(number) is not int or number < 0 for number in numbers):
        return None
    return Chain(first, *numbers)


def continued(message: Message, stage: str, chain: Chain, *, due: float | None = None) -> tuple[str, dict[str, Any]]:
    """Return hop id and ``meta`` of the message that goes on in a message's place, as ``chain`` says.

    ``due``: its ``not_before``, epoch seconds; None: it may run at once.
    """
    hop = continued_id(message.parent, stage)
    meta = {name: value for name, value in message.meta.items() if name != "not_before"}
    meta |= {"priority": message.priority, "id": message.id, "hop": hop}
    meta["chain"] = {
        "stage": stage,
        "hop": hop,
        "first": chain.first,
        "yielded": chain.yielded,
        "count": chain.count,
        "quick": chain.quick,
    }
    if due is not None:
        meta["not_before"] = due
    return hop, meta


def due_of(message: Message, chain: Chain | None, *, is_fed: bool) -> float | None:
    """Return the time before which a message must not run, epoch seconds; None: it may run at any time.

    ``is_fed``: its stage receives the values that are fed.
    """
    due = message.meta.get("not_before")
    if isinstance(due, bool) or not isinstance(due, (int, float)):
        return None
    return due if chain or (is_fed and message.parent == token(message.id)) else None
