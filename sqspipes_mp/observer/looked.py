"""The engines that a server shows: its own run's, or all that are registered (the HTTP process)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqspipes_mp.ipc.running.asking import ask
from sqspipes_mp.ipc.running.folders import Engine, Unanswered, engines, loads, matches
from sqspipes_mp.ipc.running.health import Verdict, verdict
from sqspipes_mp.ipc.running.history import History
from sqspipes_mp.ipc.running.memory import Gone, Memory, open_memory
from sqspipes_mp.ipc.statistics import ForeignLayout, Statistics

T = TypeVar("T")

#: Seconds for which an answer is used again, so that a flood of requests costs little more than one.
FRESH = 0.5
#: Answers that are kept at once; their keys come from requests.
_ANSWERS = 8
#: Seconds between two orders to count the queues for who looks; the engine counts for 30 s after each.
_LOOK_EVERY = 10.0


class Fresh:
    """Answers that are used again for ``FRESH`` seconds."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, Any]] = {}

    def get(self, key: str, make: Callable[[], T]) -> T:
        """Return the answer of ``key``, made anew where it is too old."""
        now = time.monotonic()
        if key in self._kept and now - self._kept[key][0] < FRESH:
            found: T = self._kept[key][1]
            return found
        made = make()
        if len(self._kept) >= _ANSWERS:
            self._kept.clear()
        self._kept[key] = now, made
        return made


class Looked:
    """One engine."""

    def __init__(self, engine: Engine, memory: Memory) -> None:
        self.engine = engine
        self._memory = memory
        #: None: the engine is of a version with another layout; its health is known all the same.
        self.statistics: Statistics | None = None
        with contextlib.suppress(ForeignLayout):
            self.statistics = Statistics(memory.view)
        self._state: tuple[float, dict[str, Any]] | None = None
        self._history = History()
        self._looked_at = -_LOOK_EVERY

    @classmethod
    def inherited(cls, descriptor: int, run: str, folder: str) -> Looked:
        """Look at the engine whose statistics this process has inherited. Raises ``Gone``.

        ``folder``: the registry's, where the engine takes orders; empty: it takes none.
        """
        memory = Memory(descriptor, run)
        statistics = Statistics(memory.view)
        about = loads(statistics.about or "{}")
        statistics.close()
        return cls(Engine(folder, run, about if isinstance(about, dict) else {}), memory)

    def verdict(self) -> Verdict:
        """Judge whether the engine lives and is ready."""
        return verdict(self._memory.fixed_words(), time.monotonic_ns(), self.engine.stages)

    def state(self) -> dict[str, Any] | None:
        """Return the engine's state with its rates, at most ``FRESH`` seconds old; None: its layout is another."""
        now = time.monotonic()
        if self.statistics is None:
            return None
        if self._state is None or now - self._state[0] >= FRESH:
            self._state = now, self._history.read(self.statistics, here=self.engine.here)
        return self._state[1]

    @property
    def look_is_due(self) -> bool:
        """Whether the engine should be told that somebody looks; the answer is True once in a while."""
        now = time.monotonic()
        if not self.engine.folder or now - self._looked_at < _LOOK_EVERY:
            return False
        self._looked_at = now
        return True

    def ask(self, order: dict[str, Any], patience: float) -> dict[str, Any]:
        """Send an order and return the answer, which may take ``patience`` seconds. Raises ``Unanswered``."""
        if not self.engine.folder:
            raise Unanswered("this run is not registered, so it takes no orders")
        return ask(self.engine, order, patience)

    def close(self) -> None:
        """Let go of the statistics."""
        if self.statistics is not None:
            self.statistics.close()
            self.statistics = None
        self._memory.close()


class Registered:
    """All engines of this user, or those that a person means, as they come and go."""

    def __init__(self, target: str | None) -> None:
        """``target``: as of ``folders.matches``; None: every engine."""
        self._target = target
        self._known: dict[str, Looked] = {}

    def find(self) -> list[Looked]:
        """Look into the registry, and return the engines; this may take long (a stopped supervisor)."""
        alive = {each.run: each for each in engines() if self._target is None or matches(each, self._target)}
        for run, engine in alive.items():
            if run not in self._known:
                # It has ended meanwhile, or cannot be looked at.
                with contextlib.suppress(Gone):
                    self._known[run] = Looked(engine, open_memory(engine))
        return [self._known[run] for run in alive if run in self._known]

    def forget(self, gone: Looked) -> None:
        """Let go of an engine that has ended."""
        self._known.pop(gone.engine.run, None)
        gone.close()
