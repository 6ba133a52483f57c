"""Faults of requests, drawn from seeded dice or planned by a test."""

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

from standin.errors import SqsError
from standin.options import Faults

#: Faults that a test may plan for the next requests of an operation.
KINDS = ("throttle", "error", "reset_before", "lost_reply", "slow", "partial", "denied")


@dataclass(frozen=True, slots=True)
class Fate:
    """The faults of one request."""

    #: The error to answer with; None: the request is done.
    refuse: SqsError | None = None
    #: Reset the connection, with nothing done.
    reset_before: bool = False
    #: Reset the connection instead of a reply, with everything done.
    lost_reply: bool = False
    #: Send the reply in pieces.
    slow: bool = False
    #: Seconds before the reply.
    delay: float = 0.0
    #: Positions of the batch entries that fail; None: drawn for each entry.
    partial: frozenset[int] | None = None


FINE = Fate(partial=frozenset())


@dataclass(slots=True)
class Dice:
    """Decides about faults. Each operation has dice of its own, so that polls do not change the fate of sends."""

    faults: Faults
    seed: int
    #: Number of faults so far, by kind.
    hits: dict[str, int] = field(default_factory=dict)
    #: Planned faults by operation: kind, and the positions of failing entries.
    plans: dict[str, deque[tuple[str, frozenset[int]]]] = field(default_factory=dict)
    _dice: dict[str, Random] = field(default_factory=dict)

    def plan(self, operation: str, kind: str, times: int, entries: list[int]) -> None:
        """Plan a fault for the next ``times`` requests of an operation. Raises ``ValueError`` for an unknown kind."""
        if kind not in KINDS:
            raise ValueError(f"no fault {kind!r}: {KINDS}")
        self.plans.setdefault(operation, deque()).extend([(kind, frozenset(entries))] * times)

    def fate(self, operation: str) -> Fate:
        """Return the fate of a request."""
        faults = self.faults
        delay = faults.latency_ms / 1000
        if faults.jitter_ms:
            delay += self._of("delay").random() * faults.jitter_ms / 1000
        planned = self.plans.get(operation)
        if planned:
            kind, entries = planned.popleft()
            self._hit(kind)
            return self._made(operation, kind, delay, entries)
        if faults.only and operation not in faults.only:
            return Fate(delay=delay, partial=frozenset()) if delay else FINE
        kind = ""
        for each in ("throttle", "error", "reset_before", "lost_reply", "slow"):
            chance = getattr(faults, each)
            # Each kind is drawn, also after one has come up: their streams stay independent.
            if chance and self._of(f"{operation} {each}").random() < chance and not kind:
                kind = each
        if kind:
            self._hit(kind)
            return self._made(operation, kind, delay, None)
        return Fate(delay=delay) if delay or faults.partial else FINE

    def entry_fails(self, operation: str, fate: Fate, position: int) -> bool:
        """Decide whether one entry of a batch fails."""
        if fate.partial is not None:
            return position in fate.partial
        chance = self.faults.partial
        if chance and self._of(f"{operation} partial").random() < chance:
            self._hit("partial")
            return True
        return False

    def misses(self) -> bool:
        """Decide whether a short poll finds nothing, whatever the queue has."""
        return self._rolls("miss", self.faults.miss)

    def duplicate(self) -> str:
        """Decide whether a message comes once more: "twice" while in flight, "again" after its delete, or ""."""
        if not self._rolls("duplicate", self.faults.duplicate):
            return ""
        return "twice" if self._of("duplicate").random() < 0.5 else "again"

    def _rolls(self, name: str, chance: float) -> bool:
        if chance and self._of(name).random() < chance:
            self._hit(name)
            return True
        return False

    def _made(self, operation: str, kind: str, delay: float, entries: frozenset[int] | None) -> Fate:
        first = self._of(f"{operation} kind").random() < 0.5
        match kind:
            case "throttle":
                name = "ThrottlingException" if first else "RequestThrottled"
                return Fate(refuse=SqsError(name, "Rate exceeded"), delay=delay)
            case "error":
                name = "ServiceUnavailable" if first else "InternalFailure"
                return Fate(refuse=SqsError(name, "The request has failed on the server's side."), delay=delay)
            case "denied":
                return Fate(refuse=SqsError("AccessDeniedException", "Access to the resource is denied."), delay=delay)
            case "partial":
                return Fate(partial=entries or frozenset({0}), delay=delay)
        flags: dict[str, Any] = {kind: True}
        return Fate(delay=delay, partial=None if entries is None else frozenset(), **flags)

    def _of(self, name: str) -> Random:
        dice = self._dice.get(name)
        if dice is None:
            dice = self._dice[name] = Random(f"{self.seed} {name}")
        return dice

    def _hit(self, kind: str) -> None:
        self.hits[kind] = self.hits.get(kind, 0) + 1
