"""All that the checks judge. Pure declarations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqspipes_mp.brokers.examined import Examined
from sqspipes_mp.pipeline.plan import RunPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The file system of a folder."""

    folder: str
    #: Type as the kernel names it; empty: unknown.
    kind: str
    #: Bytes that this user may still write.
    free: int
    #: Files that may still be made; None: the file system has no limit.
    free_files: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The process that asks, and the limits that it and its children live by."""

    python: str
    #: ``sys.platform``.
    system: str
    #: Names of the threads that are alive beside the main one, once the user's module is loaded.
    threads: tuple[str, ...]
    #: Why a fresh process cannot load the tasks; None: it can.
    unloadable: str | None
    #: CPUs that the engine counts on, and the quota of the control groups; None: there is none.
    cpus: int
    quota: float | None
    #: Bytes that the workers may have together: the container's limit, else the machine's memory; 0: unknown.
    memory: int
    #: Whether ``memory`` is a container's limit.
    contained: bool
    #: Private bytes of this process, which has loaded the user's module.
    own_memory: int
    #: Open files of this process, and the most it may have; None: no limit.
    files: tuple[int, int] | None
    #: Processes and threads that count against the narrowest limit, and that limit; None: no limit.
    processes: tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One pipeline, as it would run here now."""

    #: The MODULE:ENGINE of the command line, for cures.
    target: str
    plan: RunPlan
    #: Whether the queues last only as long as the engine.
    temporary: bool
    machine: Machine
    examined: Examined
    #: File system of the queues' file; None: there is no such file.
    place: Place | None = None
    #: State of the engine of this domain that runs here (``ipc.running.state``); None: none does.
    state: Mapping[str, Any] | None = None

    @property
    def workers(self) -> int:
        """Worker processes of the run."""
        return sum(self.plan.workers.values())
