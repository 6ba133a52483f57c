"""How many threads numeric libraries get in each worker, its share of the CPUs, and its own seed (supervisor, worker).

Workers times one numeric thread per CPU is far more threads than CPUs, and slower than none. So each worker gets
max(1, CPUs // workers), unless the user has set one of the variables. When that takes effect:

- A library imported in the worker (in ``init``, in a class task's ``__init__``, in the function) reads the environment
  then: always.
- With spawn and forkserver the user's module is imported in the child, after the environment was set: always, except
  under a forkserver that somebody else had started before.
- With fork a library that the user's module imported is loaded already, and reads the environment no more. Where
  ``threadpoolctl`` can be imported it is told through that; else the user has to set ``OMP_NUM_THREADS`` before.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping

log = logging.getLogger("sqspipes_mp.supervisor")

#: The one that most libraries fall back to.
_GENERAL = "OMP_NUM_THREADS"
#: What each library reads first.
_OWN = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
#: Modules whose import loads libraries with threads of their own.
_LOADERS = ("numpy", "scipy", "sklearn", "torch", "numexpr", "cv2")


def share(cpus: int, workers: int) -> int:
    """Return the numeric threads of one worker of so many."""
    return max(1, cpus // max(1, workers))


def variables(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """Return the variables to set: none that the user has set, and none that would overrule the user's general one."""
    if environ.get(_GENERAL):
        return {}
    return {name: str(threads) for name in (_GENERAL, *_OWN) if not environ.get(name)}


@contextlib.contextmanager
def environment(threads: int) -> Iterator[None]:
    """Have a process that is started meanwhile find the variables in its environment; ours is as before after that."""
    added = variables(os.environ, threads)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def settle(threads: int) -> None:
    """In a worker, before any of the user's code: set the variables, and limit what is loaded already, if possible."""
    chosen = any(os.environ.get(name) for name in (_GENERAL, *_OWN))
    os.environ.update(variables(os.environ, threads))
    if not chosen and _loaded():
        # Whatever an optional library does, a worker can do without it.
        with contextlib.suppress(Exception):
            _limit(threads)


def reseed() -> None:
    """In a worker, before any of the user's code: give numpy's global generator a state of its own.

    A forked worker has its parent's, and so has its successor. ``random`` and ``uuid`` reseed themselves.
    """
    loaded = sys.modules.get("numpy.random")
    if loaded is not None:
        # A generator that the program put in its place may not take it.
        with contextlib.suppress(Exception):
            loaded.seed()


def prepare(threads: int, cpus: int) -> None:
    """In the supervisor, before it forks: load what the workers will need, or say what the user can do instead."""
    chosen = any(os.environ.get(name) for name in (_GENERAL, *_OWN))
    if chosen or threads >= cpus or not _loaded():
        return
    # Shared by the workers that are forked from here.
    with contextlib.suppress(ImportError):
        importlib.import_module("threadpoolctl")
        return
    log.info(
        "%s is loaded already, so each worker keeps its usual number of numeric threads instead of %d: "
        "set OMP_NUM_THREADS before the program starts, install threadpoolctl, or import it in Task(init=)",
        _loaded(),
        threads,
    )


def _loaded() -> str | None:
    return next((name for name in _LOADERS if name in sys.modules), None)


def _limit(threads: int) -> None:
    from threadpoolctl import ThreadpoolController  # noqa: PLC0415  (optional, and only for those who use such libraries)

    for library in ThreadpoolController().lib_controllers:
        if library.num_threads > threads:
            library.set_num_threads(threads)
