"""How many CPUs this process may use: affinity and cgroup quotas (any process).

Quotas are Linux's CFS bandwidth limits (kernel documentation: cgroup-v2 ``cpu.max``, sched-bwc
``cpu.cfs_quota_us``); the tightest of all ancestor groups counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

Read = Callable[[str], str | None]


def cpus() -> int:
    """Return min(affinity or ``PYTHON_CPU_COUNT``, quota rounded up), at least 1. Never raises."""
    allowed = _affinity()
    limit = quota(_read)
    return max(1, allowed if limit is None else min(allowed, math.ceil(limit)))


def quota(read: Read) -> float | None:
    """Return the tightest CPU quota of this process's cgroups in CPUs, None for none.

    ``read`` maps a path to a file's text, None where it cannot be read.
    """
    groups = _groups(read("/proc/self/cgroup") or "")
    limits: list[float] = []
    for kind, root, mount in _mounts(read("/proc/self/mountinfo") or ""):
        for folder in _ancestors(groups.get(kind, "/"), root, mount):
            if kind == "v2":
                limits += _limit(*((read(f"{folder}/cpu.max") or "").split() or [""])[:2])
            else:
                period = read(f"{folder}/cpu.cfs_period_us") or ""
                limits += _limit(read(f"{folder}/cpu.cfs_quota_us") or "", period)
    return min(limits, default=None)


def _groups(text: str) -> dict[str, str]:
    """Parse /proc/self/cgroup: this process's group in the v2 tree and in v1's cpu tree."""
    groups = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            groups["v2"] = path
        elif "cpu" in controllers.split(","):
            groups["v1"] = path
    return groups


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """Parse /proc/self/mountinfo: (v2 | v1, the group that is mounted, where) of each tree that can limit CPUs."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        place, filesystem = left.split(), right.split()
        if len(place) < 5 or not filesystem:
            continue
        if filesystem[0] == "cgroup2":
            yield "v2", place[3], place[4]
        elif filesystem[0] == "cgroup" and "cpu" in filesystem[-1].split(","):
            yield "v1", place[3], place[4]


def _ancestors(group: str, root: str, mount: str) -> Iterator[str]:
    """Yield the folders of a group and of all its visible ancestors."""
    path = PurePosixPath(group)
    # In a container without its own cgroup namespace the path is the host's, of which only ``root`` is mounted.
    inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    for part in (inside, *inside.parents) if inside.parts else (inside,):
        yield str(PurePosixPath(mount) / part)


def _limit(quota_text: str, period_text: str = "100000") -> list[float]:
    """Return quota / period, or nothing where there is no limit ("max", -1, unreadable)."""
    try:
        allowed, period = int(quota_text), int(period_text)
    except ValueError:
        return []
    return [allowed / period] if allowed > 0 and period > 0 else []


def _affinity() -> int:
    counted = getattr(os, "process_cpu_count", _usable)()
    return counted if isinstance(counted, int) else 1


def _usable() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
