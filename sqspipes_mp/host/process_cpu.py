"""The CPU time of another process, and of the whole machine, as the kernel counts it (any process)."""

from __future__ import annotations

import os
from pathlib import Path

#: Nanoseconds of a tick in /proc/PID/stat.
_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def cpu_of(pid: int) -> int:
    """Return the nanoseconds of CPU that a process and its ended children have had; 0 where it is not known.

    A process that is dead and not reaped counts still.
    """
    try:
        # proc(5): the name, in brackets, may hold anything; utime, stime, cutime and cstime are fields 14 to 17.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return sum(map(int, fields[11:15])) * _TICK
    except (OSError, ValueError):
        return 0


def cpu_of_machine() -> tuple[float, float] | None:
    """Return the CPU seconds in use, and those that there were, of all CPUs since the machine's start; None: not known.

    CPU time that a hypervisor gave to others counts as in use.
    """
    try:
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user and nice already.
        with Path("/proc/stat").open("rb") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) * _TICK / 1e9, sum(ticks) * _TICK / 1e9
    except (OSError, ValueError, IndexError):
        return None
