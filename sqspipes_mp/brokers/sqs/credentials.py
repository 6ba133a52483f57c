"""Credentials that expire: the keeper fetches them, the engine's other processes read them from the wallet.

A metadata service throttles hundreds of workers that ask at once. ``session`` is a ``botocore.session.Session``
throughout. Some of botocore's names that are used here are not public. Where one has changed, a process does as
botocore does by itself.
"""

from __future__ import annotations

import contextlib
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
from sqspipes_mp.brokers.sqs.faults import CallFailed, Fault, Kind, no_keys, without_keys
from sqspipes_mp.errors import ConfigError, SqsPipesError

log = logging.getLogger("sqspipes_mp.brokers.sqs")

_SET_CREDENTIALS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, a role of the machine, or "
    "SQS(access_key=, secret_key=)"
)
#: Seconds before the end of credentials from which a worker may look for newer ones, and from which it must. The keeper
#: has fetched them by then: botocore's own times, which it keeps, are 900 and 600.
_ADVISORY, _MANDATORY = 480, 300
#: A worker looks up to this many seconds earlier, so that workers that find none do not all ask the service at once.
_JITTER = 60
#: Seconds before the end of its credentials from which the keeper's calls wait for newer ones.
_LAST_CALL = 30
#: Seconds after which a fetch without an answer is given up for a new one.
_HANGS = 60.0
#: Seconds without credentials after which that is logged.
_TELL_AFTER = 10.0


def adopt(session: Any, text: str, wallet: Wallet, make_session: Callable[[], Any], *, fills: bool) -> None:
    """Give a session the wallet's credentials, before it looks for any: no service is asked at the start.

    ``text``: of the wallet. When the credentials expire, the session reads the wallet again, and only where it holds
    none that are newer asks a session of ``make_session``. ``fills`` True, in the process that fills the wallet: it
    always asks.
    """
    import botocore.credentials  # noqa: PLC0415  (see ``broker``)

    # Drawn here and not at the import, which forked workers share.
    advisory, mandatory = _margins()

    def fetch() -> dict[str, Any]:
        found = (None if fills else _newer(wallet, text, advisory)) or _expiring(make_session())
        if found is None:
            raise no_credentials()
        return found

    times = {} if fills else {"advisory_timeout": advisory, "mandatory_timeout": mandatory}
    metadata = json.loads(text)
    made = botocore.credentials.RefreshableCredentials.create_from_metadata(metadata, fetch, "sqspipes", **times)

    class Shared(botocore.credentials.CredentialProvider):
        METHOD = "sqspipes"

        def load(self) -> Any:
            return made

    # The first provider: a session with a profile has no provider of a fixed name to put it before.
    session.get_component("credential_provider").providers.insert(0, Shared())


def no_credentials(*, emulator: bool = False) -> ConfigError:
    """Return the error of a session without credentials; ``emulator``: the endpoint is on this machine."""
    hint = '. An emulator takes any pair: access_key="test", secret_key="test"' if emulator else ""
    return ConfigError("SQS credentials", None, "AWS credentials (boto3 finds none)", f"{_SET_CREDENTIALS}{hint}")


def find_credentials(session: Any) -> Any:
    """Return a session's credentials; None where there are none.

    Raises ``CallFailed`` where they cannot be had, botocore's exceptions for a configuration that is wrong. A service
    or a credential process without an answer is logged after ``_TELL_AFTER`` seconds.
    """
    from botocore import exceptions  # noqa: PLC0415  (see ``broker``)

    told = threading.Timer(_TELL_AFTER, log.warning, ("waiting for credentials: no answer for %g s", _TELL_AFTER))
    told.daemon = True
    # Where no thread can be started, nothing is told.
    with contextlib.suppress(RuntimeError):
        told.start()
    try:
        return session.get_credentials()
    except json.JSONDecodeError as error:
        raise CallFailed(no_keys(error)) from error
    except (
        exceptions.ConfigNotFound,
        exceptions.ConfigParseError,
        exceptions.InvalidConfigError,
        exceptions.PartialCredentialsError,
        exceptions.ProfileNotFound,
        exceptions.UnknownCredentialError,
        ValueError,
    ):
        raise
    except Exception as error:
        raise CallFailed(no_keys(error)) from error
    finally:
        told.cancel()
        if told.ident is not None:
            # A thread that is left over would change the way in which the caller's next run starts its children.
            told.join()


def forbid_prompts(session: Any) -> None:
    """Have a session raise where a profile asks for a code (MFA): nobody could enter it in a child process."""
    # Not public in botocore; where it has changed, its own prompt fails for want of a terminal.
    with contextlib.suppress(Exception):
        session.get_component("credential_provider").get_provider("assume-role")._prompter = _refuse_prompt


def _refuse_prompt(prompt: str) -> str:
    message = f"the profile asks for a code ({prompt.strip()}), and nobody can enter it here"
    raise CallFailed(Fault(Kind.CREDENTIALS, "MultiFactorPrompt", message, "the profile's mfa_serial"))


def share(session: Any, wallet: Wallet, patience: float) -> None:
    """Put a session's credentials into the wallet if they expire, refreshed when they are due.

    Credentials that do not expire are not shared: every process reads them itself. ``patience``: most seconds that a
    call of this process may take; a refresh takes at most a quarter of it, the first fetch any time. Raises
    ``AccessDenied`` for credentials that cannot be had while the wallet is empty.
    """
    try:
        _refresh_beside_calls(session.get_credentials(), patience)
        metadata = _expiring(session)
    except Exception as error:
        if wallet.read() is None:
            if isinstance(error, SqsPipesError):
                raise
            raise without_keys(no_keys(error), "SQS") from error
        # The credentials that all processes have may last for minutes yet.
        log.warning("no newer credentials: %s: %.300s", type(error).__name__, error)
        return
    if metadata is not None:
        text = json.dumps(metadata)
        if text != wallet.read():
            wallet.write(text)


def _refresh_beside_calls(credentials: Any, patience: float) -> None:
    """Refresh credentials in a thread of their own: the keeper's calls must not wait for a slow service.

    botocore has no public way to do so. Where it has changed, a slow service stalls the keeper, which is replaced.
    """
    refresh = getattr(credentials, "_refresh_using", None)
    fetched = getattr(credentials, "_frozen_credentials", None) is not None
    if fetched and refresh is not None and not isinstance(refresh, _Beside):
        credentials._refresh_using = _Beside(refresh, patience / 4)
        credentials._mandatory_refresh_timeout = _LAST_CALL


class CredentialsPending(CallFailed):
    """The old credentials are at their end, and the service has not answered with newer ones yet."""


class _Beside:
    """A refresh in a thread of its own; a later call returns the credentials that the thread has fetched since.

    A call waits at most ``patience`` seconds, and raises ``CredentialsPending`` then. A fetch that hangs (a credential
    process may) is replaced by a new one after ``_HANGS`` seconds.
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
            # A daemon thread: a service that never answers must not keep the keeper from ending.
            threading.Thread(target=partial(self._fetch, self._fetching), daemon=True, name="credentials").start()
        fetching = self._fetching
        try:
            return fetching.result(wait)
        except TimeoutError as error:
            if fetching.done():
                # The answer came just then, or the TimeoutError is the fetch's own.
                return fetching.result()
            message = "whoever gives out newer credentials has not answered yet"
            raise CredentialsPending(Fault(Kind.TRANSIENT, "CredentialsPending", message)) from error
        finally:
            if fetching.done():
                self._fetching = None

    def _fetch(self, fetching: Future[Any]) -> None:
        try:
            fetching.set_result(self._refresh())
        except BaseException as error:
            fetching.set_exception(error)


def _expiring(session: Any) -> dict[str, Any] | None:
    """Return a session's credentials as botocore's metadata if they expire, else None."""
    credentials = session.get_credentials()
    # botocore has no public way to ask when credentials expire; without an answer they are not shared.
    expires = getattr(credentials, "_expiry_time", None)
    if expires is None or credentials is None:
        return None
    frozen = credentials.get_frozen_credentials()
    expires = getattr(credentials, "_expiry_time", expires)
    keys = {"access_key": frozen.access_key, "secret_key": frozen.secret_key, "token": frozen.token}
    return {**keys, "expiry_time": expires.isoformat()}


def _margins() -> tuple[int, int]:
    """Draw the seconds before the end from which this process may and must look for newer credentials."""
    return _ADVISORY + random.randrange(_JITTER), _MANDATORY + random.randrange(_JITTER)


def _newer(wallet: Wallet, text: str, least: float) -> dict[str, Any] | None:
    """Return the wallet's credentials if they are not those of ``text`` and last at least ``least`` seconds."""
    shared = wallet.read()
    if shared is None or shared == text:
        return None
    metadata = cast("dict[str, Any]", json.loads(shared))
    left = dt.datetime.fromisoformat(metadata["expiry_time"]) - dt.datetime.now(dt.UTC)
    return metadata if left.total_seconds() >= least else None
