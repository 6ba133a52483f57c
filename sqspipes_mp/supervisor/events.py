"""The supervisor's events: one selector over deaths, children, signals and the caller. No decision is made here."""

from __future__ import annotations

import contextlib
import selectors
from collections.abc import Callable, Mapping
from typing import Any

from sqspipes_mp.ipc.channel import BadFrame, Frame, Kind, ParentChannel
from sqspipes_mp.supervisor.child import Child

#: Takes a frame of a child's.
Heard = Callable[[Frame], None]


class Events:
    """Calls back for each event; ``wait`` is the only place where the supervisor blocks."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def fds(self) -> list[int]:
        """Return the selector's own descriptor, where it has one."""
        fileno = getattr(self._selector, "fileno", None)
        return [fileno()] if fileno is not None else []

    def wait(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds and call back."""
        for key, _ in self._selector.select(max(0.0, timeout)):
            # An earlier callback of this turn may have hung up, and a new connection may even have the number.
            with contextlib.suppress(KeyError):
                if self._selector.get_key(key.fd).data is key.data:
                    key.data()

    def connect(self, fileobj: Any, callback: Callable[[], None]) -> None:
        """Call back when ``fileobj`` is readable."""
        self._selector.register(
            fileobj if isinstance(fileobj, int) else fileobj.fileno(), selectors.EVENT_READ, callback
        )

    def listen_for(self, fileobj: Any, *, read: bool, write: bool) -> None:
        """Call back for a connected ``fileobj`` when it is readable, or writable, from now on."""
        events = selectors.EVENT_READ * read | selectors.EVENT_WRITE * write
        with contextlib.suppress(KeyError):
            key = self._selector.get_key(fileobj.fileno())
            if not events:
                # The end of the connection alone wakes, which each selector tells unasked.
                events = selectors.EVENT_READ
            if key.events != events:
                self._selector.modify(key.fileobj, events, key.data)

    def hang_up(self, fileobj: Any) -> None:
        """Call back for ``fileobj`` no more."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def adopt(self, child: Child, died: Callable[[], None], heard: Heard) -> None:
        """Call ``heard`` for each frame of a child and ``died`` for its death, after its last frame."""

        def listen() -> None:
            self._hear(child, heard)
            if child.channel.eof:
                self.hang_up(child.channel)
            else:
                self.send(child.channel)

        def dead() -> None:
            while self._hear(child, heard) and not child.channel.eof:
                pass
            self.hang_up(child.channel)
            self.hang_up(child.watch)
            died()

        self.connect(child.channel, listen)
        self.connect(child.watch, dead)

    def _hear(self, child: Child, heard: Heard) -> bool:
        try:
            frames = child.channel.read()
        except BadFrame:
            # The child writes no frames any more: the user's code has taken the descriptor.
            child.kill()
            self.hang_up(child.channel)
            return False
        for frame in frames:
            heard(frame)
        return bool(frames)

    def tell(
        self, channel: ParentChannel, kind: Kind, header: Mapping[str, Any] | None = None, blob: bytes = b""
    ) -> None:
        """Send a frame. Raises ``FrameTooLarge``."""
        channel.queue(kind, header, blob)
        self.send(channel)

    def send(self, channel: ParentChannel) -> None:
        """Write as much as the socket takes now, and the rest when it takes more."""
        done = channel.flush()
        with contextlib.suppress(KeyError):
            key = self._selector.get_key(channel.fileno())
            events = selectors.EVENT_READ if done else selectors.EVENT_READ | selectors.EVENT_WRITE
            if key.events != events:
                self._selector.modify(key.fileobj, events, key.data)

    def close(self) -> None:
        """Close the selector."""
        self._selector.close()
