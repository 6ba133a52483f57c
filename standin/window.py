"""A mapping whose entries expire, at constant cost."""

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Window(Generic[T]):
    """A mapping whose entries expire ``seconds`` after they were put in. ``now``: seconds of any one clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._entries: dict[Hashable, tuple[float, T]] = {}
        self._order: deque[tuple[float, Hashable]] = deque()

    def get(self, key: Hashable, now: float) -> T | None:
        """Return an entry's value; None: there is none, or it has expired."""
        while self._order and self._order[0][0] <= now:
            until, old = self._order.popleft()
            # A key that was put in again has a later place in the order, too.
            if old in self._entries and self._entries[old][0] == until:
                del self._entries[old]
        found = self._entries.get(key)
        return None if found is None else found[1]

    def put(self, key: Hashable, value: T, now: float) -> None:
        """Put an entry in, or renew it."""
        until = now + self._seconds
        self._entries[key] = (until, value)
        self._order.append((until, key))

    def drop(self, key: Hashable) -> None:
        """Remove an entry."""
        self._entries.pop(key, None)
