"""A finding of a check, and findings as text and JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    #: Costs something, or may cost something later.
    WARN = "warn"
    #: A run does not work, or loses messages.
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer of one check."""

    check: str
    level: Level
    seen: str
    #: Why it matters; empty where all is well.
    why: str = ""
    #: The cure, as a command or a change of the code; empty where all is well.
    cure: str = ""


def ok(check: str, seen: str) -> Finding:
    """Return the finding that all is well."""
    return Finding(check, Level.OK, seen)


def warn(check: str, seen: str, why: str, cure: str) -> Finding:
    """Return the finding of something that costs."""
    return Finding(check, Level.WARN, seen, why, cure)


def fail(check: str, seen: str, why: str, cure: str) -> Finding:
    """Return the finding of something that does not work."""
    return Finding(check, Level.FAIL, seen, why, cure)


def failed(findings: Sequence[Finding]) -> bool:
    """Tell whether any finding is a failure."""
    return any(finding.level is Level.FAIL for finding in findings)


def as_text(findings: Sequence[Finding]) -> str:
    """Return findings as lines: the good ones with what was seen, the others with why it matters and the cure."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<4}  {finding.check}: {finding.seen}")
        if finding.level is not Level.OK:
            lines += [f"      why: {finding.why}", f"      cure: {finding.cure}"]
    counts = ", ".join(f"{sum(one.level is level for one in findings)} {level}" for level in Level)
    return "\n".join([*lines, "", counts])


def as_plain(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Return findings for JSON."""
    return [{key: str(value) for key, value in asdict(finding).items()} for finding in findings]
