"""How near the container is to the memory limit at which the kernel kills something, or all, in it (supervisor)."""

from __future__ import annotations

from sqspipes_mp.cgroups import Read, folders, read_file

#: Share of the limit from which the fattest worker is replaced after its message, and from which it is killed.
REPLACE_AT, KILL_AT = 0.90, 0.97
#: Seconds that a replacement has to take effect before the next one.
SETTLE = 5.0
#: cgroup v1 says "no limit" with a number this large or larger.
_UNLIMITED = 1 << 60


def pressure(read: Read = read_file) -> float | None:
    """Return the used share of the tightest memory limit of this process's control groups; None without a limit.

    What the kernel can drop without asking (inactive file cache) does not count.
    """
    shares = [share for kind, folder in folders(read, "memory") if (share := _share(kind, folder, read)) is not None]
    return max(shares, default=None)


def _share(kind: str, folder: str, read: Read) -> float | None:
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
    return max(0, used - droppable) / limit


def _number(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None
