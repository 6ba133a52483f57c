"""The import of the user's module by the command line, during which no work begins (the command line's process)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sqspipes_mp.errors import ConfigError

#: The module that each process imports just now, by the process's id.
_importing: dict[int, str] = {}


@contextmanager
def importing(module: str) -> Iterator[None]:
    """Have every call that begins work within the block refused, in this process."""
    _importing[os.getpid()] = module
    try:
        yield
    finally:
        _importing.clear()


def check_not_importing(call: str) -> None:
    """Refuse a call (its method's name) that begins while the command line imports a module. Raises ``ConfigError``."""
    # A child that the module has forked is a program of its own.
    module = _importing.get(os.getpid())
    if module is not None:
        raise ConfigError(
            f"a call of {call}() in {module}",
            "one that runs when the module is imported",
            'under `if __name__ == "__main__":`',
            "sqspipes-mp imports the module to find its engine, and each such command would do the work again",
        )
