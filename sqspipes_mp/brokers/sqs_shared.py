"""Credentials that expire, asked for once and shared by an engine's processes through the wallet of the scoreboard.

Hundreds of workers asking a metadata service at once are throttled; the keeper asks, and the others read.
``session`` is a ``botocore.session.Session``.
"""

from __future__ import annotations

import datetime as dt
import json
import random
from collections.abc import Mapping
from typing import Any, cast

from sqspipes_mp.brokers.base import Wallet

#: Seconds before the end at which workers look for newer credentials, may and must. The keeper has done so by then:
#: botocore's own times are 15 and 10 minutes. Jitter keeps workers that find none from asking all at once.
ADVISORY = 480 + random.randrange(60)
MANDATORY = 300 + random.randrange(60)


def share(session: Any, wallet: Wallet) -> None:
    """Put credentials that expire into the wallet, refreshed when they are due; others every process reads itself."""
    metadata = expiring(session)
    if metadata is not None:
        text = json.dumps(metadata)
        if text != wallet.read():
            wallet.write(text)


def expiring(session: Any) -> dict[str, Any] | None:
    """Return a session's credentials if they expire, as botocore's metadata; None for those that stay."""
    credentials = session.get_credentials()
    # botocore has no public way to ask when credentials expire; without an answer nothing is shared.
    expires = getattr(credentials, "_expiry_time", None)
    if expires is None or credentials is None:
        return None
    frozen = credentials.get_frozen_credentials()
    expires = getattr(credentials, "_expiry_time", expires)
    keys = {"access_key": frozen.access_key, "secret_key": frozen.secret_key, "token": frozen.token}
    return {**keys, "expiry_time": expires.isoformat()}


def newer(wallet: Wallet, text: str) -> dict[str, Any] | None:
    """Return what the wallet holds, if it is other than ``text`` and lasts for a while."""
    shared = wallet.read()
    if shared is None or shared == text or _ends_soon(json.loads(shared)):
        return None
    return cast("dict[str, Any]", json.loads(shared))


def _ends_soon(metadata: Mapping[str, Any]) -> bool:
    left = dt.datetime.fromisoformat(metadata["expiry_time"]) - dt.datetime.now(dt.UTC)
    return left.total_seconds() < ADVISORY
