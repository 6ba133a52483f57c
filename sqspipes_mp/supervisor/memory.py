"""Memory: of each worker against ``Task(max_memory=)``, and of the container. The only psutil import (supervisor)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import psutil

from sqspipes_mp.host.cgroups import Read, folders, read_file
from sqspipes_mp.host.memory import memory_of
from sqspipes_mp.pipeline.plan import RunPlan

#: Seconds between two looks at one worker, and at the container.
LOOK_EVERY = 1.0
#: Multiple of ``max_memory`` above which a worker is killed; up to there it is replaced after its message.
_FAR_OVER = 1.5
#: Share of the container's limit from which a worker with a large part is replaced after its message, and from which it
#: is killed.
REPLACE_AT, KILL_AT = 0.90, 0.97
#: Seconds that the replacement of a worker has to take effect before the next one.
SETTLE = 5.0
#: cgroup v1 says "no limit" with a number this large or larger.
_UNLIMITED = 1 << 60
#: A worker's part of the container is large from a quarter of its use, or from half an even share of many workers.
_LARGE, _EVEN = 4, 2


@dataclass(slots=True)
class _Worker:
    """A worker as it is measured."""

    pid: int
    #: Private bytes when the worker got ready.
    baseline: int
    #: When it was last measured, monotonic seconds.
    looked_at: float = 0.0
    #: Whether its replacement was asked for.
    asked: bool = False


class MemoryWatch:
    """Measures the private memory of workers beyond their baseline; pages inherited from the parent do not count."""

    def __init__(self, plan: RunPlan, *, contained: bool) -> None:
        """Measure workers of tasks with ``max_memory``, and, where they are ``contained`` together, all workers."""
        tasks = {index: plan.pipeline.stages[index].task for index in plan.selected}
        self._limits = {index: task.max_memory for index, task in tasks.items() if task.max_memory is not None}
        self._contained = contained
        self._workers: dict[int, _Worker] = {}

    @property
    def wanted(self) -> bool:
        """Whether any task has ``max_memory``."""
        return bool(self._limits)

    def ready(self, slot: int, pid: int) -> None:
        """Take the baseline of a worker that has just booted (after its ``init``)."""
        if self._limits or self._contained:
            self._workers[slot] = _Worker(pid, private_bytes(pid))

    def gone(self, slot: int) -> None:
        """Forget a slot's worker, which is dead."""
        self._workers.pop(slot, None)

    def gained(self, slot: int) -> int:
        """Return the bytes that a worker has gained since it got ready; 0 where that is not known."""
        worker = self._workers.get(slot)
        return 0 if worker is None else max(0, private_bytes(worker.pid) - worker.baseline)

    def own(self, slot: int, before: int | None) -> int:
        """Return the bytes by which a running call has made its worker grow.

        ``before``: the worker's bytes when the call began. None: no call runs, which is 0. 0: not known, so that all
        that the worker has gained counts.
        """
        if before is None:
            return 0
        worker = self._workers.get(slot)
        if worker is None or not before:
            return self.gained(slot)
        return max(0, memory_of(worker.pid) - before)

    def look(self, slot: int, stage: int, now: float, before: int | None) -> Literal["replace", "kill"] | None:
        """Measure a worker, once in ``LOOK_EVERY`` seconds, and return the measure to take.

        "replace" (once): the worker is over its limit. "kill": it is far over, and by growth of its running call.

        Args:
            slot: the worker's.
            stage: the worker's.
            now: monotonic seconds.
            before: as of ``own``.
        """
        worker, limit = self._workers.get(slot), self._limits.get(stage)
        if worker is None or limit is None or now - worker.looked_at < LOOK_EVERY:
            return None
        worker.looked_at = now
        used = private_bytes(worker.pid) - worker.baseline
        if used > limit * _FAR_OVER and self.own(slot, before) > limit * (_FAR_OVER - 1):
            return "kill"
        if used > limit and not worker.asked:
            worker.asked = True
            return "replace"
        return None


def private_bytes(pid: int) -> int:
    """Return the bytes that only this process has; 0 once it is gone."""
    try:
        process = psutil.Process(pid)
        # The kernel walks the whole mapping for it; resident memory would count pages shared with the parent.
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0


@dataclass(frozen=True, slots=True)
class Fill:
    """The memory of a container: of the workers, the caller and all other processes in it."""

    #: Bytes in use.
    used: int
    #: Bytes that may be in use.
    limit: int

    @property
    def share(self) -> float:
        """Bytes in use for each byte of the limit."""
        return self.used / self.limit


def has_large_part(gained: int, fill: Fill, workers: int) -> bool:
    """Tell whether the replacement of a worker that has ``gained`` bytes, one of ``workers``, would make room."""
    return gained * max(_LARGE, _EVEN * workers) >= fill.used


def has_most(gained: int, fill: Fill) -> bool:
    """Tell whether a worker that has ``gained`` bytes has more than all other processes together."""
    return 2 * gained > fill.used


def pressure(read: Read = read_file) -> Fill | None:
    """Return the fill of the tightest memory limit of this process's control groups; None without a limit.

    Memory that the kernel can drop at once (inactive file cache) does not count as used.
    """
    fills = [fill for kind, folder in folders(read, "memory") if (fill := _fill(kind, folder, read)) is not None]
    return max(fills, key=lambda fill: fill.share, default=None)


def _fill(kind: str, folder: str, read: Read) -> Fill | None:
    v2 = kind == "v2"
    limit = _number(read(f"{folder}/memory.max" if v2 else f"{folder}/memory.limit_in_bytes"))
    used = _number(read(f"{folder}/memory.current" if v2 else f"{folder}/memory.usage_in_bytes"))
    if limit is None or used is None or not 0 < limit < _UNLIMITED:
        return None
    droppable = 0
    name = "inactive_file" if v2 else "total_inactive_file"
    for line in (read(f"{folder}/memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            droppable = _number(value) or 0
    return Fill(max(0, used - droppable), limit)


def _number(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None
