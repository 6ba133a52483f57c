"""Threads of numeric libraries in a worker (its share of the CPUs), and the seed of numpy (supervisor, worker).

By default a numeric library starts a thread for each CPU; in each of many workers that is far more threads than CPUs,
and slower than one thread. So each worker gets max(1, CPUs // workers), unless the user has set one of the variables.
The number takes effect:

- Always for a library that is imported in the worker (in ``init``, in a class task's ``__init__``, in the function): it
  reads the environment then.
- With spawn and forkserver for a library of the user's module, too, which is imported in the child. An exception is a
  forkserver that was started before, by other code.
- With fork for a library of the user's module only through ``threadpoolctl``, where that can be imported: the library
  is loaded already and does not read the environment again. Else the user has to set ``OMP_NUM_THREADS`` before.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping

log = logging.getLogger("sqspipes_mp.supervisor")

#: Variable that most libraries read after their own.
_GENERAL = "OMP_NUM_THREADS"
#: Variables that one library each reads first.
_OWN = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
#: Modules whose import loads libraries with threads of their own.
_LOADERS = ("numpy", "scipy", "sklearn", "torch", "numexpr", "cv2")


def share(cpus: int, workers: int) -> int:
    """Return the numeric threads of each of ``workers`` workers."""
    return max(1, cpus // max(1, workers))


def variables(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """Return the variables to set: those that the user has not set; none where the user has set the general one."""
    if environ.get(_GENERAL):
        return {}
    return {name: str(threads) for name in (_GENERAL, *_OWN) if not environ.get(name)}


@contextlib.contextmanager
def environment(threads: int) -> Iterator[None]:
    """Set the variables during the block, for a process that is started in it."""
    added = variables(os.environ, threads)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def limit_threads(threads: int) -> None:
    """In a worker, before the user's code: set the variables, and limit libraries that are loaded, where possible."""
    chosen = any(os.environ.get(name) for name in (_GENERAL, *_OWN))
    os.environ.update(variables(os.environ, threads))
    if not chosen and _loaded():
        # A worker goes on without the limit, whatever an optional library raises.
        with contextlib.suppress(Exception):
            _limit(threads)


def reseed() -> None:
    """In a worker, before the user's code: give numpy's global generator a state of its own.

    A forked worker has its parent's state, and so would each of its successors. ``random`` and ``uuid`` reseed
    themselves.
    """
    loaded = sys.modules.get("numpy.random")
    if loaded is not None:
        # The program may have put another generator in its place, whose ``seed`` raises.
        with contextlib.suppress(Exception):
            loaded.seed()


def prepare(threads: int, cpus: int) -> None:
    """In the supervisor, before it forks: load threadpoolctl for the workers, or log the user's alternatives."""
    chosen = any(os.environ.get(name) for name in (_GENERAL, *_OWN))
    if chosen or threads >= cpus or not _loaded():
        return
    # Forked workers share the loaded module.
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
    from threadpoolctl import ThreadpoolController  # noqa: PLC0415  (optional)

    for library in ThreadpoolController().lib_controllers:
        if library.num_threads > threads:
            library.set_num_threads(threads)
