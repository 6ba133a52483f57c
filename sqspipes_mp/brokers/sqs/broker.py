"""``SQS(...)``, the SQS broker as the user declares it, and the boto3 clients of each process.

``check`` and ``warm`` run in the process that forks, ``open`` in each child after the fork. botocore is imported inside
the functions that need it: naming ``SQS`` must not cost the 110 ms of its import.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from sqspipes_mp.brokers.base import QueueSpec, Wallet
from sqspipes_mp.brokers.examined import Examined
from sqspipes_mp.brokers.rights import Use
from sqspipes_mp.brokers.shown import shown
from sqspipes_mp.brokers.sqs.calls import Calls, Clients
from sqspipes_mp.brokers.sqs.connection import SqsConnection, requests_at_once
from sqspipes_mp.brokers.sqs.credentials import adopt, find_credentials, forbid_prompts, no_credentials, share
from sqspipes_mp.brokers.sqs.entries import MAX_DELAY
from sqspipes_mp.brokers.sqs.examine import PATIENCE, examine_queues, watch_clock
from sqspipes_mp.brokers.sqs.faults import CallFailed, Kind, classify_error, no_keys, without_keys
from sqspipes_mp.brokers.sqs.http import Lean, frozen
from sqspipes_mp.brokers.sqs.http_fit import log_once, switched_off, target_of
from sqspipes_mp.brokers.sqs.iam import make_policy
from sqspipes_mp.brokers.sqs.queues import Making, Queues
from sqspipes_mp.brokers.sqs.sockets import Sockets
from sqspipes_mp.errors import BrokerError, ConfigError
from sqspipes_mp.messages.limits import MAX_VISIBILITY

if TYPE_CHECKING:
    import boto3
    import botocore.config
    import botocore.loaders
    import botocore.session

T = TypeVar("T")

log = logging.getLogger("sqspipes_mp.brokers.sqs")

#: Seconds that a call waits for its answer. A connection that a NAT gateway or load balancer has cut (they do so after
#: 350 s without traffic) is noticed after this time.
READ_TIMEOUT = 10
#: The same for a receive, whose long poll takes up to 20 s.
POLL_READ_TIMEOUT = 30
#: Seconds that a connection may take to be made.
CONNECT_TIMEOUT = 5
#: Shortest and longest MessageRetentionPeriod, seconds (Amazon SQS API Reference, CreateQueue).
MIN_RETENTION = 60
MAX_RETENTION = 1_209_600
#: Most tags of a queue (Amazon SQS API Reference, TagQueue).
MAX_TAGS = 50

_REGION = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
#: An endpoint of SQS that its region tells already.
_USUAL = re.compile(r"https://sqs\.[a-z0-9-]+\.amazonaws\.com(\.cn)?/?")
_SET_REGION = 'Give one, SQS("us-west-2") or sqs://us-west-2, or set AWS_REGION or AWS_DEFAULT_REGION'

#: botocore's data loader, which has parsed the data of a client; forked children share its memory.
_warm: dict[str, botocore.loaders.Loader] = {}


@dataclass(slots=True, eq=False)
class SQS:
    """Amazon SQS, or another service with its protocol at ``endpoint_url``. Picklable; constructing it opens nothing.

    Raises ``ConfigError`` for a value that cannot be right.
    """

    #: Such as "us-west-2"; None: boto3's own choice (AWS_DEFAULT_REGION, AWS_REGION, the profile's).
    region: str | None = None
    _: KW_ONLY
    #: http or https URL of another endpoint: an emulator or a VPC endpoint.
    endpoint_url: str | None = None
    #: Static credentials, together with ``secret_key``; None: boto3's own chain.
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    #: Returns a ``boto3.Session`` (profiles, assumed roles); called in each child. Credentials that boto3 itself renews
    #: are fetched once for all children, those that the callable fetches are not.
    session: Callable[[], boto3.Session] | None = field(default=None, repr=False)
    #: Seconds that a queue created by the engine keeps a message: 60 to 1,209,600 (14 days).
    retention: int = MAX_RETENTION
    #: KMS key of queues created by the engine: its id, ARN or alias.
    kms_key: str | None = field(default=None, repr=False)
    #: Tags of queues created by the engine.
    tags: Mapping[str, str] | None = field(default=None, repr=False)
    #: False, or SQSPIPES_MP_LEAN=0 in the environment: boto3 makes the hot calls, too.
    lean: bool = True
    #: Seconds from its receive for which a message can be in flight.
    longest_hold: float = field(default=MAX_VISIBILITY, init=False, repr=False)
    #: Region and endpoint that ``check`` has found; "": not yet.
    _found: tuple[str, str] = field(default=("", ""), init=False, repr=False)
    _settle: float = field(default=60.0, init=False, repr=False)
    _purge_window: float = field(default=60.0, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_region(self.region)
        _check_endpoint(self.endpoint_url)
        _check_keys(self.access_key, self.secret_key)
        if self.session is not None and not callable(self.session):
            cure = "Pass lambda: boto3.Session(...): each child makes its own after the fork"
            raise ConfigError(
                "SQS(session=)", type(self.session).__name__, "a callable returning a boto3.Session", cure
            )
        if self.session is not None and self.access_key is not None:
            allowed = "given without access_key and secret_key"
            raise ConfigError("SQS(session=)", "both", allowed, "Let the session hold the credentials")
        _check_retention(self.retention)
        _check_kms_key(self.kms_key)
        self.tags = _checked_tags(self.tags)
        if not isinstance(self.lean, bool):
            raise ConfigError("SQS(lean=)", self.lean, "True or False", "Leave it out: lean=False is for comparing")

    @property
    def longest_delay(self) -> float:
        """12 hours, and a day less than the retention; SQS's own delay always."""
        return max(float(MAX_DELAY), min(MAX_VISIBILITY, self.retention - 86_400.0))

    def check(self) -> None:
        """Check region, profile and endpoint without a request. Raises ``ConfigError``.

        With ``session`` nothing is checked before ``open``: making the session may use the network.
        """
        if self.session is None:
            session = _new_session()
            region = self._region(session)
            self._found = region, self._throwaway(session, region)

    def warm(self) -> None:
        """Parse botocore's data once, for children that are forked later.

        The client that does it has dummy credentials: finding real ones may use the network.
        """
        if _warm:
            return
        session = _new_session()
        self._throwaway(session, self.region or "us-east-1")
        _warm["data_loader"] = session.get_component("data_loader")

    def open(
        self, *, patience: float | None = None, wallet: Wallet | None = None, attended: bool = False
    ) -> SqsConnection:
        """Return a connection with the boto3 clients of this process.

        ``patience``, ``wallet``, ``attended``: see ``Broker.open``. Raises ``ConfigError`` without region or
        credentials.
        """
        sockets = Sockets()
        made = self._make(patience, wallet, sockets)

        def renew() -> tuple[Clients, Lean | None] | None:
            nonlocal made
            newer = self._make(patience, wallet, sockets, worn=made.text)
            if newer.shown in (None, made.shown):
                return None
            made = newer
            return made.clients, made.lean

        def tend() -> None:
            if patience is not None and wallet is not None and made.session is not None:
                share(made.session, wallet, patience)

        calls = Calls(made.clients, patience, made.lean, renew, attended=attended)
        making = Making(self.retention, self.kms_key, self.tags or {})
        connection = SqsConnection(calls, Queues(calls, making), tend)
        connection.settle = self._settle
        connection.purge_window = self._purge_window
        return connection

    def examine(self, queues: Sequence[QueueSpec]) -> Examined:
        """Ask SQS about itself and these queues, and change nothing."""
        found = Examined(service="sqs", region=self.describe())
        try:
            self.check()
            credentials = self._find(self._sessions()[0])
            # The source that botocore tells of: "env", "iam-role", "assume-role", "sso" and others.
            source = str(getattr(credentials, "method", "") or "SQS(session=)")
            found = replace(found, region=self.describe(), credentials=source)
            with contextlib.closing(self.open(patience=PATIENCE)) as connection:
                ahead = watch_clock(connection._calls)
                asked = examine_queues(connection._queues, queues)
                at_once = connection.carriers, requests_at_once(-1)
                return replace(found, queues=asked, clock_ahead=ahead(), at_once=at_once)
        except (ConfigError, BrokerError) as error:
            return replace(found, trouble=str(error))

    def policy(self, uses: Sequence[Use], *, create: bool) -> dict[str, Any]:
        """Return the IAM policy of a run; makes no request. Raises ``ConfigError`` as ``check``."""
        self.check()
        region = self.region or self._found[0] or "*"
        return make_policy(uses, region=region, create=create, tagged=bool(self.tags), kms_key=self.kms_key)

    @property
    def temporary(self) -> bool:
        """False: queues of SQS stay."""
        return False

    @property
    def remembers_keys(self) -> bool:
        """False: SQS remembers a key for five minutes at most, and shows no message without a receive."""
        return False

    def exists(self) -> bool:
        """Return True: only a request could tell."""
        return True

    def lock_file(self, domain: str) -> str | None:  # noqa: ARG002  (the port's)
        """Return None: SQS has no locks."""
        return None

    def cleanup(self) -> None:
        """Do nothing: queues of SQS stay."""

    def describe(self) -> str:
        """Return region and endpoint for logs, without secrets.

        Before ``check``, an endpoint of the environment is known and one of a profile is not.
        """
        region, endpoint = self._found
        if not endpoint and os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
            endpoint = os.environ.get("AWS_ENDPOINT_URL_SQS") or os.environ.get("AWS_ENDPOINT_URL") or ""
        where = [self.region or region, shown(self.endpoint_url or endpoint)]
        if _USUAL.fullmatch(where[1]):
            where.pop()
        return f"SQS ({' at '.join(filter(None, where)) or 'region of the environment'})"

    def _region(self, session: botocore.session.Session) -> str:
        ambient = _or_config_error(lambda: session.get_config_variable("region"))
        region = self.region or ambient or os.environ.get("AWS_REGION")
        if not region:
            raise ConfigError("SQS region", None, "an AWS region", _SET_REGION)
        return str(region)

    def _throwaway(self, session: botocore.session.Session, region: str) -> str:
        """Make a client with dummy credentials and close it: that parses data and checks settings.

        Returns the endpoint that it would use.
        """

        def make() -> Any:
            return session.create_client(
                "sqs",
                region_name=region,
                endpoint_url=self.endpoint_url,
                aws_access_key_id="unused",
                aws_secret_access_key="unused",  # noqa: S106  (signs nothing)
                config=_config(READ_TIMEOUT),
            )

        client = _or_config_error(make)
        client.close()
        return shown(str(client.meta.endpoint_url))

    def _make(self, patience: float | None, wallet: Wallet | None, sockets: Sockets, worn: str | None = None) -> _Made:
        """Return the clients of this process. ``worn``: a text of the wallet whose credentials are refused.

        Raises ``ConfigError`` without region or credentials, ``AccessDenied`` where credentials cannot be had.
        """
        fills = patience is not None
        text = wallet.read() if wallet is not None and self.access_key is None else None
        if text == worn:
            text = None
        session, core = self._sessions()
        region = self._region_of(session, core)
        if core is not None:
            forbid_prompts(core)
            if wallet is not None and text is not None:
                again = _new_session if self.session is None else lambda: self._sessions()[1]
                adopt(core, text, wallet, again, fills=fills)
        credentials = self._find(session)
        keys = partial(frozen, credentials.get_frozen_credentials)

        def make(config: botocore.config.Config) -> Any:
            new = session.create_client if self.session is None else session.client
            return _or_config_error(
                lambda: new("sqs", region_name=region, endpoint_url=self.endpoint_url, config=config)
            )

        hot, poll = make(_config(READ_TIMEOUT, patience)), make(_config(POLL_READ_TIMEOUT))
        for client in (hot, poll):
            sockets.watch(client)
        endpoint = shown(str(hot.meta.endpoint_url))
        timeout = READ_TIMEOUT if patience is None else patience
        clients = Clients(hot, poll, region, endpoint, keys, _is_loopback(endpoint), timeout, POLL_READ_TIMEOUT)
        return _Made(clients, self._lean_path(hot, core, patience, sockets), core, text)

    def _sessions(self) -> tuple[Any, botocore.session.Session | None]:
        """Return a session that makes clients, the user's or botocore's, and its botocore session.

        A user's session of another class has none that is known: its credentials are not shared, and boto3 makes all
        calls.
        """
        if self.session is None:
            session = _new_session()
            if self.access_key is not None and self.secret_key is not None:
                session.set_credentials(self.access_key, self.secret_key)
            return session, session
        try:
            theirs = self.session()
        except Exception as error:
            if (fault := classify_error(error)) is None:
                raise
            raise without_keys(
                no_keys(error) if fault.kind is not Kind.CREDENTIALS else fault, "SQS(session=)"
            ) from error
        if not callable(getattr(theirs, "client", None)):
            cure = "Write session=lambda: boto3.Session(profile_name=...)"
            raise ConfigError("SQS(session=)", type(theirs).__name__, "a callable returning a boto3.Session", cure)
        return theirs, getattr(theirs, "_session", None)

    def _region_of(self, session: Any, core: botocore.session.Session | None) -> str:
        if self.session is None:
            assert core is not None
            return self._region(core)
        region = self.region or session.region_name or os.environ.get("AWS_REGION")
        if not region:
            raise ConfigError("SQS region", None, "an AWS region", f"{_SET_REGION}, or give the session one")
        return str(region)

    def _find(self, session: Any) -> Any:
        """Return a session's credentials. Raises ``ConfigError``, and ``AccessDenied`` where they cannot be had."""
        try:
            credentials = _or_config_error(partial(find_credentials, session))
        except CallFailed as failed:
            raise without_keys(failed.fault, self.describe()) from failed.__cause__
        if credentials is None:
            raise self._no_credentials()
        return credentials

    def _no_credentials(self) -> ConfigError:
        return no_credentials(emulator=self.endpoint_url is not None and _is_loopback(self.endpoint_url))

    def _lean_path(self, client: Any, session: Any, patience: float | None, sockets: Sockets) -> Lean | None:
        """Return the lean path in place of a client's hot calls; None: boto3 makes all calls."""
        if not self.lean or switched_off():
            return None
        target = target_of(client, session)
        if isinstance(target, str):
            log_once("boto3 makes all calls to %s: %s", shown(client.meta.endpoint_url), target)
            return None
        timeout = CONNECT_TIMEOUT if patience is None else patience
        return Lean(target, connect_timeout=timeout, tries=_tries(patience), opened=sockets.add)


@dataclass(frozen=True, slots=True)
class _Made:
    """The clients of one process, and their credentials' origin."""

    clients: Clients
    lean: Lean | None
    #: The botocore session; None: the user's session has none that is known.
    session: botocore.session.Session | None
    #: The wallet's text that the credentials are of; None: they are not the wallet's.
    text: str | None

    @property
    def shown(self) -> Any:
        """The credentials now; None where they cannot be had."""
        try:
            return self.clients.keys()
        except CallFailed:
            return None


def _tries(patience: float | None) -> int:
    """Return the most tries of one call by botocore or the lean path."""
    return 2 if patience is None else 1


def _new_session() -> botocore.session.Session:
    """Return a botocore session with the warm data loader, patient with metadata services."""
    import botocore.session  # noqa: PLC0415  (see the module docstring)

    session = botocore.session.Session()
    for name, component in _warm.items():
        session.register_component(name, component)
    # A metadata service throttles workers that start together: botocore's default, one try of 1 s, fails for a fleet.
    for variable, default, ours in (("metadata_service_timeout", 1, 2), ("metadata_service_num_attempts", 1, 3)):
        if _or_config_error(partial(session.get_config_variable, variable)) == default:
            session.set_config_variable(variable, ours)
    return session


def _config(read_timeout: float, patience: float | None = None) -> botocore.config.Config:
    """Return the configuration of a client with a read timeout, seconds."""
    import botocore.config  # noqa: PLC0415

    return botocore.config.Config(
        # A fixed user agent and no validation save 15 % of a call: botocore builds its own user agent twice per call.
        user_agent=f"sqspipes-mp botocore/{botocore.__version__}",
        parameter_validation=False,
        connect_timeout=CONNECT_TIMEOUT if patience is None else patience,
        read_timeout=read_timeout if patience is None else patience,
        retries={"mode": "standard", "total_max_attempts": _tries(patience)},
        max_pool_connections=50,
        tcp_keepalive=True,
    )


def _or_config_error(make: Callable[[], T]) -> T:
    """Return the result of a call of botocore in which only the configuration can be wrong.

    Raises ``ConfigError`` for its errors.
    """
    import botocore.exceptions  # noqa: PLC0415

    try:
        return make()
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        cure = "Check SQS(...), AWS_PROFILE, the other AWS_ variables, and the AWS config and credentials files"
        raise ConfigError("AWS configuration", str(error), "usable by boto3", cure) from error


def _is_loopback(url: str) -> bool:
    """Tell whether an endpoint is on this machine: an emulator."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


# The arguments of ``SQS``: each check raises a ``ConfigError`` that shows no secret.


def _check_region(region: object) -> None:
    """Refuse a value that is no region name."""
    if region is not None and not (isinstance(region, str) and _REGION.fullmatch(region)):
        allowed = 'a region name such as "us-west-2", or None for boto3\'s own choice'
        raise ConfigError("SQS(region)", region, allowed, "aws configure list shows the one in use")


def _check_endpoint(url: object) -> None:
    """Refuse a value that is no http or https URL of a host, and a URL with credentials."""
    if url is None:
        return
    allowed = "an http or https URL of a host, or None"
    cure = 'Write, say, "http://127.0.0.1:5000"'
    if not isinstance(url, str):
        raise ConfigError("SQS(endpoint_url=)", type(url).__name__, allowed, cure)
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        # Raised below: as the context of ours, this error would show what was taken for a port.
        good = False
    if "@" in url:
        cure = "Take the credentials out of the URL: SQS(access_key=, secret_key=) or the environment"
        raise ConfigError("SQS(endpoint_url=)", shown(url), "free of credentials", cure)
    if not good or any(c in url for c in "?#") or any(c.isspace() for c in url):
        raise ConfigError("SQS(endpoint_url=)", shown(url), allowed, cure)


def _check_keys(access_key: object, secret_key: object) -> None:
    """Refuse credentials that are no strings, or none that a request can carry, and half a pair."""
    for name, value in (("SQS(access_key=)", access_key), ("SQS(secret_key=)", secret_key)):
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(name, type(value).__name__, "a non-empty string or None", "Credentials come in pairs")
        if isinstance(value, str) and not (value.isascii() and value.isprintable() and " " not in value):
            cure = "Was it read from a file, or copied, with more than itself? Then strip() it"
            raise ConfigError(name, "a string", "free of line breaks, white space and non-ASCII characters", cure)
    if (access_key is None) != (secret_key is None):
        name, other = ("access_key", "secret_key") if access_key is None else ("secret_key", "access_key")
        allowed = f"given together with {other}"
        raise ConfigError(f"SQS({name}=)", None, allowed, "Give both, or neither and let boto3 find them")


def _check_retention(seconds: object) -> None:
    """Refuse a retention that SQS does not have."""
    whole = isinstance(seconds, int) and not isinstance(seconds, bool)
    if not (whole and seconds in range(MIN_RETENTION, MAX_RETENTION + 1)):
        allowed = f"whole seconds between {MIN_RETENTION} and {MAX_RETENTION} (14 days)"
        raise ConfigError("SQS(retention=)", seconds, allowed, "SQS keeps no message longer")


def _check_kms_key(key: object) -> None:
    """Refuse a value that is no name of a key."""
    if key is not None and not (isinstance(key, str) and key):
        cure = 'Give its id, ARN or alias, such as "alias/mine"; None is the encryption SQS does by itself'
        raise ConfigError("SQS(kms_key=)", key, "a KMS key's name or None", cure)


def _checked_tags(tags: object) -> dict[str, str] | None:
    """Return a copy of the tags; refuse tags that SQS would refuse."""
    if tags is None:
        return None
    allowed = f"a dict of at most {MAX_TAGS} strings (1 to 128 characters) to strings (at most 256)"
    if not isinstance(tags, Mapping) or len(tags) > MAX_TAGS:
        raise ConfigError("SQS(tags=)", tags, allowed, 'Write, say, {"team": "search"}')
    for name, value in tags.items():
        strings = isinstance(name, str) and isinstance(value, str)
        if not strings or not 1 <= len(name) <= 128 or len(value) > 256:
            raise ConfigError("SQS(tags=)", {name: value}, allowed, "Shorten it, or turn it into strings")
    return dict(tags)
