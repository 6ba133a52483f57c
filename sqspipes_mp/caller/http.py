"""Whether and where a run serves HTTP: ``run(http=)``, ``SQSPIPES_HTTP``, and what both need (caller)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.pipeline.http_address import HttpAddress, parse_address

#: The variable that names an address where the code names none.
VARIABLE = "SQSPIPES_HTTP"
#: The variable with the token's file; SQSPIPES_HTTP_TOKEN has the token itself.
TOKEN_FILE = "SQSPIPES_HTTP_TOKEN_FILE"  # noqa: S105  (a variable's name)
#: What the extra installs.
_NEEDED = ("prometheus_client", "starlette", "uvicorn")


def http_address(http: str | None, field: str = "run(http)") -> HttpAddress | None:
    """Return the address where a run serves HTTP; None: it does not.

    Args:
        http: HOST:PORT; None: what ``SQSPIPES_HTTP`` says. A port that is taken does not end a run that only the
            environment has asked for it.
        field: the name of the argument, for people.

    Raises:
        ConfigError: it is no address, the extra is not installed, or the token's file cannot be read.
    """
    given = os.environ.get(VARIABLE) or None
    if http is not None:
        found = parse_address(field, http)
    elif given is not None:
        found = parse_address(VARIABLE, given, required=False)
    else:
        return None
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(
            found.field,
            found.text,
            f"left out, since {', '.join(missing)} cannot be imported",
            "To have it: pip install 'sqspipes_mp[http]'",
        )
    _check_token()
    return found


def _check_token() -> None:
    path = os.environ.get(TOKEN_FILE)
    if not path:
        return
    try:
        problem = "" if Path(path).read_text().strip() else "it is empty"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise ConfigError(TOKEN_FILE, path, f"a file with a token ({problem})")
