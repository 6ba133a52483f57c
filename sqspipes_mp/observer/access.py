"""Who may see and do what over HTTP. Pure (the HTTP process).

Whoever reaches the port may read numbers and health. Texts, ids and orders need the token, and a port that only this
machine reaches does not take requests that a web page of elsewhere has made its browser send (DNS rebinding): those
name another host.
"""

from __future__ import annotations

import hmac
import ipaddress
from enum import Enum, auto
from typing import Any

#: Keys of a state whose texts every user of the machine may read; those of stages and metrics' labels.
_WORDS = frozenset(
    {"domain", "broker", "transport", "version", "python", "why", "name", "state", "stage", "operation", "kind"}
)
#: Keys of a state that are kept from who has no token, numbers too.
_HIDDEN = frozenset({"run", "pid", "caller", "target", "id", "text"})


class Sight(Enum):
    """How much a request may see of an engine."""

    #: Metrics and health.
    METRICS = auto()
    #: Numbers of the state as well: no ids, no texts, no stacks.
    NUMBERS = auto()
    #: Everything, and it may give orders.
    ALL = auto()
    #: The request has a token, which is not the right one.
    REFUSED = auto()


class Access:
    """The rules of one server."""

    def __init__(self, host: str, token: str | None) -> None:
        """``host``: the number at which it listens; ``token``: None: it has none."""
        self.loopback = _is_loopback(host)
        self._token = None if token is None else token.encode()

    @property
    def shows_page(self) -> bool:
        """Whether the page is served, which asks for a token where it needs one."""
        return self.loopback or self._token is not None

    def takes(self, host: str | None) -> bool:
        """Tell whether requests with this Host header are answered; None: the request has none."""
        if not self.loopback:
            return True
        name = "" if host is None else host.strip().lower()
        if name.startswith("["):
            name, closed, rest = name[1:].partition("]")
            if not closed or (rest and not (rest.startswith(":") and rest[1:].isdecimal())):
                return False
        else:
            name = name.partition(":")[0]
        return name == "localhost" or _is_loopback(name)

    def sight(self, authorization: str | None) -> Sight:
        """Return how much a request with this Authorization header may see; None: the request has none."""
        if authorization is None or self._token is None:
            return Sight.NUMBERS if self.loopback else Sight.METRICS
        scheme, _, token = authorization.partition(" ")
        # In constant time: how long it takes tells nothing of how much of a guess is right.
        right = hmac.compare_digest(token.strip().encode("utf-8", "replace"), self._token)
        return Sight.ALL if right and scheme.lower() == "bearer" else Sight.REFUSED


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def numbers_only(state: Any) -> Any:
    """Return a state without ids, pids and texts, but for those that the metrics' labels have as well."""
    if isinstance(state, list):
        return [numbers_only(each) for each in state]
    if not isinstance(state, dict):
        return state
    return {
        key: numbers_only(value)
        for key, value in state.items()
        if key not in _HIDDEN and (key in _WORDS or not isinstance(value, str))
    }
