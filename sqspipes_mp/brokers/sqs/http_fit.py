"""The check that the lean path (``http``) may replace a boto3 client: it must behave as boto3 would (at opening).

It reads the settings that botocore has made of configuration, environment and session. Some of them have no public
name: one that cannot be found is a reason to stay with boto3.
"""

from __future__ import annotations

import logging
import os
import types
from typing import Any
from urllib.parse import urlsplit

from sqspipes_mp.brokers.shown import shown
from sqspipes_mp.brokers.sqs.http import OPERATIONS, Target
from sqspipes_mp.brokers.sqs.http_connect import Connector, Unknown
from sqspipes_mp.errors import ConfigError

log = logging.getLogger("sqspipes_mp.brokers.sqs")

#: Environment variable that switches the lean path off for a process and its children: 0, off, no or false.
VARIABLE = "SQSPIPES_MP_LEAN"
_OFF = ("0", "off", "no", "false")
#: Events of botocore at which other code may take part in a call.
_PHASES = (
    "before-endpoint-resolution",
    "before-parameter-build",
    "before-parse",
    "before-call",
    "before-send",
    "before-sign",
    "after-call",
    "after-call-error",
    "choose-signer",
    "needs-retry",
    "provide-client-params",
    "request-created",
    "response-received",
)
#: Endpoints, and reasons to stay with boto3, that this process or its parent has logged.
_logged: set[tuple[str, str]] = set()


def switched_off() -> bool:
    """Tell whether the environment forbids the lean path."""
    return os.environ.get(VARIABLE, "").strip().lower() in _OFF


def log_once(text: str, endpoint: str, reason: str) -> None:
    """Log at INFO that boto3 makes the calls to an endpoint; once in a process and its forked children."""
    if (endpoint, reason) not in _logged:
        _logged.add((endpoint, reason))
        log.info(text, endpoint, reason)


def target_of(client: Any, session: Any) -> Target | str:
    """Return the target of the lean path in place of ``client``, or the reason to stay with boto3.

    ``session``: the botocore session of the client. Raises ``ConfigError`` for certificates that cannot be read.
    """
    try:
        reason = _find_obstacle(client, session)
        if reason is not None:
            return reason
        return Target(
            connect=Connector.of(client._endpoint.http_session, client.meta.endpoint_url),
            region=str(client._request_signer.region_name),
            keys=client._request_signer._credentials.get_frozen_credentials,
            user_agent=str(client.meta.config.user_agent),
        )
    except ConfigError:
        raise
    except Unknown as reason_why:
        return str(reason_why)
    except Exception as error:  # An unknown version of botocore is no reason to fail.
        return f"{type(error).__name__}: {error}"


def _find_obstacle(client: Any, session: Any) -> str | None:
    """Return the reason why the lean path cannot serve in place of a client; None: it can."""
    if session is None:
        return "the session is no boto3.Session"
    config, signer = client.meta.config, client._request_signer
    url = urlsplit(client.meta.endpoint_url)
    if url.scheme not in ("http", "https") or url.path not in ("", "/") or url.query or url.username:
        return f"the endpoint {shown(client.meta.endpoint_url)} has more than a host"
    if getattr(config, "auth_scheme_preference", None) or session.get_config_variable("auth_scheme_preference"):
        return "auth_scheme_preference is configured"
    if signer.signature_version != "v4" or signer.signing_name != "sqs" or signer._credentials is None:
        return f"requests are signed with {signer.signature_version} for {signer.signing_name}"
    if type(client._endpoint.http_session).__module__ != "botocore.httpsession":
        return "the client's requests are made by other code"
    return _find_foreign_code(client)


def _find_foreign_code(client: Any) -> str | None:
    """Return a text that names code of others in the client's calls (hooks, tracing, mocks); None: there is none."""
    base = next(each for each in type(client).__mro__ if each.__name__ == "BaseClient")
    call = type(client)._make_api_call
    # A wrapper made with functools.wraps has the name and the module of what it wraps, but not its file.
    file = call.__code__.co_filename if isinstance(call, types.FunctionType) else ""
    if call is not base.__dict__["_make_api_call"] or os.path.basename(os.path.dirname(file)) != "botocore":  # noqa: PTH119, PTH120
        return "the client's calls are wrapped by other code"
    handlers = client.meta.events._emitter._handlers
    for phase in _PHASES:
        for operation in OPERATIONS:
            for handler in handlers.prefix_search(f"{phase}.sqs.{operation}"):
                module = str(getattr(handler, "__module__", None))
                if module.partition(".")[0] not in ("botocore", "boto3"):
                    return f"{module} has a hook on {phase}"
    return None
