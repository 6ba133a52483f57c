"""Members that must not cross a fork: SQLite handles and the lock of a map (any process that has one open).

Locks of an open database belong to the process that took them, and SQLite's own tables about them would be copied
into a child that holds none: a child that opened the file again could then corrupt it. So every handle is closed just
before ``os.fork`` and opened again at its next use, on both sides.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Protocol

#: Seconds a fork waits for another thread's transaction before it goes on without closing that handle.
PATIENCE = 10.0


class Forkable(Protocol):
    """What must not be inherited."""

    def hold(self, patience: float) -> None:
        """Before a fork: close what a child must not inherit, and keep other threads from opening it again."""

    def resume(self, *, child: bool) -> None:
        """After a fork, on both sides: let threads in again."""


_members: weakref.WeakSet[Forkable] = weakref.WeakSet()
_held: list[Forkable] = []
_guard = threading.RLock()


def protect(member: Forkable) -> None:
    """Have a member closed around forks, for as long as it lives."""
    with _guard:
        _members.add(member)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Let other threads fork only after this block, which opens a file for a moment."""
    with _guard:
        yield


def _before() -> None:
    # One fork at a time: two of them would wait for each other's members.
    _guard.acquire()
    _held.extend(_members)
    for member in _held:
        member.hold(PATIENCE)


def _after(*, child: bool) -> None:
    for member in reversed(_held):
        member.resume(child=child)
    _held.clear()
    _guard.release()


os.register_at_fork(
    before=_before, after_in_parent=lambda: _after(child=False), after_in_child=lambda: _after(child=True)
)
