"""Who waits in a long poll of one queue. Woken by what happens and by one timer, never by looking again and again."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Timer(Protocol):
    """What the event loop calls later, unless it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """The time, which tests may move forward, and timers of the event loop."""

    def now(self) -> float: ...

    def call_at(self, when: float, do: Callable[[], None]) -> Timer: ...

    def call_later(self, seconds: float, do: Callable[[], None]) -> Timer: ...


@dataclass(slots=True, eq=False)
class Waiter:
    """One long poll. ``serve`` answers it if it can and tells so; ``give_up`` answers it with nothing."""

    serve: Callable[[], bool]
    give_up: Callable[[], None]
    open: bool = True
    end: Timer | None = None

    def close(self) -> None:
        self.open = False
        if self.end is not None:
            self.end.cancel()


@dataclass(slots=True, eq=False)
class Line:
    """First come, first served. ``next_due``: when the queue's next hidden message is due, after showing those due."""

    clock: Clock
    next_due: Callable[[], float | None] = lambda: None
    waiting: deque[Waiter] = field(default_factory=deque)
    _alarm: Timer | None = None
    _alarm_at: float = 0.0

    def wait(self, waiter: Waiter, seconds: float) -> None:
        """Join the line for so many seconds."""

        def over() -> None:
            waiter.open = False
            waiter.give_up()

        waiter.end = self.clock.call_later(seconds, over)
        self.waiting.append(waiter)
        self._set_alarm()

    def stir(self) -> None:
        """Serve those who wait, as far as it goes: something may have become visible."""
        waiting = self.waiting
        while waiting:
            if waiting[0].open:
                if not waiting[0].serve():
                    break
                waiting[0].close()
            waiting.popleft()
        if waiting:
            self._set_alarm()

    def dismiss(self) -> None:
        """Send everybody away: the queue is being deleted."""
        while self.waiting:
            waiter = self.waiting.popleft()
            if waiter.open:
                waiter.close()
                waiter.give_up()

    def _set_alarm(self) -> None:
        due = self.next_due()
        if due is None or (self._alarm is not None and self._alarm_at <= due):
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = due
        self._alarm = self.clock.call_at(due, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self.stir()
