"""How a run ended, in a form that can cross a process boundary, and its effect on the caller."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from sqspipes_mp.errors import LeftNote, SqsPipesError
from sqspipes_mp.ipc.report.report import Report, rebuild
from sqspipes_mp.ipc.summary import Summary


@dataclass(frozen=True, slots=True)
class Outcome:
    """``report``: a child's exception; ``error``: the engine's own; ``signal``: the signal that ended the run.

    ``note``: what the exception of a failed run is to say besides.
    """

    summary: Summary
    report: Report | None = None
    error: SqsPipesError | None = None
    signal: int | None = None
    note: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the caller gets ``exception()`` instead of the summary."""
        return self.report is not None or self.error is not None or self.signal == signal.SIGINT

    def exception(self) -> BaseException:
        """Return what to raise: what ended the run, KeyboardInterrupt with the ``summary`` for SIGINT.

        For the public method to raise itself: each function it passes through is one more frame that the user reads
        before those of the task.
        """
        error = rebuild(self.report) if self.report is not None else self.error
        if error is not None:
            if self.note is not None:
                error.add_note(LeftNote(self.note))
            return error
        interrupt = KeyboardInterrupt()
        interrupt.summary = self.summary  # type: ignore[attr-defined]
        return interrupt
