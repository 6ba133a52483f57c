"""New connections of the lean path (``http``), made as boto3 makes its own: TCP, TLS and proxies are urllib3's.

``Connector.of`` takes the settings from botocore's HTTP session, which has resolved AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE,
``ca_bundle``, ``verify=``, client certificates, HTTPS_PROXY, HTTP_PROXY and NO_PROXY. One difference: boto3 reads the
CA bundle again for each connection (14 ms of CPU), a ``Connector`` once.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from sqspipes_mp.brokers.sqs.faults import CallFailed, Fault, Kind
from sqspipes_mp.errors import ConfigError


class Socket(Protocol):
    """A connected socket, an ``ssl.SSLSocket``, or urllib3's TLS within TLS."""

    def sendall(self, data: bytes, /) -> None: ...
    def recv(self, size: int, /) -> bytes: ...
    def settimeout(self, seconds: float, /) -> None: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Unreachable(CallFailed):
    """No connection, one that ended too early, or no answer in time."""

    def __init__(self, text: str, *, code: str = "ConnectionClosedError") -> None:
        super().__init__(Fault(Kind.UNREACHABLE, code, text))


@dataclass(frozen=True, slots=True)
class Connector:
    """Makes connections to one endpoint, for any thread."""

    host: str
    port: int
    #: Certificates to trust and to show; None: the endpoint speaks plain HTTP.
    context: ssl.SSLContext | None = None
    #: Proxy in front of the endpoint: a ``urllib3.util.Url``. None: there is none.
    proxy: Any = field(default=None, repr=False)
    #: ``ProxyConfig`` of urllib3: the proxy's own certificates.
    proxy_config: Any = None
    #: Header fields for the proxy: the credentials of its URL.
    proxy_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    socket_options: Sequence[tuple[int, int, int]] = ()

    @classmethod
    def of(cls, session: Any, url: str) -> Connector:
        """Return the connector of an endpoint with the settings of a ``botocore.httpsession.URLLib3Session``.

        Raises ``ConfigError`` for a CA bundle or client certificate that cannot be read, and ``Unknown``.
        """
        import botocore.httpsession  # noqa: PLC0415  (see ``broker``)
        from urllib3.util.ssl_ import create_urllib3_context  # noqa: PLC0415

        parts = urlsplit(url)
        tls = parts.scheme == "https"
        context: ssl.SSLContext | None = None
        if tls:
            context = botocore.httpsession.create_urllib3_context()
            _trust(context, session._verify)
            _show(context, session._cert_file, session._key_file)
            _fix_protocols(context)
        proxy: dict[str, Any] = {}
        if proxy_url := session._proxy_config.proxy_url_for(url):
            manager = session._get_proxy_manager(proxy_url)
            _check_proxy(manager, tls=tls)
            config = manager.proxy_config
            if manager.proxy.scheme == "https" and config.ssl_context is None:
                # urllib3 would make it anew for each connection. The client certificate is for the endpoint alone.
                outer = create_urllib3_context()
                _trust(outer, session._verify)
                config = config._replace(ssl_context=outer)
            if config.ssl_context is not None:
                _fix_protocols(config.ssl_context)
            proxy = {"proxy": manager.proxy, "proxy_config": config, "proxy_headers": dict(manager.proxy_headers)}
        port = parts.port or (443 if tls else 80)
        return cls(str(parts.hostname), port, context, socket_options=list(session._socket_options), **proxy)

    @property
    def authority(self) -> str:
        """The Host header, with the port where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (80 if self.context is None else 443) else f"{host}:{self.port}"

    @property
    def forwards(self) -> bool:
        """Whether the proxy reads the requests: those to a plain HTTP endpoint. Others pass it in a tunnel."""
        return self.proxy is not None and self.context is None

    def __call__(self, timeout: float) -> Socket:
        """Return a new connection, with tunnel and handshake done.

        ``timeout``: seconds that each step may take. Raises ``Unreachable``, whose code is "CertificateError" where one
        side does not trust the other's certificate.
        """
        import urllib3.connection  # noqa: PLC0415  (see ``broker``)
        from urllib3.util.ssl_match_hostname import CertificateError  # noqa: PLC0415

        host, port = (self.host, self.port) if self.proxy is None else (self.proxy.host, self.proxy.port)
        settings: dict[str, Any] = {
            "timeout": timeout,
            "socket_options": self.socket_options,
            "proxy": self.proxy,
            "proxy_config": self.proxy_config,
        }
        if self.context is None:
            made = urllib3.connection.HTTPConnection(host, port, **settings)
        else:
            made = urllib3.connection.HTTPSConnection(host, port, ssl_context=self.context, **settings)
            # urllib3 2 has set these to the same values; urllib3 1 leaves them to its pools.
            made.cert_reqs = self.context.verify_mode
            made.assert_hostname = made.assert_fingerprint = None
            if self.proxy is not None:
                within = {"scheme": "https"} if self.proxy.scheme == "https" else {}
                made.set_tunnel(self.host, self.port, self.proxy_headers, **within)
        try:
            made.connect()
        except (OSError, urllib3.exceptions.HTTPError, http.client.HTTPException, CertificateError) as error:
            made.close()
            through = "" if self.proxy is None else f" through the proxy {host}:{port}"
            code = "CertificateError" if refuses_certificate(error) else "EndpointConnectionError"
            # Before the last argument come the connection or a number.
            detail = error.args[-1] if error.args else type(error).__name__
            raise Unreachable(f"{self.authority}{through}: {detail}", code=code) from error
        sock: Any = made.sock
        return sock  # type: ignore[no-any-return]


class Unknown(Exception):
    """Settings that the lean path does not know; its text is the reason to stay with boto3."""


def refuses_certificate(error: BaseException | None) -> bool:
    """Tell whether an exception is for a certificate that one side does not trust: boto3's, urllib3's, or ours."""
    from urllib3.util.ssl_match_hostname import CertificateError  # noqa: PLC0415  (see ``broker``)

    while error is not None:
        # OpenSSL's reason: CERTIFICATE_VERIFY_FAILED, TLSV13_ALERT_CERTIFICATE_REQUIRED, SSLV3_ALERT_BAD_CERTIFICATE.
        if isinstance(error, CertificateError) or (
            isinstance(error, ssl.SSLError) and "CERTIFICATE" in (error.reason or "")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _trust(context: ssl.SSLContext, verify: bool | str) -> None:
    """Have a context trust a CA bundle.

    ``verify``: its path, True: botocore's, False: any certificate will do. Raises ``ConfigError``.
    """
    import botocore.httpsession  # noqa: PLC0415  (see ``broker``)

    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return
    bundle = os.path.expanduser(botocore.httpsession.get_cert_path(verify))  # noqa: PTH111
    with _config_error("CA bundle (AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE, ca_bundle, verify=)", bundle):
        context.load_verify_locations(bundle)


def _show(context: ssl.SSLContext, certificate: str | None, key: str | None) -> None:
    """Have a context show a client certificate, if there is one. Raises ``ConfigError``."""
    if certificate:
        with _config_error("client certificate (Config(client_cert=))", certificate):
            # The empty password: OpenSSL would ask for that of an encrypted key on the terminal.
            context.load_cert_chain(certificate, key, password="")


def _fix_protocols(context: ssl.SSLContext) -> None:
    """Set a context's protocols for good.

    urllib3 sets them anew for each connection. Other threads may be copying them at that moment: OpenSSL does so
    without the GIL.
    """
    context.set_alpn_protocols(["http/1.1"])
    context.set_alpn_protocols = lambda *_: None  # type: ignore[method-assign]


@contextlib.contextmanager
def _config_error(name: str, path: str) -> Iterator[None]:
    """Turn errors of reading a file of certificates into ``ConfigError``."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(name, path, "a readable file of certificates (PEM)", str(error)) from error


def _check_proxy(manager: Any, *, tls: bool) -> None:
    """Raise ``Unknown`` for a proxy that only boto3 can use. ``manager``: its ``urllib3.ProxyManager``."""
    if manager.proxy_config.use_forwarding_for_https:
        raise Unknown("the proxy is configured with proxy_use_forwarding_for_https")
    if os.environ.get("BOTO_EXPERIMENTAL__ADD_PROXY_HOST_HEADER", "").lower() == "true":
        raise Unknown("BOTO_EXPERIMENTAL__ADD_PROXY_HOST_HEADER is set")
    if manager.proxy.scheme == "https" and not (tls and importlib.metadata.version("urllib3") >= "2"):
        raise Unknown("a proxy that speaks TLS serves https endpoints only, and with urllib3 2")
