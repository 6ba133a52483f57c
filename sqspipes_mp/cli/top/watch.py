"""Watches one engine; where it has ended, the next one that is meant (the command line's process)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqspipes_mp.ipc.running.asking import ask
from sqspipes_mp.ipc.running.folders import Engine, Unanswered, engines, matches
from sqspipes_mp.ipc.running.history import History
from sqspipes_mp.ipc.running.memory import Gone, Memory, open_memory
from sqspipes_mp.ipc.running.served import NUMBERS_ONLY, Served, is_address
from sqspipes_mp.ipc.running.state import ended
from sqspipes_mp.ipc.statistics import ForeignLayout, Statistics

#: Seconds between two orders to count the queues; the engine counts for 30 s after each.
_LOOK_EVERY = 10.0
#: Seconds that such an order may take; a supervisor that stands still answers none.
_LOOK_PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One look."""

    #: None: no engine was ever seen.
    state: Mapping[str, Any] | None
    #: Whether the engine has ended; the state is its last one.
    ended: bool = False
    #: Why there is nothing newer to see; "": there is.
    why: str = ""
    #: The engine does not answer now; the state is an earlier one.
    lost: bool = False


def watch_of(target: str | None) -> Watch | ServedWatch:
    """Return the watch of the engine that a person means. Raises ``Unanswered`` for an address that is none."""
    return ServedWatch(Served(target)) if target is not None and is_address(target) else Watch(target)


class ServedWatch:
    """The engine behind a server's address, as ``Watch``."""

    def __init__(self, engine: Served) -> None:
        self.engine = engine
        self._last: Mapping[str, Any] | None = None

    def look(self) -> Seen:
        """Ask for the engine's state now."""
        try:
            self._last = self.engine.state()
        except Unanswered as error:
            return Seen(self._last, why=str(error), lost=True)
        return Seen(self._last, why=NUMBERS_ONLY if self._last["engine"]["pid"] is None else "")

    def close(self) -> None:
        """Do nothing: no connection is kept."""


class Watch:
    """The engine that a person watches. One thread looks; another may close."""

    def __init__(self, target: str | None) -> None:
        """``target``: as of ``folders.matches``; None: the only engine here."""
        self._target = target
        self._domain = ""
        self.engine: Engine | None = None
        self._memory: Memory | None = None
        self._statistics: Statistics | None = None
        self._history = History()
        self._last: Mapping[str, Any] | None = None
        self._looked_at = -_LOOK_EVERY
        self._looking, self._closed = threading.Lock(), False

    def look(self) -> Seen:
        """Look at the engine now, or at the next one that has begun."""
        with self._looking:
            return Seen(self._last) if self._closed else self._look()

    def _look(self) -> Seen:
        alive = engines()
        if self.engine is not None and all(each.run != self.engine.run for each in alive):
            self._end()
        if self.engine is None:
            problem = self._begin(alive)
            if problem:
                return Seen(self._last, ended=self._last is not None, why=problem)
        self._ask_to_count()
        self._last = self._read()
        return Seen(self._last)

    def close(self) -> None:
        """Let go of the statistics, for good, once a look that is under way has ended."""
        with self._looking:
            self._closed = True
            self._let_go()

    def _let_go(self) -> None:
        if self._statistics is not None:
            self._statistics.close()
        if self._memory is not None:
            self._memory.close()
        self.engine = self._statistics = self._memory = None

    def _begin(self, alive: list[Engine]) -> str:
        """Open the engine that is meant; return the reason where there is none."""
        meant = [each for each in alive if self._target is None or matches(each, self._target)]
        if self._domain:
            # The next run of the same pipeline, by whatever name the first one was meant.
            meant = [each for each in alive if each.text("domain") == self._domain] or meant
        if not meant:
            name = self._domain or self._target
            return f"waiting for {f'a run of {name}' if name else 'an engine'} to begin here"
        if len(meant) > 1 and not self._domain:
            return "several engines run here: name one by its domain or pid (sqspipes-mp ps)"
        try:
            self._memory = open_memory(meant[0])
            self._statistics = Statistics(self._memory.view)
        except (Gone, ForeignLayout) as error:
            self._let_go()
            return f"{meant[0].name}: {error}"
        self.engine, self._domain = meant[0], meant[0].text("domain")
        self._history.clear()
        self._looked_at = -_LOOK_EVERY
        return ""

    def _end(self) -> None:
        """Keep the last state of an engine that has ended; the memory outlives it."""
        self._last = ended(self._read())
        self._let_go()

    def _read(self) -> dict[str, Any]:
        assert self._statistics is not None
        assert self.engine is not None
        return self._history.read(self._statistics, here=self.engine.here)

    def _ask_to_count(self) -> None:
        now = time.monotonic()
        if self.engine is not None and now - self._looked_at >= _LOOK_EVERY:
            self._looked_at = now
            # One that does not answer is looked at all the same; its counts are old.
            with contextlib.suppress(Unanswered):
                ask(self.engine, {"do": "look"}, _LOOK_PATIENCE)
