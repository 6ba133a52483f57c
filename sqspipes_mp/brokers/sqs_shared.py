"""Credentials that expire, asked for once and shared by an engine's processes through the wallet of the scoreboard.

Hundreds of workers asking a metadata service at once are throttled; the keeper asks, and the others read.
``session`` is a ``botocore.session.Session``.
"""

from __future__ import annotations

import datetime as dt
import json
import random
from typing import Any, cast

from sqspipes_mp.brokers.base import Wallet

#: Seconds before the end at which workers look for newer credentials, may and must. The keeper has done so by then:
#: botocore's own times are 15 and 10 minutes. Each worker looks up to a minute earlier than that, so that workers that
#: find none do not ask all at once.
_ADVISORY, _MANDATORY, _JITTER = 480, 300, 60


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


def margins() -> tuple[int, int]:
    """Draw the seconds before the end at which this process looks for newer credentials: may, and must."""
    return _ADVISORY + random.randrange(_JITTER), _MANDATORY + random.randrange(_JITTER)


def newer(wallet: Wallet, text: str, least: float) -> dict[str, Any] | None:
    """Return what the wallet holds, if it is other than ``text`` and lasts at least so many seconds."""
    shared = wallet.read()
    if shared is None or shared == text:
        return None
    metadata = cast("dict[str, Any]", json.loads(shared))
    left = dt.datetime.fromisoformat(metadata["expiry_time"]) - dt.datetime.now(dt.UTC)
    return metadata if left.total_seconds() >= least else None
