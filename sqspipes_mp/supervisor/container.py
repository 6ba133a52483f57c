"""The container's memory: use, limit, and the shares at which workers are replaced or killed (supervisor)."""

from __future__ import annotations

from dataclasses import dataclass

from sqspipes_mp.host.cgroups import Read, folders, read_file

#: Share of the limit from which a worker with a large part is replaced after its message, and from which it is killed.
REPLACE_AT, KILL_AT = 0.90, 0.97
#: Seconds that a replacement has to take effect before the next one.
SETTLE = 5.0
#: cgroup v1 says "no limit" with a number this large or larger.
_UNLIMITED = 1 << 60
#: A worker's part is large from a quarter of what is used, or, where there are many workers, from half an even share.
_LARGE, _EVEN = 4, 2


@dataclass(frozen=True, slots=True)
class Fill:
    """What is in memory under a limit, bytes: not only the workers', but the caller's and its neighbours' as well."""

    used: int
    limit: int

    @property
    def share(self) -> float:
        return self.used / self.limit


def has_large_part(gained: int, fill: Fill, workers: int) -> bool:
    """Tell whether replacing a worker that gained so many bytes since its start, one of ``workers``, would help."""
    return gained * max(_LARGE, _EVEN * workers) >= fill.used


def has_most(gained: int, fill: Fill) -> bool:
    """Tell whether a worker that gained so many bytes is the reason: more than all others together."""
    return 2 * gained > fill.used


def pressure(read: Read = read_file) -> Fill | None:
    """Return how full the tightest memory limit of this process's control groups is; None without a limit.

    What the kernel can drop without asking (inactive file cache) does not count.
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
