"""Texts cut to a length. Pure (any process)."""

from __future__ import annotations

#: Stands for the middle of a text that has lines.
GAP = "\n... {lost} characters cut ...\n"


def cut_middle(text: str, keep: int, gap: str = GAP) -> str:
    """Return a text whose middle is cut out where it is longer than ``keep`` characters.

    ``keep`` characters of both ends stay, and ``gap`` comes on top: its ``{lost}`` becomes the number of characters
    that were cut, its ``{whole}`` the number of all characters.
    """
    lost = len(text) - keep
    if lost <= 0:
        return text
    head = keep // 2
    return f"{text[:head]}{gap.format(lost=lost, whole=len(text))}{text[head + lost :]}"
