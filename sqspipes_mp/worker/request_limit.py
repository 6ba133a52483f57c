"""The limit on requests of one kind that are under way at once; a throttled request halves it. Pure (worker).

Need makes it grow: a receive is sent while the messages on their way are fewer than two round trips of work, and a
carrier starts when a full batch waits for one. That is Little's law, rate times round trip over ten, without measuring
either. This limit bounds it, and a throttled request halves it.
"""

from __future__ import annotations

#: Seconds between two halvings, and in which the limit grows by one again.
_STEP = 1.0


class Limit:
    """At most ``most`` requests; fewer for a while after the queue service has throttled one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._throttles = 0
        self._since = float("-inf")

    def allowed(self, under_way: int, throttles: int, now: float) -> int:
        """Return the number that may be under way.

        Args:
            under_way: requests under way now.
            throttles: throttled requests of this connection so far.
            now: monotonic seconds.
        """
        if throttles > self._throttles:
            self._throttles = throttles
            if now - self._since >= _STEP:
                self._limit, self._since = max(1.0, min(self._limit, under_way) / 2), now
        elif self._limit < self._most and now - self._since >= _STEP:
            self._limit, self._since = min(float(self._most), self._limit + (now - self._since) / _STEP), now
        return int(self._limit)
