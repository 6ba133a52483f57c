"""Texts of others as text for people: nothing in them moves a cursor or begins a line. Pure (any process).

Anybody may have sent a message: bodies, ids, groups, failures and exceptions about them are shown in logs, tables and
errors.
"""

from __future__ import annotations

#: Characters of one shown text, where nothing else is said.
_MOST = 200


def one_line(text: object, most: int = _MOST) -> str:
    """Return the first ``most`` characters of a text, with every character escaped that is not printable.

    Line ends, ESC and marks of writing direction are not printable (``str.isprintable``).
    """
    shown = str(text)[:most]
    return shown if shown.isprintable() else "".join([c if c.isprintable() else _escaped(c) for c in shown])


def lines(text: str) -> str:
    """Return a text of several lines; every character but line feeds and tabs is escaped as in ``one_line``."""
    return "".join([c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text])


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
