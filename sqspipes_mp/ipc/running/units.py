"""Times as people read them, in one form in tables, sentences and on the page (any process). Pure, and light."""

from __future__ import annotations


def short_time(seconds: float) -> str:
    """Return a time with its unit: "15us", "450ms", "9.9s", "42s", "3m04s", "2h05m", "3d04h", "364d"."""
    if seconds < 0.000_999_5:
        return f"{seconds * 1e6:.0f}us" if seconds else "0s"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f}ms"
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02}m"
    return f"{hours // 24}d{hours % 24:02}h" if hours < 2400 else f"{hours // 24}d"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 call", "2 calls"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
