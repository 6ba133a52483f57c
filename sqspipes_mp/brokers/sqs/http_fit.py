"""The check that the lean path (``http``) may replace a boto3 client: it must behave as boto3 would (at opening).

It reads the settings that botocore has made of configuration, environment and session, and imports none of it. Some of
them have no public name: one that cannot be found is a reason to stay with boto3.
"""

from __future__ import annotations

import os
import types
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from sqspipes_mp.brokers.sqs.http import OPERATIONS, Target

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
#: Settings of the session, and options of the client, that the path does not know.
_SETTINGS = ("use_fips_endpoint", "use_dualstack_endpoint", "auth_scheme_preference")
_OPTIONS = ("proxies", "client_cert", "use_fips_endpoint", "use_dualstack_endpoint", "auth_scheme_preference")


def switched_off() -> bool:
    """Tell whether the environment forbids the lean path."""
    return os.environ.get(VARIABLE, "").strip().lower() in _OFF


def target_of(client: Any, session: Any, certificates: str | None) -> Target | str:
    """Return the target of the lean path in place of ``client``, or the reason to stay with boto3. Never raises.

    ``session``: the botocore session of the client; ``certificates``: path of botocore's own bundle.
    """
    try:
        reason = _find_obstacle(client, session)
        if reason is not None:
            return reason
        parts = urlsplit(client.meta.endpoint_url)
        tls = parts.scheme == "https"
        return Target(
            host=str(parts.hostname),
            port=parts.port or (443 if tls else 80),
            tls=tls,
            region=str(client._request_signer.region_name),
            keys=client._request_signer._credentials.get_frozen_credentials,
            certificates=certificates if tls else None,
            user_agent=str(client.meta.config.user_agent),
        )
    except Exception as error:  # An unknown version of botocore is no reason to fail.
        return f"{type(error).__name__}: {error}"


def _find_obstacle(client: Any, session: Any) -> str | None:
    """Return the reason why the lean path cannot serve in place of a client; None: it can."""
    config, signer = client.meta.config, client._request_signer
    url = urlsplit(client.meta.endpoint_url)
    if url.scheme not in ("http", "https") or url.path not in ("", "/") or url.query or url.username:
        return f"the endpoint {client.meta.endpoint_url} has more than a host"
    proxies = urllib.request.getproxies()
    if (url.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(url.netloc):
        return "a proxy is set in the environment"
    for name in _OPTIONS:
        if getattr(config, name, None):
            return f"the client is configured with {name}"
    for name in _SETTINGS:
        if session.get_config_variable(name):
            return f"{name} is configured"
    if signer.signature_version != "v4" or signer.signing_name != "sqs" or signer._credentials is None:
        return f"requests are signed with {signer.signature_version} for {signer.signing_name}"
    if url.scheme == "https" and client._endpoint.http_session._verify is not True:
        return "certificates are not verified against botocore's bundle (AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE, verify=)"
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
