"""``SQS(...)``: which SQS to use, and what a boto3 session of its own is made of.

The value itself travels through every process; ``check`` and ``warm`` run in the caller's, ``open`` in each child after
the fork. botocore is imported inside the functions that need it: naming ``SQS`` must not cost its 110 ms.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqspipes_mp.brokers.base import Wallet
from sqspipes_mp.brokers.sqs.calls import Calls, Clients
from sqspipes_mp.brokers.sqs.connection import SqsConnection
from sqspipes_mp.brokers.sqs.credentials import expiring, margins, newer, share
from sqspipes_mp.brokers.sqs.http import Lean
from sqspipes_mp.brokers.sqs.http_fit import switched_off, target_of
from sqspipes_mp.brokers.sqs.queues import Making, Queues
from sqspipes_mp.brokers.sqs.values import (
    MAX_RETENTION,
    check_endpoint,
    check_keys,
    check_kms_key,
    check_region,
    check_retention,
    checked_tags,
    is_loopback,
)
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.messages.limits import MAX_VISIBILITY

if TYPE_CHECKING:
    import boto3
    import botocore.config
    import botocore.loaders
    import botocore.session

T = TypeVar("T")

logger = logging.getLogger("sqspipes_mp.brokers.sqs")

#: Seconds a call may wait for its answer; a long poll of 20 s gets 10 s more. A connection that a NAT gateway or load
#: balancer has cut (they do after 350 s without traffic) is noticed after this long.
READ_TIMEOUT = 10
POLL_READ_TIMEOUT = 30
CONNECT_TIMEOUT = 5

_SET_REGION = 'Give one, SQS("us-west-2") or sqs://us-west-2, or set AWS_REGION or AWS_DEFAULT_REGION'
_SET_CREDENTIALS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, a role of the machine, or "
    "SQS(access_key=, secret_key=)"
)

#: botocore's data loader with what a client needs already parsed; a forked child finds it here and shares the memory.
_warm: dict[str, botocore.loaders.Loader] = {}


@dataclass(slots=True, eq=False)
class SQS:
    """Amazon SQS, or whatever speaks its protocol at ``endpoint_url``. Picklable; opens nothing by itself.

    ``region``: such as "us-west-2"; None takes boto3's (AWS_DEFAULT_REGION, AWS_REGION, the profile's).
    ``endpoint_url``: http(s) URL of another endpoint, an emulator or a VPC endpoint. ``access_key`` with
    ``secret_key``: static credentials; without them boto3's own chain. ``session``: a callable that returns a
    ``boto3.Session``, called in each child (profiles, assumed roles): credentials that boto3 itself renews are
    fetched once for all children, those that the callable fetches are not. For queues created here: ``retention`` in
    seconds (60 to 1,209,600, 14 days), ``kms_key`` (a key's id, ARN or alias) and ``tags``. ``lean=False``, or
    SQSPIPES_MP_LEAN=0 in the environment: boto3 makes the hot calls, too. Raises ``ConfigError`` for
    a value that cannot be right.
    """

    region: str | None = None
    _: KW_ONLY
    endpoint_url: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session: Callable[[], boto3.Session] | None = field(default=None, repr=False)
    retention: int = MAX_RETENTION
    kms_key: str | None = field(default=None, repr=False)
    tags: Mapping[str, str] | None = field(default=None, repr=False)
    lean: bool = True
    #: Seconds for which a message can be in flight, counted from its receive.
    longest_hold: float = field(default=MAX_VISIBILITY, init=False, repr=False)
    _settle: float = field(default=60.0, init=False, repr=False)
    _purge_window: float = field(default=60.0, init=False, repr=False)

    def __post_init__(self) -> None:
        check_region(self.region)
        check_endpoint(self.endpoint_url)
        check_keys(self.access_key, self.secret_key)
        if self.session is not None and not callable(self.session):
            cure = "Pass lambda: boto3.Session(...): each child makes its own after the fork"
            raise ConfigError(
                "SQS(session=)", type(self.session).__name__, "a callable returning a boto3.Session", cure
            )
        if self.session is not None and self.access_key is not None:
            allowed = "given without access_key and secret_key"
            raise ConfigError("SQS(session=)", "both", allowed, "Let the session hold the credentials")
        check_retention(self.retention)
        check_kms_key(self.kms_key)
        self.tags = checked_tags(self.tags)
        if not isinstance(self.lean, bool):
            raise ConfigError("SQS(lean=)", self.lean, "True or False", "Leave it out: lean=False is for comparing")

    def check(self) -> None:
        """Find out what is wrong without asking anybody: region, profile, endpoint.

        With ``session`` only ``open`` can tell, since making the session may call the network.
        """
        if self.session is None:
            session = _new_session()
            self._throwaway(session, self._region(session))

    def warm(self) -> None:
        """Parse botocore's data once, for children forked later. Dummy credentials: real ones may call the network."""
        if _warm:
            return
        session = _new_session()
        self._throwaway(session, self.region or "us-east-1")
        _warm["data_loader"] = session.get_component("data_loader")

    def open(self, *, patience: float | None = None, wallet: Wallet | None = None) -> SqsConnection:
        """Make the two clients of this process. Raises ``ConfigError`` without region or credentials."""
        fills = patience is not None
        if self.session is None:
            make, region, session = self._from_chain(wallet, fills=fills)
        else:
            make, region, session = self._from_user(self.session, wallet, fills=fills)
        tend = (
            None if patience is None or wallet is None or session is None else partial(share, session, wallet, patience)
        )
        hot = _or_config_error(lambda: make(_config(READ_TIMEOUT, patience)))
        poll = _or_config_error(lambda: make(_config(POLL_READ_TIMEOUT)))
        endpoint = str(hot.meta.endpoint_url)
        loopback = is_loopback(endpoint)
        timeout = READ_TIMEOUT if patience is None else patience
        clients = Clients(hot, poll, region, endpoint, loopback, timeout, POLL_READ_TIMEOUT)
        calls = Calls(clients, patience, self._lean_path(hot, session, patience))
        making = Making(self.retention, self.kms_key, self.tags or {})
        connection = SqsConnection(calls, Queues(calls, making), tend)
        connection.settle = self._settle
        connection.purge_window = self._purge_window
        return connection

    @property
    def temporary(self) -> bool:
        """Queues of SQS stay."""
        return False

    @property
    def remembers_keys(self) -> bool:
        """SQS remembers none for longer than five minutes, and shows no message."""
        return False

    def exists(self) -> bool:
        """Return True: only a request would tell."""
        return True

    def lock_file(self, domain: str) -> str | None:  # noqa: ARG002  (the port's)
        """Return None: SQS has no locks."""
        return None

    def cleanup(self) -> None:
        """Do nothing: the queues stay."""

    def describe(self) -> str:
        """Say which SQS, without secrets."""
        where = [text for text in (self.region, self.endpoint_url) if text]
        return f"SQS ({' at '.join(where)})" if where else "SQS (region of the environment)"

    def _region(self, session: botocore.session.Session) -> str:
        ambient = _or_config_error(lambda: session.get_config_variable("region"))
        region = self.region or ambient or os.environ.get("AWS_REGION")
        if not region:
            raise ConfigError("SQS region", None, "an AWS region", _SET_REGION)
        return str(region)

    def _throwaway(self, session: botocore.session.Session, region: str) -> None:
        def make() -> Any:
            return session.create_client(
                "sqs",
                region_name=region,
                endpoint_url=self.endpoint_url,
                aws_access_key_id="unused",
                aws_secret_access_key="unused",  # noqa: S106  (signs nothing)
                config=_config(READ_TIMEOUT),
            )

        _or_config_error(make).close()

    def _from_chain(
        self, wallet: Wallet | None, *, fills: bool
    ) -> tuple[Callable[[botocore.config.Config], Any], str, botocore.session.Session]:
        session = _new_session()
        region = self._region(session)
        if wallet is not None and self.access_key is None and (text := wallet.read()) is not None:
            _adopt(session, text, wallet, _new_session, fills=fills)
        if self.access_key is not None and self.secret_key is not None:
            session.set_credentials(self.access_key, self.secret_key)
        if _or_config_error(session.get_credentials) is None:
            raise _no_credentials(self.endpoint_url)

        def make(config: botocore.config.Config) -> Any:
            return session.create_client("sqs", region_name=region, endpoint_url=self.endpoint_url, config=config)

        return make, region, session

    def _from_user(
        self, new_session: Callable[[], boto3.Session], wallet: Wallet | None, *, fills: bool
    ) -> tuple[Callable[[botocore.config.Config], Any], str, botocore.session.Session]:
        session = new_session()
        if not callable(getattr(session, "client", None)):
            cure = "Write session=lambda: boto3.Session(profile_name=...)"
            raise ConfigError("SQS(session=)", type(session).__name__, "a callable returning a boto3.Session", cure)
        region = self.region or session.region_name or os.environ.get("AWS_REGION")
        if not region:
            raise ConfigError("SQS region", None, "an AWS region", f"{_SET_REGION}, or give the session one")
        # What is no boto3.Session has none: it keeps its credentials to itself, and boto3 for all calls.
        core = getattr(session, "_session", None)
        if wallet is not None and core is not None and (text := wallet.read()) is not None:
            _adopt(core, text, wallet, lambda: getattr(new_session(), "_session", None), fills=fills)
        if _or_config_error(session.get_credentials) is None:
            raise _no_credentials(self.endpoint_url)

        def make(config: botocore.config.Config) -> Any:
            return session.client("sqs", region_name=region, endpoint_url=self.endpoint_url, config=config)

        return make, region, core

    def _lean_path(self, client: Any, session: Any, patience: float | None) -> Lean | None:
        import botocore.httpsession  # noqa: PLC0415

        if not self.lean or switched_off():
            return None
        target = target_of(client, session, botocore.httpsession.get_cert_path(verify=True))
        if isinstance(target, str):
            logger.debug("boto3 makes all calls to %s: %s", client.meta.endpoint_url, target)
            return None
        return Lean(target, connect_timeout=CONNECT_TIMEOUT if patience is None else patience, tries=_tries(patience))


def _tries(patience: float | None) -> int:
    return 2 if patience is None else 1


def _new_session() -> botocore.session.Session:
    import botocore.session  # noqa: PLC0415  (see the module docstring)

    session = botocore.session.Session()
    for name, component in _warm.items():
        session.register_component(name, component)
    # Workers start together, and the metadata services throttle: botocore's one try in 1 s fails fleets.
    for variable, default, ours in (("metadata_service_timeout", 1, 2), ("metadata_service_num_attempts", 1, 3)):
        if _or_config_error(partial(session.get_config_variable, variable)) == default:
            session.set_config_variable(variable, ours)
    return session


def _adopt(
    session: botocore.session.Session, text: str, wallet: Wallet, another: Callable[[], Any], *, fills: bool
) -> None:
    """Give a session the wallet's credentials; when they run out it looks there again, and only then asks ``another``.

    Before it has any: what it would find by itself, a role to assume or a metadata service, is not asked then.
    """
    import botocore.credentials  # noqa: PLC0415

    # Drawn here and not at the import, which forked workers share.
    advisory, mandatory = margins()

    def fetch() -> dict[str, Any]:
        found = (None if fills else newer(wallet, text, advisory)) or expiring(another())
        if found is None:
            raise _no_credentials(None)
        return found

    times = {} if fills else {"advisory_timeout": advisory, "mandatory_timeout": mandatory}
    metadata = json.loads(text)
    made = botocore.credentials.RefreshableCredentials.create_from_metadata(metadata, fetch, "sqspipes", **times)

    class Shared(botocore.credentials.CredentialProvider):
        METHOD = "sqspipes"

        def load(self) -> Any:
            return made

    # In front of all others, of which there are fewer where the session has a profile.
    session.get_component("credential_provider").providers.insert(0, Shared())


def _config(read_timeout: float, patience: float | None = None) -> botocore.config.Config:
    import botocore.config  # noqa: PLC0415

    return botocore.config.Config(
        # A pinned user agent and no second validation save 15 % of a call; botocore rebuilds its own twice per call.
        user_agent=f"sqspipes-mp botocore/{botocore.__version__}",
        parameter_validation=False,
        connect_timeout=CONNECT_TIMEOUT if patience is None else patience,
        read_timeout=read_timeout if patience is None else patience,
        retries={"mode": "standard", "total_max_attempts": _tries(patience)},
        max_pool_connections=50,
        tcp_keepalive=True,
    )


def _or_config_error(make: Callable[[], T]) -> T:
    """Call botocore where only the configuration can be at fault."""
    import botocore.exceptions  # noqa: PLC0415

    try:
        return make()
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        cure = "Check SQS(...), AWS_PROFILE, the other AWS_ variables, and the AWS config and credentials files"
        raise ConfigError("AWS configuration", str(error), "usable by boto3", cure) from error


def _no_credentials(endpoint_url: str | None) -> ConfigError:
    cure = _SET_CREDENTIALS
    if endpoint_url is not None and is_loopback(endpoint_url):
        cure += '. An emulator takes any pair: access_key="test", secret_key="test"'
    return ConfigError("SQS credentials", None, "AWS credentials (boto3 finds none)", cure)
