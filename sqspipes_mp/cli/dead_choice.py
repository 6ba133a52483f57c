"""The flags that choose dead letters: IDs, ``--stage``, ``--error``, ``--since``, ``--match`` (the command line)."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Collection
from datetime import datetime, timedelta

from sqspipes_mp.caller.choice import Choice
from sqspipes_mp.cli.exits import Refused
from sqspipes_mp.pipeline.stages import Pipeline

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def add_choice(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--stage", metavar="NAME", help="only those of this task")
    parser.add_argument("--error", metavar="NAME", help="only those of this exception: ValueError")
    parser.add_argument("--since", metavar="WHEN", help="only those that failed since: 90s, 30m, 2h, 1d ago, or a time")
    parser.add_argument("--match", metavar="TEXT", help="only those with this text in key, value, body or error")


def choice_of(flags: Namespace, pipeline: Pipeline) -> Choice:
    """Return the choice that the flags make. Raises ``Refused`` and ``ConfigError``."""
    if flags.stage is not None:
        pipeline.stage(flags.stage, "--stage")
    since = None if flags.since is None else _since(flags.since)
    return Choice.of("dead", stage=flags.stage, error=flags.error, since=since, match=flags.match)


def ids_of(flags: Namespace, chosen: Choice) -> Collection[str] | None:
    """Return the ids of a command that moves letters; None: all that fit. Raises ``Refused`` where none are named."""
    if flags.ids and flags.all:
        raise Refused("give IDs as in dead list, or --all, not both")
    if not (flags.ids or flags.all or chosen.narrow):
        raise Refused("give IDs as in dead list, or --all, or choose by --stage, --error, --since or --match")
    return flags.ids or None


def _since(text: str) -> datetime | timedelta:
    ago = _AGO.fullmatch(text.strip())
    try:
        if ago is not None:
            return timedelta(**{_UNITS[ago[2]]: float(ago[1])})
        return datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise Refused(
            f"--since must be a time ago (90s, 30m, 2h, 1d) or a date and time (2026-03-01 14:00), got {text!r}"
        ) from None
