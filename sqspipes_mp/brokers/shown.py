"""URLs for people, without the parts that may hold a secret. Pure (any process)."""

from __future__ import annotations

import re

#: A host with a dot or a port, or a region.
_PLACE = re.compile(r"[^.]+\..|[^:]+:\d|localhost$|\[|[a-z]+-[a-z-]+-\d+$")


def shown(url: str) -> str:
    """Return a URL for an error or a log: no user, no password, no query, no fragment.

    A password may hold any character, unescaped, so a URL that can be read in two ways shows no more than its scheme.
    """
    start, colon, rest = url.partition(":")
    if not colon:
        start, rest = "", url
    scheme, slashes = start + colon, "//" if rest.startswith("//") else ""
    rest = rest.removeprefix("//")
    before, at, after = rest.partition("@")
    if "@" in after or (at and re.search("[?#]", before)):
        return f"{scheme}{slashes}..."
    host, slash, path = re.split("[?#]", after if at else rest, maxsplit=1)[0].partition("/")
    name, colon, port = host.rpartition(":")
    if colon and not port.isdecimal() and not (host.startswith("[") and host.endswith("]")):
        # No port: a user's name with a password, perhaps.
        host, slash, path = f"{name.partition(':')[0]}:...", "", ""
    if at and not _PLACE.match(host):
        # The end of a password with an @, perhaps.
        host, slash, path = "...", "", ""
    return "".join((scheme, slashes, "...@" if at else "", host, slash, path))
