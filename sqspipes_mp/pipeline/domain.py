"""The domain: the beginning of all queue names of an engine, given or taken from the user's file (caller)."""

from __future__ import annotations

import os
import sys
from pathlib import Path, PurePath

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.pipeline.callables import NAME

_PACKAGE = str(Path(__file__).parent.parent) + os.sep


def constructing_file() -> str | None:
    """Return the file of the code that builds the engine: the nearest frame outside this package."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    name = frame.f_globals.get("__file__")
    return name if isinstance(name, str) else None


def derive_domain(filename: str | None) -> str:
    """Return the domain a file stands for: its stem, or its folder's name for ``__main__.py`` and ``__init__.py``.

    Raises ``ConfigError`` where there is no file (None, "<stdin>", a notebook's cell) or its name will not do.
    """
    cure = 'Give Engine(..., domain="my-app") or set SQSPIPES_DOMAIN'
    path = PurePath(filename or "<none>")
    # A notebook's cells are files of changing names in a folder ipykernel_<pid>.
    if path.name.startswith("<") or path.parent.name.startswith("ipykernel_"):
        raise ConfigError("Engine(domain)", None, "given where no file names it (REPL, -c, notebook)", cure)
    domain = path.parent.name if path.stem in ("__main__", "__init__") else path.stem
    check_domain(f"Engine(domain), taken from {str(path)!r},", domain, cure)
    return domain


def check_domain(field: str, domain: object, cure: str = 'For example domain="my-app"') -> None:
    """Raise ``ConfigError`` for a domain that cannot begin queue names."""
    if not isinstance(domain, str) or not NAME.fullmatch(domain):
        raise ConfigError(field, domain, "letters, digits, '_' and '-' (queues are named after it)", cure)
