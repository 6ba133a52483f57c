"""The token of an engine's HTTP server, from the environment (any process). Light."""

from __future__ import annotations

import os
from pathlib import Path


def token() -> str | None:
    """Return the token of the environment; None: there is none. Raises ``OSError`` for a file that cannot be read."""
    path = os.environ.get("SQSPIPES_HTTP_TOKEN_FILE")
    found = Path(path).read_text().strip() if path else os.environ.get("SQSPIPES_HTTP_TOKEN", "").strip()
    return found or None
