"""The name that a person may have meant by a mistyped one. Pure (any process)."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def hint(wrong: object, names: Iterable[str]) -> str:
    """Return the name that comes nearest to a wrong one, as a question; empty: none does."""
    near = get_close_matches(str(wrong), [name for name in names if name], 1)
    return f". Did you mean {near[0]!r}?" if near else ""
