"""The part of the documentation that ``python -m benchmarks.modes --publish`` writes: one table, one picture."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent.parent
PAGE = _ROOT / "docs" / "explanation" / "processes.rst"
PICTURE = _ROOT / "docs" / "modes.png"
_BEGIN, _END = ".. measured: begins\n", ".. measured: ends\n"


def rewrite(where: str, measured: str, file: Path = PAGE) -> None:
    """Put a table, and when and where it was measured, between the two marks of the file; what is around them stays."""
    before, begin, rest = file.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{file}: the lines {_BEGIN.strip()!r} and {_END.strip()!r} are not there")
    told = f"Measured {where} at the start; median, and the least and greatest of the interleaved rounds:"
    picture = f".. image:: /{PICTURE.name}\n   :alt: The same as bars"
    file.write_text(f"{before}{begin}\n{_wrap(told)}\n\n{measured}\n\n{picture}\n\n{end}{after}")


def _wrap(text: str, width: int = 120) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return "\n".join(lines)
