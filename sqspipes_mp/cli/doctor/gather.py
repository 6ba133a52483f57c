"""Gather the facts: read limits, ask the queue service, look at the engine that runs here. Changes nothing (edge)."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.brokers.examined import examine
from sqspipes_mp.cli.doctor.facts import Facts, Machine, Place
from sqspipes_mp.host import descriptors
from sqspipes_mp.host.cgroups import Read, folders, read_file
from sqspipes_mp.host.cpus import cpus, quota
from sqspipes_mp.host.memory import memory_of
from sqspipes_mp.ipc.running.folders import Engine, engines
from sqspipes_mp.ipc.running.memory import Gone, open_memory
from sqspipes_mp.ipc.running.state import state
from sqspipes_mp.ipc.statistics import ForeignLayout, Statistics
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.supervisor.fresh import unloadable
from sqspipes_mp.supervisor.memory import pressure

#: Spaces and the like in a mount point (proc(5), mountinfo).
_ESCAPED = re.compile(r"\\([0-7]{3})")


def gather(target: str, plan: RunPlan, broker: Broker, read: Read = read_file) -> Facts:
    """Return the facts of a run. ``read``: maps a path to a file's text."""
    examined = examine(broker, plan.pipeline.specs_for(plan.selected))
    return Facts(
        target=target,
        plan=plan,
        temporary=broker.temporary,
        machine=machine(plan, broker, read),
        examined=examined,
        place=None if examined.file is None else place_of(str(Path(examined.file).parent), read),
        state=running(plan.pipeline.domain),
    )


def machine(plan: RunPlan, broker: Broker, read: Read = read_file) -> Machine:
    """Return this process and its limits."""
    others = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    fill = pressure(read)
    return Machine(
        python=platform.python_version(),
        system=sys.platform,
        threads=tuple(others),
        unloadable=unloadable((plan, broker)),
        cpus=cpus(),
        quota=quota(read),
        memory=_whole_memory() if fill is None else fill.limit,
        contained=fill is not None,
        own_memory=memory_of(os.getpid()),
        files=descriptors.left(),
        processes=_processes(read),
    )


def place_of(folder: str, read: Read = read_file) -> Place:
    """Return the file system of a folder. Raises ``OSError``."""
    found = os.statvfs(folder)
    return Place(
        folder=folder,
        kind=_kind_of(os.path.realpath(folder), read("/proc/self/mountinfo") or ""),
        free=found.f_bavail * found.f_frsize,
        free_files=found.f_favail if found.f_files else None,
    )


def running(domain: str) -> Mapping[str, Any] | None:
    """Return the state of the engine of a domain that runs here, the one that has done most; None: there is none."""
    found = []
    for engine in engines():
        if engine.text("domain") == domain:
            with contextlib.suppress(Gone, ForeignLayout):
                found.append(_state_of(engine))
    return max(found, key=lambda one: sum(stage["done"] for stage in one["stages"]), default=None)


def _state_of(engine: Engine) -> Mapping[str, Any]:
    """Return an engine's state. Raises ``Gone`` and ``ForeignLayout``."""
    with contextlib.closing(open_memory(engine)) as memory, contextlib.closing(Statistics(memory.view)) as statistics:
        return state(statistics, here=engine.here)


def _whole_memory() -> int:
    with contextlib.suppress(ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _kind_of(path: str, mounts: str) -> str:
    """Return the type of the file system at an absolute path (proc(5), mountinfo); a later mount hides earlier ones."""
    kind, longest = "", -1
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields, found = left.split(), right.split()
        if len(fields) < 5 or not found:
            continue
        point = _ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), fields[4])
        if Path(path).is_relative_to(point) and len(point) >= longest:
            kind, longest = found[0], len(point)
    return kind


def _processes(read: Read) -> tuple[int, int] | None:
    """Return the narrower of RLIMIT_NPROC, which root is free of, and the control groups' pids.max."""
    found = []
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if soft != resource.RLIM_INFINITY and os.geteuid():
        found.append((_threads_of_user(), soft))
    for _, folder in folders(read, "pids"):
        most, used = read(f"{folder}/pids.max") or "", read(f"{folder}/pids.current") or ""
        if most.strip().isdecimal() and used.strip().isdecimal():
            found.append((int(used), int(most)))
    return min(found, key=lambda pair: pair[1] - pair[0], default=None)


def _threads_of_user() -> int:
    return sum(_threads(entry) for entry in _processes_of_user())


def _processes_of_user() -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and entry.stat().st_uid == os.geteuid():
                    yield entry


def _threads(entry: os.DirEntry[str]) -> int:
    with contextlib.suppress(OSError):
        return sum(1 for _ in os.scandir(f"{entry.path}/task"))
    return 0
