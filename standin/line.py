"""The line of long polls of one queue. Events and one timer wake it; it never polls."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Timer(Protocol):
    """A call that the event loop makes later, unless it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """The stand-in's time, which tests may move forward, and timers of the event loop."""

    def now(self) -> float: ...

    def call_at(self, when: float, do: Callable[[], None]) -> Timer: ...

    def call_later(self, seconds: float, do: Callable[[], None]) -> Timer: ...


@dataclass(slots=True, eq=False)
class Waiter:
    """One long poll."""

    #: Answers the poll if the queue has a message; tells whether it has.
    serve: Callable[[], bool]
    #: Answers the poll without a message.
    give_up: Callable[[], None]
    #: False once the poll was answered, or its client is gone.
    open: bool = True
    #: Timer of its end.
    end: Timer | None = None

    def close(self) -> None:
        """Take the poll for answered."""
        self.open = False
        if self.end is not None:
            self.end.cancel()


@dataclass(slots=True, eq=False)
class Line:
    """Long polls that wait: first come, first served."""

    clock: Clock
    #: Shows the messages that are due; returns the time at which the next one is due, None without one.
    next_due: Callable[[], float | None] = lambda: None
    waiting: deque[Waiter] = field(default_factory=deque)
    _alarm: Timer | None = None
    _alarm_at: float = 0.0

    def wait(self, waiter: Waiter, seconds: float) -> None:
        """Put a long poll into the line, for at most ``seconds``."""

        def over() -> None:
            waiter.open = False
            waiter.give_up()

        waiter.end = self.clock.call_later(seconds, over)
        self.waiting.append(waiter)
        self._set_alarm()

    def stir(self) -> None:
        """Serve long polls in their order until one finds no message."""
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
        """Answer all long polls without a message: the queue is being deleted."""
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
