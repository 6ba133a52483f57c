"""The outcome of a run, in a form that crosses process boundaries, and its effect on the caller (any process)."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from sqspipes_mp.errors import LeftNote, SqsPipesError
from sqspipes_mp.ipc.report.report import Report, rebuild
from sqspipes_mp.ipc.summary import Summary


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run."""

    summary: Summary
    #: A child's exception that ended the run.
    report: Report | None = None
    #: The engine's own error that ended the run.
    error: SqsPipesError | None = None
    #: The signal that ended the run.
    signal: int | None = None
    #: A note for the exception of a failed run.
    note: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the caller gets ``exception()`` instead of the summary."""
        return self.report is not None or self.error is not None or self.signal == signal.SIGINT

    def exception(self) -> BaseException:
        """Return the exception of a failed run; for SIGINT a KeyboardInterrupt with the ``summary``.

        The public method raises it: each function in between would be a frame that the user reads before the task's.
        """
        error = rebuild(self.report) if self.report is not None else self.error
        if error is not None:
            if self.note is not None:
                error.add_note(LeftNote(self.note))
            return error
        interrupt = KeyboardInterrupt()
        interrupt.summary = self.summary  # type: ignore[attr-defined]
        return interrupt
