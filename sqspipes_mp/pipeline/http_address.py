"""The address of a run's HTTP process, as ``run(http=)`` and ``SQSPIPES_HTTP`` name it. Pure (caller, supervisor)."""

from __future__ import annotations

from dataclasses import dataclass

from sqspipes_mp.errors import ConfigError

_MOST = 65_535


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Where to listen."""

    #: The argument or variable that named it, for people.
    field: str
    text: str
    #: A name or a number; empty: every interface.
    host: str
    #: 0: one that is free.
    port: int
    #: Whether a run without it fails; one that only the environment asked for goes on.
    required: bool = True


def parse_address(field: str, text: object, *, required: bool = True) -> HttpAddress:
    """Read ``HOST:PORT``, ``[IPv6]:PORT`` or ``:PORT``. Raises ``ConfigError`` that names ``field``."""
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    bracketed = host.startswith("[") and host.endswith("]")
    name = host[1:-1] if bracketed else host
    number = int(port) if port.isascii() and port.isdecimal() and len(port) <= len(str(_MOST)) else -1
    odd = any(each.isspace() or each in "[]" for each in name)
    if not colon or not 0 <= number <= _MOST or (":" in name) != bracketed or odd:
        raise ConfigError(
            field, text, 'HOST:PORT, such as "127.0.0.1:8090"', '":8090" is every interface, "[::1]:8090" an IPv6 one'
        )
    return HttpAddress(field, str(text), name, number, required)
