"""The domain: what all queue names of an engine begin with, and the file it is taken from. Pure; any process."""

from __future__ import annotations

from pathlib import PurePath

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.pipeline.callables import NAME


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
    """Raise ``ConfigError`` for what queue names cannot begin with."""
    if not isinstance(domain, str) or not NAME.fullmatch(domain):
        raise ConfigError(field, domain, "letters, digits, '_' and '-' (queues are named after it)", cure)
