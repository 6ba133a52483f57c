"""How a run ended, in a form that can cross a process boundary, and its effect on the caller."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from sqspipes_mp.errors import SqsPipesError
from sqspipes_mp.report import Report, rebuild
from sqspipes_mp.summary import Summary


@dataclass(frozen=True, slots=True)
class Outcome:
    """``report``: a child's exception; ``error``: the engine's own; ``signal``: the signal that ended the run."""

    summary: Summary
    report: Report | None = None
    error: SqsPipesError | None = None
    signal: int | None = None


def conclude(outcome: Outcome) -> Summary:
    """Return the summary, or raise what ended the run. Raises KeyboardInterrupt for SIGINT."""
    if outcome.report is not None:
        raise rebuild(outcome.report)
    if outcome.error is not None:
        raise outcome.error
    if outcome.signal == signal.SIGINT:
        raise KeyboardInterrupt
    return outcome.summary
