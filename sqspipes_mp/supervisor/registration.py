"""Registers a run in the user's registry for as long as its supervisor lives (supervisor)."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import os
import platform
import threading
import time
from pathlib import Path

from sqspipes_mp.host import fork_guard as forks
from sqspipes_mp.ipc.running.folders import VARIABLE, candidates, open_folder, pid_namespace
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import LAYOUT
from sqspipes_mp.pipeline.plan import RunPlan

log = logging.getLogger("sqspipes_mp.supervisor")

#: Most tries to write a file that readers take for a dead engine's between its creation and its lock, and seconds
#: between two: a reader that holds the lock needs the CPU.
_TRIES, _PAUSE = 100, 0.005


def describe(plan: RunPlan, board: Scoreboard, broker: str, caller: int, http: str | None) -> dict[str, object]:
    """Return a run's description for readers; ``broker``: without secrets, ``caller``: a pid, ``http``: its address."""
    return {
        "layout": LAYOUT,
        "run": board.run_id,
        "pid": os.getpid(),
        "pid_namespace": pid_namespace(),
        "caller": caller,
        "domain": plan.pipeline.domain,
        "broker": broker,
        "target": plan.started_as,
        "folder": _folder(),
        "statistics": board.statistics_fd,
        "http": http,
        "version": importlib.import_module("sqspipes_mp").__version__,
        "python": platform.python_version(),
        "began": int(time.time()),
        "began_ns": time.monotonic_ns(),
        "stages": [stage.name for stage in plan.pipeline.stages],
        "selected": list(plan.selected),
        "workers": [plan.workers[index] for index in plan.selected],
        "threads": [stage.task.threads for stage in plan.pipeline.stages],
        "source": [stage.is_source for stage in plan.pipeline.stages],
    }


def _folder() -> str | None:
    """Return the folder in which the run was started; None: it is gone."""
    try:
        return str(Path.cwd())
    except OSError:
        return None


class Registration:
    """A run's place in the registry. Every fork of this process closes its copy, so that the lock is this process's."""

    def __init__(self, path: str, folder: int, run: str, lock: int) -> None:
        self.path = path
        #: The folder's descriptor.
        self.folder = folder
        self.run = run
        self._lock = lock
        forks.protect(self)

    @classmethod
    def enter(cls, run: str, about: str) -> Registration | None:
        """Write a run's description into the first folder that will do; None: nowhere, which is logged.

        Nobody finds it before ``publish``.
        """
        refused: list[str] = []
        entered = None
        for path in candidates():
            try:
                with forks.postponed():
                    entered = cls._enter(path, run, about)
                break
            except OSError as error:
                # A folder that this user cannot make is not there for this user.
                if os.path.lexists(path):
                    refused.append(f"{path} is refused: {error.strerror or error}")
        if refused or (entered is None and candidates()):
            log.warning(
                "%s%s. Name a folder of your own: %s=FOLDER, or %s=off",
                "".join(f"{one}; " for one in refused),
                "this run is not registered, so that ps, top and health do not find it"
                if entered is None
                else f"this run is registered in {entered.path}",
                VARIABLE, VARIABLE,
            )  # fmt: skip
        return entered

    @classmethod
    def _enter(cls, path: str, run: str, about: str) -> Registration:
        with contextlib.suppress(FileExistsError):
            Path(path).mkdir(mode=0o700, parents=os.environ.get(VARIABLE) is not None)
        folder = open_folder(path)
        try:
            for _ in range(_TRIES):
                lock = os.open(
                    f"{run}.new", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder
                )
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    same = os.path.samestat(os.fstat(lock), os.stat(f"{run}.new", dir_fd=folder))
                    if same and os.write(lock, about.encode()):
                        return cls(path, folder, run, lock)
                    os.close(lock)
                except (BlockingIOError, FileNotFoundError):
                    # A reader took the unlocked file for a dead engine's.
                    os.close(lock)
                    threading.Event().wait(_PAUSE)
                except BaseException:
                    os.close(lock)
                    raise
            raise BlockingIOError("others remove what is written there")
        except BaseException:
            os.close(folder)
            raise

    def publish(self) -> None:
        """Let readers find the run, once its socket is there."""
        try:
            os.rename(f"{self.run}.new", f"{self.run}.json", src_dir_fd=self.folder, dst_dir_fd=self.folder)
        except OSError as error:
            log.warning("this run is not registered in %s: %s", self.path, error)

    def leave(self) -> None:
        """Remove the run's files."""
        if self._lock >= 0:
            for name in (f"{self.run}.sock", f"{self.run}.json", f"{self.run}.new"):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self.folder)
            self.close()

    def close(self) -> None:
        """Close the descriptors in this process."""
        for fd in (self._lock, self.folder):
            if fd >= 0:
                os.close(fd)
        self._lock = self.folder = -1

    def hold(self, patience: float) -> None:
        """Do nothing before a fork."""

    def resume(self, *, child: bool) -> None:
        """Close the descriptors in a forked ``child``."""
        if child:
            self.close()
