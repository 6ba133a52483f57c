"""Broker URLs, and the choice of an engine's broker (the caller's process). Opens nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.brokers.shown import shown as shown_of
from sqspipes_mp.brokers.sqlite import SQLite
from sqspipes_mp.brokers.sqs import SQS
from sqspipes_mp.errors import ConfigError

#: The logger of the warning that no broker was chosen.
CHOICE = "sqspipes_mp.brokers.choice"
log = logging.getLogger(CHOICE)

#: Environment variable with the URL of the broker, for programs that choose none.
VARIABLE = "SQSPIPES_BROKER"

_SQS_FORMS = "sqs://, sqs://REGION or sqs://REGION?endpoint_url=URL"
_SQLITE_FORMS = "sqlite:///relative.db, sqlite:////absolute.db or sqlite:// (a temporary file)"
#: An option's name; anything else may be a part of a secret.
_NAME = re.compile("[a-z_]+")
#: Methods by which an object counts as a broker.
_METHODS = ("check", "warm", "open", "describe")


def parse(url: str) -> SQS | SQLite:
    """Return the broker of a URL. Raises ``ConfigError`` for a text that is no broker URL, without any secret in it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise _bad(shown_of(url), "a URL", f"Write {_SQS_FORMS}, {_SQLITE_FORMS}") from None
    shown = shown_of(url)
    if parts.scheme not in ("sqs", "sqlite"):
        near = get_close_matches(parts.scheme, ("sqs", "sqlite"), 1)
        hint = f"Did you mean {near[0]}://? " if near else ""
        raise _bad(shown, "an sqs:// or sqlite:// URL", f"{hint}{_SQS_FORMS}; {_SQLITE_FORMS}")
    if not url.partition(":")[2].startswith("//"):
        raise _bad(shown, f"written with // after {parts.scheme}:", f"{_SQS_FORMS}; {_SQLITE_FORMS}")
    if "@" in parts.netloc or ("@" in parts.path and parts.scheme == "sqs"):
        cure = "Put them into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), a profile or a role"
        raise _bad(shown, "free of credentials", cure)
    if parts.fragment:
        raise _bad(shown, "without a #fragment", "Write # in a path or value as %23")
    return _sqs(parts, shown) if parts.scheme == "sqs" else _sqlite(parts, shown)


def resolve(broker: object, domain: str, environ: Mapping[str, str]) -> Broker:
    """Return the broker of an engine: the argument, else ``SQSPIPES_BROKER``, else SQLite in ./{domain}.db.

    ``broker``: a broker, its URL or None. The last choice is logged as a warning, and so is a variable that has no
    effect. Settings of AWS in the environment never choose SQS. Raises ``ConfigError``.
    """
    url = environ.get(VARIABLE, "")
    if broker is not None:
        chosen = parse(broker) if isinstance(broker, str) else _given(broker)
        if url and not _says(url, chosen):
            log.warning(
                "%s: %s is set and has no effect, as the code names a broker. Leave Engine(broker=) out, or give the "
                "command line --broker URL",
                domain, VARIABLE,
            )  # fmt: skip
        return chosen
    if url:
        try:
            return parse(url)
        except ConfigError as error:
            error.add_note(f"It comes from the environment variable {VARIABLE}.")
            raise
    path = f"./{domain}.db"
    log.warning(
        'no broker was chosen: using SQLite in %s. Choose with Engine(broker="sqlite:///%s.db") or %s; for SQS: '
        "sqs://us-west-2",
        path,
        domain,
        VARIABLE,
    )
    return SQLite(path)


def _says(url: str, broker: Broker) -> bool:
    """Tell whether a URL says where ``broker`` is."""
    try:
        other = parse(url)
    except ConfigError:
        return False
    places = ("path", "region", "endpoint_url")
    return type(other) is type(broker) and all(getattr(other, name, 0) == getattr(broker, name, 0) for name in places)


def _given(broker: object) -> Broker:
    """Return an object that was given as a broker. Raises ``ConfigError`` where it is none."""
    if isinstance(broker, type):
        cure = f"Make one: {broker.__name__}(...)"
    elif all(callable(getattr(broker, name, None)) for name in _METHODS):
        return cast("Broker", broker)
    else:
        cure = 'Give SQS("us-west-2"), SQLite("work.db") or a URL'
    raise ConfigError("broker", broker, "a broker, its URL, or None", cure)


def _sqs(parts: SplitResult, shown: str) -> SQS:
    if parts.path:
        raise _bad(shown, "without a path", f"Queues are named by the domain; write {_SQS_FORMS}")
    if ":" in parts.netloc:
        cure = f"An endpoint goes into the query: sqs://REGION?endpoint_url=http{shown.removeprefix('sqs')}"
        raise _bad(shown, "sqs:// with a region, not a host and port", cure)
    options = _options(parts, shown, ("endpoint_url",))
    return SQS(unquote(parts.netloc) or None, endpoint_url=options.get("endpoint_url"))


def _sqlite(parts: SplitResult, shown: str) -> SQLite:
    _options(parts, shown, ())
    if parts.netloc:
        cure = f"For a relative path write three slashes: sqlite:///{shown.partition('//')[2]}"
        raise _bad(shown, "sqlite:// without a host: a file of this machine", cure)
    if not parts.path:
        return SQLite(None)
    path = unquote(parts.path.removeprefix("/"))
    if path.strip("/") == "" or path == ":memory:":
        cure = f"{_SQLITE_FORMS}; workers are processes, so they need a file to share"
        raise _bad(shown, "the path of a file", cure)
    return SQLite(path)


def _options(parts: SplitResult, shown: str, known: tuple[str, ...]) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            near = get_close_matches(name, known, 1, 0.4)
            allowed = f"one of {', '.join(known)}" if known else f"none: {parts.scheme}:// takes no options"
            cure = f"Did you mean {near[0]}?" if near else f"Everything else goes into code: {_class_of(parts)}(...)"
            told = name if _NAME.fullmatch(name) and "@" not in parts.query else "..."
            raise ConfigError(f"option of the broker URL {shown}", told, allowed, cure)
        if name in options or not value:
            raise ConfigError(f"{name} of the broker URL {shown}", shown_of(value), "given once, with a value", "")
        options[name] = value
    return options


def _class_of(parts: SplitResult) -> str:
    return "SQS" if parts.scheme == "sqs" else "SQLite"


def _bad(shown: str, allowed: str, cure: str) -> ConfigError:
    return ConfigError("broker URL", shown, allowed, cure)
