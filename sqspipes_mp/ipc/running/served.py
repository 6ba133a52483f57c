"""An engine that is looked at and asked through its own HTTP server, behind ``kubectl port-forward`` say (any process).

Light. The token of the environment goes with each request; without one the server shows numbers only.
"""

from __future__ import annotations

from importlib import import_module

from sqspipes_mp.ipc.running.folders import Engine, Unanswered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

#: Seconds that an answer may take, where no other time is asked for.
PATIENCE = 10.0
#: Most bytes of an answer.
_MOST = 32 << 20
_NEEDS_TOKEN = "stacks and orders need the engine's token: set SQSPIPES_HTTP_TOKEN or SQSPIPES_HTTP_TOKEN_FILE here"  # noqa: S105
#: Said where a server shows numbers only.
NUMBERS_ONLY = (
    "numbers only: ids, pids and texts need the engine's token (SQSPIPES_HTTP_TOKEN, SQSPIPES_HTTP_TOKEN_FILE)"
)


def is_address(target: str | None) -> bool:
    """Tell whether a person means a server by a TARGET."""
    return target is not None and target.startswith(("http://", "https://"))


class Served(Engine):
    """The engine whose server has an address. Nothing is asked before it is needed."""

    def __init__(self, url: str) -> None:
        """``url``: http://HOST:PORT, with ``?engine=`` where the server has several engines. Raises ``Unanswered``."""
        super().__init__("", "", {"domain": url})
        from urllib.parse import urlsplit  # noqa: PLC0415  (as each import below: it takes longer than a look)

        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host = ""
        if not self._host or parts.path.strip("/") or "@" in parts.netloc:
            raise Unanswered(f"the address of an engine's server is http://HOST:PORT, not {url!r}")
        self._secured = parts.scheme == "https"
        self._query = f"?{parts.query}" if parts.query else ""

    @property
    def name(self) -> str:
        """The server's address."""
        return self.text("domain")

    def health(self, *, ready: bool) -> tuple[bool, str]:
        """Return whether the server's engines live, or are ``ready``, and why. Raises ``Unanswered``."""
        found = self._request("GET", "/readyz" if ready else "/livez")
        return found.get("ok") is True, str(found.get("why"))

    def state(self) -> dict[str, Any]:
        """Return the engine's state; values that the server keeps to itself are empty. Raises ``Unanswered``."""
        from sqspipes_mp.ipc.running.state import add_notes  # noqa: PLC0415

        found = self._request("GET", f"/api/state{self._query}")
        try:
            found["engine"] = {**dict.fromkeys(("run", "pid", "caller", "target")), **found["engine"], "url": self.name}
            for worker in found["workers"]:
                worker.setdefault("pid", None)
                worker["calls"] = [{"id": "", "text": "", **call} for call in worker["calls"]]
            # The commands in the notes are those to this address.
            add_notes(found)
        except (KeyError, TypeError):
            raise self._foreign("its answer is no engine's state") from None
        return found

    def ask(self, order: Mapping[str, object], patience: float) -> dict[str, Any]:
        """Return the answer to an order. Raises ``Unanswered``; ``patience``: seconds."""
        return self._request("POST", f"/api/order{self._query}", order, patience)

    def _request(
        self, method: str, path: str, order: Mapping[str, object] | None = None, patience: float = PATIENCE
    ) -> dict[str, Any]:
        """Return the JSON object of an answer. Raises ``Unanswered``."""
        from sqspipes_mp.ipc.running.http_token import token  # noqa: PLC0415

        client, json = import_module("http.client"), import_module("json")
        # No redirects and no proxies, to which the token would go.
        connect = client.HTTPSConnection if self._secured else client.HTTPConnection
        connection = connect(self._host, self._port, timeout=patience)
        try:
            known = token()
            headers = {} if known is None else {"Authorization": f"Bearer {known}"}
            connection.request(method, path, None if order is None else json.dumps(order), headers)
            reply = connection.getresponse()
            status, raw = reply.status, reply.read(_MOST)
        except (OSError, ValueError, client.HTTPException) as error:
            raise Unanswered(f"no answer from {self.name}: {error}") from error
        finally:
            connection.close()
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._foreign(f"its answer is {status}, and no JSON object")
        if status == 401 and known is None:
            raise Unanswered(f"{self.name}: {_NEEDS_TOKEN}")
        if "error" in found:
            raise Unanswered(f"{self.name}: {found['error']}")
        return found

    def _foreign(self, why: str) -> Unanswered:
        return Unanswered(f"{self.name} is not the server of an engine: {why}")
