"""A worker's stacks, those of the user's code in full. Pure (the command line's process)."""

from __future__ import annotations

import re

_FRAME = re.compile(r'^  File "([^"]*)"', re.MULTILINE)
#: Files of this package and of the standard library's waiting.
_OURS = re.compile(r"/sqspipes_mp/|/(threading|queue|socket|selectors|ssl)\.py$|/concurrent/futures/")


def parted(stack: str) -> tuple[str, list[str]]:
    """Return the stacks of the main thread and of those in the user's code, and the names of the other threads."""
    shown: list[str] = []
    others: list[str] = []
    for part in re.split(r"^(?=Thread )", stack, flags=re.MULTILINE):
        files = _FRAME.findall(part)
        if len(shown) > 0 and files and all(_OURS.search(file) for file in files):
            others.append(part.partition(":")[0].removeprefix("Thread "))
        elif part:
            shown.append(part)
    return "".join(shown).rstrip(), others
