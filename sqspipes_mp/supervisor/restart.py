"""The restart policy: backoff, crash budget, boot failures. Pure: times come in, decisions go out."""

from __future__ import annotations

from dataclasses import dataclass, field

#: Wait before a restart, seconds: the first, doubling to the longest.
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
#: Boot failures of one stage in a row after which the engine stops.
BOOT_FAILURES = 5
#: Seconds for which the system may let no child start, with no worker alive, before the engine stops.
START_PATIENCE = 20.0
#: Deaths of one stage within so many seconds after which the engine drains.
CRASHES, WINDOW = 10, 60.0


@dataclass(frozen=True, slots=True)
class RestartAt:
    """Fill the seat again at ``when`` (monotonic s), ``delay`` seconds from now."""

    when: float
    delay: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Stop: ``booting`` (it never got ready) or the crash budget is spent; ``deaths`` counts them."""

    booting: bool
    deaths: int


@dataclass(slots=True)
class RestartPolicy:
    """One stage's deaths. Progress of any of its workers, or a long life, resets budget and backoff."""

    crashes: list[float] = field(default_factory=list)
    boots: int = 0
    streak: int = 0
    done: int = 0

    def died(self, now: float, *, ready: bool, lived: float, done: int, charged: bool) -> RestartAt | GiveUp:
        """Take note of a death.

        Args:
            now: monotonic seconds.
            ready: whether the worker had booted.
            lived: seconds since its start.
            done: messages the stage's workers have completed so far, all of them together.
            charged: whether a message was charged with its death; then the message's attempts are the limit.
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
        """Take note that a worker had no memory for the messages themselves; None: its successor may start at once.

        Its arguments are those of ``died``. There is no use in forking workers as fast as they find that out, unless
        the stage gets something done in between; but they cost no budget.
        """
        return None if self._progressed(lived, done) else self._later(now)

    def booted(self) -> None:
        """Take note that a worker got ready."""
        self.boots = 0

    def _progressed(self, lived: float, done: int) -> bool:
        """Tell whether anything was completed since the last death; that, or a long life, resets budget and backoff."""
        progressed, self.done = done > self.done, done
        if progressed or lived >= WINDOW:
            self.crashes.clear()
            self.streak = 0
        return progressed

    def _later(self, now: float) -> RestartAt:
        delay = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(self.streak, 10))
        self.streak += 1
        return RestartAt(now + delay, delay)


@dataclass(slots=True)
class Starts:
    """Starts that the system refused: no process, memory or descriptor left. While a worker lives, none is given up."""

    since: float | None = None
    streaks: dict[int, int] = field(default_factory=dict)

    def refused(self, now: float, seat: int, *, alive: bool) -> RestartAt | GiveUp:
        """Take note that the child of a seat could not be started at ``now`` (monotonic s).

        ``alive``: whether any worker lives.
        """
        if alive or self.since is None:
            self.since = now
        streak = self.streaks[seat] = self.streaks.get(seat, 0) + 1
        if not alive and now - self.since >= START_PATIENCE:
            return GiveUp(booting=True, deaths=streak)
        delay = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(streak - 1, 10))
        return RestartAt(now + delay, delay)

    def started(self, seat: int) -> None:
        """Take note that a child was started."""
        self.since = None
        self.streaks.pop(seat, None)
