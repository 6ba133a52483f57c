"""What ``SQS(...)`` may be given (any process). Pure; every refusal is a ``ConfigError`` that shows no secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from sqspipes_mp.errors import ConfigError

#: Shortest and longest MessageRetentionPeriod in seconds (Amazon SQS API Reference, CreateQueue).
MIN_RETENTION = 60
MAX_RETENTION = 1_209_600
#: Most tags of a queue (Amazon SQS API Reference, TagQueue).
MAX_TAGS = 50

_REGION = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def check_region(region: object) -> None:
    """Refuse what is no region name."""
    if region is not None and not (isinstance(region, str) and _REGION.fullmatch(region)):
        allowed = 'a region name such as "us-west-2", or None for boto3\'s own choice'
        raise ConfigError("SQS(region)", region, allowed, "aws configure list shows the one in use")


def check_endpoint(url: object) -> None:
    """Refuse what is no http(s) URL of a host, and one that carries credentials."""
    if url is None:
        return
    allowed = "an http or https URL of a host, or None"
    cure = 'Write, say, "http://127.0.0.1:5000"'
    if not isinstance(url, str):
        raise ConfigError("SQS(endpoint_url=)", url, allowed, cure)
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ConfigError("SQS(endpoint_url=)", _without_user(url), allowed, cure) from None
    if "@" in parts.netloc:
        cure = "Take the credentials out of the URL: SQS(access_key=, secret_key=) or the environment"
        raise ConfigError("SQS(endpoint_url=)", _without_user(url), "free of credentials", cure)
    if not good or parts.query or parts.fragment or any(c.isspace() for c in url):
        raise ConfigError("SQS(endpoint_url=)", url, allowed, cure)


def check_keys(access_key: object, secret_key: object) -> None:
    """Refuse half a pair of credentials."""
    for field, value in (("SQS(access_key=)", access_key), ("SQS(secret_key=)", secret_key)):
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(field, type(value).__name__, "a non-empty string or None", "Credentials come in pairs")
    if (access_key is None) != (secret_key is None):
        field, other = ("access_key", "secret_key") if access_key is None else ("secret_key", "access_key")
        allowed = f"given together with {other}"
        raise ConfigError(f"SQS({field}=)", None, allowed, "Give both, or neither and let boto3 find them")


def check_retention(seconds: object) -> None:
    """Refuse a retention SQS does not have."""
    whole = isinstance(seconds, int) and not isinstance(seconds, bool)
    if not (whole and seconds in range(MIN_RETENTION, MAX_RETENTION + 1)):
        allowed = f"whole seconds between {MIN_RETENTION} and {MAX_RETENTION} (14 days)"
        raise ConfigError("SQS(retention=)", seconds, allowed, "SQS keeps no message longer")


def check_kms_key(key: object) -> None:
    """Refuse what names no key."""
    if key is not None and not (isinstance(key, str) and key):
        cure = 'Give its id, ARN or alias, such as "alias/mine"; None is the encryption SQS does by itself'
        raise ConfigError("SQS(kms_key=)", key, "a KMS key's name or None", cure)


def checked_tags(tags: object) -> dict[str, str] | None:
    """Return a copy of the tags; refuse what SQS would."""
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


def is_loopback(url: str) -> bool:
    """Tell whether an endpoint is on this machine: an emulator, then."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _without_user(url: str) -> str:
    return re.sub(r"//[^/]*@", "//...@", url)
