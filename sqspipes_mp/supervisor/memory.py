"""How much memory a worker has of its own, against ``Task(max_memory=)``. The only psutil import (supervisor)."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from sqspipes_mp.host.memory import memory_of
from sqspipes_mp.pipeline.plan import RunPlan

#: Seconds between two looks at one worker.
LOOK_EVERY = 1.0
#: Over so many times its limit a worker is killed rather than asked.
_FAR_OVER = 1.5


@dataclass(slots=True)
class _Seen:
    pid: int
    baseline: int
    looked_at: float = 0.0
    asked: bool = False


class MemoryWatch:
    """Private memory above what a worker had when it got ready: the pages it inherited are not its own.

    ``contained``: there is a limit for all of them together, so that each one's part may be asked for.
    """

    def __init__(self, plan: RunPlan, *, contained: bool) -> None:
        tasks = {index: plan.pipeline.stages[index].task for index in plan.selected}
        self._limits = {index: task.max_memory for index, task in tasks.items() if task.max_memory is not None}
        self._contained = contained
        self._seen: dict[int, _Seen] = {}

    @property
    def wanted(self) -> bool:
        return bool(self._limits)

    def ready(self, slot: int, pid: int) -> None:
        """Take the baseline of a worker that has just booted (after its ``init``)."""
        if self._limits or self._contained:
            self._seen[slot] = _Seen(pid, private_bytes(pid))

    def gone(self, slot: int) -> None:
        self._seen.pop(slot, None)

    def gained(self, slot: int) -> int:
        """Return the bytes that a worker has gained since it got ready, 0 where that is not known."""
        seen = self._seen.get(slot)
        return 0 if seen is None else max(0, private_bytes(seen.pid) - seen.baseline)

    def own(self, slot: int, before: int | None) -> int:
        """Return the bytes by which a running call made its worker grow, which had ``before`` when the call began.

        None: no call runs, so it is 0. Where ``before`` is not known (0) it is all that the worker has gained.
        """
        if before is None:
            return 0
        seen = self._seen.get(slot)
        if seen is None or not before:
            return self.gained(slot)
        return max(0, memory_of(seen.pid) - before)

    def look(self, slot: int, stage: int, now: float, before: int | None) -> str | None:
        """Return "replace" (once) or "kill" for a worker over its limit, else None; at most one look a second.

        ``before``: as of ``own``. It is killed only for growth that is the running call's own.
        """
        seen, limit = self._seen.get(slot), self._limits.get(stage)
        if seen is None or limit is None or now - seen.looked_at < LOOK_EVERY:
            return None
        seen.looked_at = now
        used = private_bytes(seen.pid) - seen.baseline
        if used > limit * _FAR_OVER and self.own(slot, before) > limit * (_FAR_OVER - 1):
            return "kill"
        if used > limit and not seen.asked:
            seen.asked = True
            return "replace"
        return None


def private_bytes(pid: int) -> int:
    """Return the bytes that only this process has; 0 once it is gone."""
    try:
        process = psutil.Process(pid)
        # The walk of the whole mapping; resident memory would count what it shares with its parent.
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0
