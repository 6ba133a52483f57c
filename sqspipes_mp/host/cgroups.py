"""The folders in which Linux keeps the limits of this process's control groups (any process). Parsing is pure.

Kernel documentation: cgroup-v2, cgroup-v1 memory, sched-bwc.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

#: Maps a path to a file's text; None where it cannot be read.
Read = Callable[[str], str | None]


def folders(read: Read, controller: str) -> Iterator[tuple[str, str]]:
    """Yield ("v2" or "v1", folder) of each control group that may limit this process, ancestors included.

    ``controller``: "cpu" or "memory".
    """
    groups = _groups(read("/proc/self/cgroup") or "", controller)
    for kind, root, mount in _mounts(read("/proc/self/mountinfo") or "", controller):
        for folder in _ancestors(groups.get(kind, "/"), root, mount):
            yield kind, folder


def read_file(path: str) -> str | None:
    """Return a file's text; None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None


def _groups(text: str, controller: str) -> dict[str, str]:
    """Parse /proc/self/cgroup; return the process's groups in the v2 tree and in the controller's v1 tree."""
    groups = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            groups["v2"] = path
        elif controller in controllers.split(","):
            groups["v1"] = path
    return groups


def _mounts(text: str, controller: str) -> Iterator[tuple[str, str, str]]:
    """Parse /proc/self/mountinfo; yield ("v2" or "v1", mounted group, mount point) of each tree with the controller."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        place, filesystem = left.split(), right.split()
        if len(place) < 5 or not filesystem:
            continue
        if filesystem[0] == "cgroup2":
            yield "v2", place[3], place[4]
        elif filesystem[0] == "cgroup" and controller in filesystem[-1].split(","):
            yield "v1", place[3], place[4]


def _ancestors(group: str, root: str, mount: str) -> Iterator[str]:
    """Yield the folders of a group and of its ancestors, as far as they are mounted."""
    path = PurePosixPath(group)
    # In a container without its own cgroup namespace the path is the host's, of which only ``root`` is mounted.
    inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    for part in (inside, *inside.parents) if inside.parts else (inside,):
        yield str(PurePosixPath(mount) / part)
