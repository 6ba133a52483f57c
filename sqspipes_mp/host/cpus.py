"""The number of CPUs that this process may use: affinity and cgroup quotas (any process).

Quotas are Linux's CFS bandwidth limits (kernel documentation: cgroup-v2 ``cpu.max``, sched-bwc ``cpu.cfs_quota_us``);
the smallest quota among the group and its ancestors counts.
"""

from __future__ import annotations

import math
import os

from sqspipes_mp.host.cgroups import Read, folders, read_file


def cpus() -> int:
    """Return the smaller of affinity (or ``PYTHON_CPU_COUNT``) and quota rounded up, at least 1. Never raises."""
    allowed = _affinity()
    limit = quota(read_file)
    return max(1, allowed if limit is None else min(allowed, math.ceil(limit)))


def quota(read: Read) -> float | None:
    """Return the smallest quota of this process's cgroups, in CPUs; None where there is none.

    ``read`` maps a path to a file's text; None where it cannot be read.
    """
    limits: list[float] = []
    for kind, folder in folders(read, "cpu"):
        if kind == "v2":
            limits += _limit(*((read(f"{folder}/cpu.max") or "").split() or [""])[:2])
        else:
            period = read(f"{folder}/cpu.cfs_period_us") or ""
            limits += _limit(read(f"{folder}/cpu.cfs_quota_us") or "", period)
    return min(limits, default=None)


def _limit(quota_text: str, period_text: str = "100000") -> list[float]:
    """Return [quota / period]; an empty list where there is no limit ("max", -1, unreadable)."""
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
