"""The processes that hold locks on the SQLite file, for people (any process)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

#: Most processes that are named, and most characters of a command.
_NAMED, _LONG = 3, 60


def describe_holders(file: str) -> str:
    """Return ": pid N (command, state), ..." of the other processes that lock the file; "" where it is not known.

    Linux tells it in /proc/locks, of processes that this one can see.
    """
    found = [text for pid in sorted(_pids(file)) if (text := _describe(pid))]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f": {', '.join(found[:_NAMED])}{more}" if found else ""


def _pids(file: str) -> set[int]:
    """Return the other processes with a lock on the database or a file beside it."""
    inodes: set[str] = set()
    for path in (file, f"{file}-wal", f"{file}-shm"):
        with contextlib.suppress(OSError):
            inodes.add(str(os.stat(path).st_ino))  # noqa: PTH116  (the number alone)
    pids: set[int] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            # "1: POSIX  ADVISORY  WRITE 1234 08:01:131090 0 EOF"; a waiting one has "->" behind the number.
            fields = line.split()
            if "->" not in fields and len(fields) >= 6 and fields[5].rpartition(":")[2] in inodes:
                pids.add(int(fields[4]))
    return pids - {os.getpid()}


def _describe(pid: int) -> str:
    """Return a process's number, command and state, as far as they are known; "" where it is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    command = "".join(char if char.isprintable() else "?" for char in words[:_LONG])
    return f"pid {pid} ({command}{', stopped' if state in 'Tt' else ''})"
