"""Where Linux keeps the limits of this process's control groups (any process). Parsing is pure.

Kernel documentation: cgroup-v2, cgroup-v1 memory, sched-bwc. In a container the path may be the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

#: Maps a path to a file's text, None where it cannot be read.
Read = Callable[[str], str | None]


def folders(read: Read, controller: str) -> Iterator[tuple[str, str]]:
    """Yield ("v2" | "v1", folder) of each group, ancestors included, in which ``controller`` may limit this process."""
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
    """Parse /proc/self/cgroup: this process's group in the v2 tree and in v1's tree of the controller."""
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
    """Parse /proc/self/mountinfo: (v2 | v1, the group that is mounted, where) of each tree with the controller."""
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
    """Yield the folders of a group and of all its visible ancestors."""
    path = PurePosixPath(group)
    # In a container without its own cgroup namespace the path is the host's, of which only ``root`` is mounted.
    inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    for part in (inside, *inside.parents) if inside.parts else (inside,):
        yield str(PurePosixPath(mount) / part)
