"""Credentials that expire, asked for once and shared by an engine's processes through the wallet of the scoreboard.

Hundreds of workers asking a metadata service at once are throttled; the keeper asks, and the others read.
``session`` is a ``botocore.session.Session``.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

from sqspipes_mp.brokers.base import Wallet

logger = logging.getLogger("sqspipes_mp.brokers.sqs")

#: Seconds before the end at which workers look for newer credentials, may and must. The keeper has done so by then:
#: botocore's own times are 15 and 10 minutes. Each worker looks up to a minute earlier than that, so that workers that
#: find none do not ask all at once.
_ADVISORY, _MANDATORY, _JITTER = 480, 300, 60
#: Seconds before the end at which the keeper, too, has nothing better to do than to wait for newer ones.
_LAST_CALL = 30
#: Seconds after which a fetch is not waited for any more.
_HANGS = 60.0


def share(session: Any, wallet: Wallet, patience: float) -> None:
    """Put credentials that expire into the wallet, refreshed when they are due; others every process reads itself.

    ``patience``: seconds that a call of this process may take, of which a refresh may take a part; the first fetch may
    take its time.
    """
    try:
        _hold_up_nobody(session.get_credentials(), patience)
        metadata = expiring(session)
    except Exception as error:
        if wallet.read() is None:
            raise
        # What everybody has may last for minutes yet; the calls that use it will tell.
        logger.warning("no newer credentials: %s: %.300s", type(error).__name__, error)
        return
    if metadata is not None:
        text = json.dumps(metadata)
        if text != wallet.read():
            wallet.write(text)


def _hold_up_nobody(credentials: Any, patience: float) -> None:
    """Have credentials refreshed beside the calls that use them: a slow service must not cost the leases.

    botocore has no public way to do so; where it has changed, a slow service has the keeper replaced.
    """
    refresh = getattr(credentials, "_refresh_using", None)
    fetched = getattr(credentials, "_frozen_credentials", None) is not None
    if fetched and refresh is not None and not isinstance(refresh, _Beside):
        credentials._refresh_using = _Beside(refresh, patience / 4)
        credentials._mandatory_refresh_timeout = _LAST_CALL


class CredentialsPending(Exception):
    """Newer credentials are being asked for, and the old ones are at their end."""


class _Beside:
    """A refresh in a thread of its own. Called again, it gives what that has fetched meanwhile.

    One that hangs (a credential process, say) is left alone after a minute, and asked anew.
    """

    def __init__(self, refresh: Callable[[], Any], patience: float) -> None:
        self._refresh = refresh
        self._patience = patience
        self._fetching: Future[Any] | None = None
        self._began = 0.0

    def __call__(self) -> Any:
        wait = 0.0
        if self._fetching is None or time.monotonic() - self._began > _HANGS:
            self._fetching, wait, self._began = Future(), self._patience, time.monotonic()
            # A daemon: a service that never answers must not keep the keeper from ending.
            threading.Thread(target=partial(self._fetch, self._fetching), daemon=True, name="credentials").start()
        fetching = self._fetching
        try:
            return fetching.result(wait)
        except TimeoutError as error:
            if fetching.done():
                # It came just then, or the error is its own.
                return fetching.result()
            raise CredentialsPending("whoever gives out newer credentials has not answered yet") from error
        finally:
            if fetching.done():
                self._fetching = None

    def _fetch(self, fetching: Future[Any]) -> None:
        try:
            fetching.set_result(self._refresh())
        except BaseException as error:
            fetching.set_exception(error)


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
