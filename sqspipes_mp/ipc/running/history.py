"""An engine's states one after another, of which rates are made (any process)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from sqspipes_mp.ipc.running.state import state
from sqspipes_mp.ipc.statistics import Statistics

#: Seconds over which rates are made: long enough that a rate does not jump, short enough to be now.
WINDOW = 3.0
#: Seconds over which the pace is made that says how long waiting messages will take.
STEADY = 60.0


class History:
    """The states of one run, as somebody looks at them."""

    def __init__(self) -> None:
        self._recent: deque[Mapping[str, Any]] = deque()
        #: No more than the pace needs, of each state.
        self._paces: deque[Mapping[str, Any]] = deque()

    def read(self, statistics: Statistics, *, here: bool = True) -> dict[str, Any]:
        """Return the state now, with its rates; arguments as of ``state``."""
        if self._recent and time.time() - self._recent[-1]["at"] > STEADY:
            # Nobody has looked for long: rates since then would not be those of now.
            self.clear()
        since = self._recent[0] if self._recent else None
        now = state(statistics, here=here, since=since, steady=self._paces[0] if self._paces else since)
        stages = [{"name": stage["name"], "done": stage["done"]} for stage in now["stages"]]
        for kept, one, most in (
            (self._recent, now, WINDOW),
            (self._paces, {"at": now["at"], "stages": stages}, STEADY),
        ):
            kept.append(one)
            while len(kept) > 1 and now["at"] - kept[1]["at"] >= most:
                kept.popleft()
        return now

    def clear(self) -> None:
        """Forget a run."""
        self._recent.clear()
        self._paces.clear()
