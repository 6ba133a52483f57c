"""The choice of dead letters by stage, error, time and text. Pure (caller)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.messages.told import value_text

if TYPE_CHECKING:
    from sqspipes_mp.caller.dead_letters import DeadLetter

#: Characters of a shown value for each of its body: an escape is longer than its character.
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Dead letters that fit every field; None: any does."""

    #: The task's name.
    stage: str | None = None
    #: The exception's name, with or without its module or class.
    error: str | None = None
    #: Epoch seconds: failed then or later.
    since: float | None = None
    #: A text in the key, the value, the body or the error.
    match: str | None = None

    @classmethod
    def of(
        cls,
        where: str,
        *,
        stage: str | None = None,
        error: str | None = None,
        since: datetime | timedelta | None = None,
        match: str | None = None,
    ) -> Choice:
        """Check the arguments of the method ``where``. Raises ``ConfigError``."""
        for field, text in (("stage", stage), ("error", error), ("match", match)):
            if text is not None and (not isinstance(text, str) or not text):
                raise ConfigError(f"{where}({field})", text, "a text that is not empty, or None")
        return cls(stage=stage, error=error, since=_moment(f"{where}(since)", since), match=match)

    @property
    def narrow(self) -> bool:
        """Whether some letters may not fit."""
        return self != Choice()

    def fits(self, letter: DeadLetter) -> bool:
        """Tell whether a letter is chosen."""
        failure = letter.failure
        checks: tuple[tuple[object, Callable[[], bool]], ...] = (
            (self.stage, lambda: letter.stage == self.stage),
            (self.error, lambda: self.error in {failure.error, failure.error.rpartition(".")[2]}),
            (self.since, lambda: (failure.failed_at or failure.first_seen or math.inf) >= (self.since or 0.0)),
            (self.match, lambda: any((self.match or "") in text for text in _texts(letter))),
        )
        return all(fits() for wanted, fits in checks if wanted is not None)


def _texts(letter: DeadLetter) -> tuple[str, ...]:
    try:
        value = json.dumps(letter.value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        value = ""
    # As JSON, as it was sent, and as the list shows it: a text that is copied from there is found.
    shown = value_text(letter.value, len(letter.body) * _SHOWN)
    return letter.key or "", value, shown, letter.body, f"{letter.failure.error}: {letter.failure.text}"


def _moment(field: str, since: object) -> float | None:
    if since is None:
        return None
    if isinstance(since, timedelta) and since >= timedelta(0):
        return (datetime.now(UTC) - since).timestamp()
    if isinstance(since, datetime):
        return since.timestamp()
    raise ConfigError(field, since, "a datetime, a timedelta from 0 or None")
