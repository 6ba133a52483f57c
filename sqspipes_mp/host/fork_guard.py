"""Closes SQLite handles and the map's lock before ``os.fork``, and lets them reopen after it (any process).

The locks of an open database belong to the process that took them, but a fork copies SQLite's own table of them into a
child, which holds none of them: a child that opens the file again could corrupt it. So every handle is closed just
before ``os.fork`` and opened again at its next use, on both sides.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Protocol

#: Longest wait of a fork for another thread's transaction, seconds; the fork then leaves that handle open.
PATIENCE = 10.0


class Forkable(Protocol):
    """A member that a child must not inherit."""

    def hold(self, patience: float) -> None:
        """Before a fork: close the member, and keep other threads from opening it again.

        ``patience``: longest wait for another thread, seconds.
        """

    def resume(self, *, child: bool) -> None:
        """After a fork, on both sides: let threads in again."""


_members: weakref.WeakSet[Forkable] = weakref.WeakSet()
_held: list[Forkable] = []
_guard = threading.RLock()


def protect(member: Forkable) -> None:
    """Have a member closed around forks, for as long as the member lives."""
    with _guard:
        _members.add(member)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Keep other threads from forking during the block, which opens a file for a moment."""
    with _guard:
        yield


def _before() -> None:
    # One fork at a time: two would wait for each other's members.
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
