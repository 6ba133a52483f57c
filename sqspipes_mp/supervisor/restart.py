"""The restart policy of a stage: backoff, crash budget, boot failures. Pure: times come in, decisions go out."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqspipes_mp.messages.attempts import exponential

#: Backoff of a restart, seconds: the first, doubling to the longest.
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
#: Boot failures of one stage in a row after which the engine stops.
BOOT_FAILURES = 5
#: Seconds after which the engine stops where the system lets no child start and no worker lives.
START_PATIENCE = 20.0
#: The crash budget of a stage: deaths, and the seconds within which they come, after which the engine drains.
CRASHES, WINDOW = 10, 60.0


@dataclass(frozen=True, slots=True)
class RestartAt:
    """Start the next worker later."""

    #: Monotonic seconds.
    when: float
    #: Seconds until then.
    delay: float


def _later(now: float, streak: int) -> RestartAt:
    """Return the restart after ``streak`` deaths or refused starts in a row; ``now``: monotonic seconds."""
    delay = exponential(FIRST_BACKOFF, streak - 1, LONGEST_BACKOFF)
    return RestartAt(now + delay, delay)


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Stop the engine."""

    #: True: workers do not get ready. False: the crash budget is spent.
    booting: bool
    #: The deaths, or the refused starts, that led to it.
    deaths: int


@dataclass(slots=True)
class RestartPolicy:
    """One stage's deaths. Progress of any of its workers, or a long life, resets budget and backoff."""

    #: When workers died that count towards the crash budget, monotonic seconds.
    crashes: list[float] = field(default_factory=list)
    #: Boot failures in a row.
    boots: int = 0
    #: Restarts since the last reset.
    streak: int = 0
    #: Messages that the stage had completed at the last death.
    done: int = 0

    def died(self, now: float, *, ready: bool, lived: float, done: int, charged: bool) -> RestartAt | GiveUp:
        """Take note of a death.

        Args:
            now: monotonic seconds.
            ready: whether the worker had booted.
            lived: seconds since its start.
            done: messages the stage's workers have completed so far, all of them together.
            charged: whether a message is charged with the death; then the message's attempts are the limit.
        """
        if not ready:
            self.boots += 1
            if self.boots >= BOOT_FAILURES:
                return GiveUp(booting=True, deaths=self.boots)
            return self._later(now)
        self.boots = 0
        progressed = self._progressed(lived, done)
        if not (progressed or lived >= WINDOW or charged):
            self.crashes = [at for at in self.crashes if now - at < WINDOW]
            self.crashes.append(now)
            if len(self.crashes) >= CRASHES:
                return GiveUp(booting=False, deaths=len(self.crashes))
        return self._later(now)

    def starved(self, now: float, *, lived: float, done: int) -> RestartAt | None:
        """Take note of a worker without memory for the messages themselves; None: its successor may start at once.

        The arguments are those of ``died``. Without progress of the stage, a successor at once would be forked in vain.
        Such a worker costs no budget.
        """
        return None if self._progressed(lived, done) else self._later(now)

    def booted(self) -> None:
        """Take note that a worker got ready."""
        self.boots = 0

    def _progressed(self, lived: float, done: int) -> bool:
        """Tell whether the stage progressed; for that, or a long life, reset budget and backoff."""
        progressed, self.done = done > self.done, done
        if progressed or lived >= WINDOW:
            self.crashes.clear()
            self.streak = 0
        return progressed

    def _later(self, now: float) -> RestartAt:
        self.streak += 1
        return _later(now, self.streak)


@dataclass(slots=True)
class Starts:
    """Starts that the system refused, out of processes, memory or descriptors; not given up while a worker lives."""

    #: When the first start was refused since a worker lived, monotonic seconds.
    since: float | None = None
    #: Refused starts in a row, by the child's key.
    streaks: dict[int, int] = field(default_factory=dict)

    def refused(self, now: float, key: int, *, alive: bool) -> RestartAt | GiveUp:
        """Take note of a refused start.

        Args:
            now: monotonic seconds.
            key: the child's: a slot's index, or the keeper's key.
            alive: whether any worker lives.
        """
        if alive or self.since is None:
            self.since = now
        streak = self.streaks[key] = self.streaks.get(key, 0) + 1
        if not alive and now - self.since >= START_PATIENCE:
            return GiveUp(booting=True, deaths=streak)
        return _later(now, streak)

    def started(self, key: int) -> None:
        """Take note that a child was started."""
        self.since = None
        self.streaks.pop(key, None)
