"""The title of a process, as ps and top show it (children)."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

#: Bytes of a process's name on Linux (proc(5), /proc/pid/comm), without the end.
_COMM = 15


def set_title(domain: str, role: str) -> None:
    """Name this process ``sqspipes_mp: DOMAIN ROLE`` where setproctitle is installed, else by its role alone.

    ``role``: "reduce/1", say. Without setproctitle a name has room for 15 bytes (Linux), of which the last are kept.
    """
    try:
        setproctitle = importlib.import_module("setproctitle").setproctitle
    except ImportError:
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_bytes(role.encode("utf-8", "replace")[-_COMM:])
    else:
        setproctitle(f"sqspipes_mp: {domain} {role}")
