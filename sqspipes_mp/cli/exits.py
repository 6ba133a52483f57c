"""Exit codes, and the exit code of each exception. Pure (the command line's process)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from sqspipes_mp.errors import BootError, BrokerError, ChildNote, ConfigError, LeftNote, MapRunning, RestartLimit


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    BOOT = 3
    RESTARTS = 4
    #: Through, with dead letters.
    DEAD_LETTERS = 5
    #: A run that has an end was stopped by a signal before it: 128 and the signal's number, as a shell has it.
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


#: The exit code of a run that has an end, by the signal in its summary's ``reason``.
STOPPED_BY = {"SIGHUP": Exit.HUNG_UP, "SIGINT": Exit.INTERRUPTED, "SIGTERM": Exit.TERMINATED}


class Refused(Exception):
    """A command ends for a reason the user can act on. ``__cause__``: the exception of the user's code, if any."""

    def __init__(self, message: str, code: Exit = Exit.USAGE) -> None:
        self.message = message
        self.code = code
        super().__init__(message)


class Stopped(SystemExit):
    """SIGTERM came while no run was under way that could drain."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a command."""

    code: Exit
    #: The reason; "" for none.
    message: str = ""
    #: The exception whose traceback is shown before it; None: no traceback.
    traceback: BaseException | None = None


def child_note(error: BaseException) -> ChildNote | None:
    """Return the note of the child process that raised ``error``; None: it was raised in this process."""
    return next((note for note in getattr(error, "__notes__", ()) if isinstance(note, ChildNote)), None)


def ending_of(error: BaseException, finish: str = "") -> Ending | None:
    """Return the ending of a command that raised ``error``; None for argparse's exit, which is none of ours.

    ``finish``: the command that finishes the messages which a run with a source has left.
    """
    if isinstance(error, Refused):
        return Ending(error.code, error.message, error.__cause__)
    notes = getattr(error, "__notes__", ())
    anew = finish if any(isinstance(note, LeftNote) for note in notes) else ""
    child = child_note(error)
    if child is not None:
        return _of_a_child(error, child, anew)
    if isinstance(error, (KeyboardInterrupt, Stopped)):
        return Ending(Exit.DONE)
    if isinstance(error, SystemExit):
        return None
    if isinstance(error, RestartLimit):
        return Ending(Exit.RESTARTS, f"{error}. {_finishing(anew)}" if anew else str(error))
    if isinstance(error, ConfigError):
        return Ending(Exit.USAGE, "\n".join(map(str, [error, *notes])))
    if isinstance(error, MapRunning):
        return Ending(Exit.FAILED, str(error))
    if isinstance(error, (BootError, BrokerError)):
        return Ending(Exit.BOOT, str(error))
    return Ending(Exit.FAILED, "this is not a task's exception but the engine's; please report it", error)


def _of_a_child(error: BaseException, note: ChildNote, finish: str) -> Ending:
    if note.booting and isinstance(error, (BrokerError, ConfigError)):
        return Ending(Exit.BOOT, f"the queues could not be used: {error}")
    if note.booting:
        return Ending(Exit.BOOT, "a process could not start: see what runs in setup, in init and in __init__", error)
    if isinstance(error, BrokerError):
        return Ending(Exit.FAILED, f"the queues cannot be used any more: {error}")
    failed = "a task failed. "
    if note.held:
        failed = "a task failed; its message is back in its queue, or dead-lettered after its last attempt. "
    again = _finishing(finish) if finish else "Correct the task and run again"
    return Ending(
        Exit.FAILED,
        f"{failed}{again}, or go on despite failures: --on-error retry, --on-error reject",
        error,
    )


def _finishing(command: str) -> str:
    return (
        f"Correct the task; run again, the source begins anew and makes everything once more, so finish what is in the "
        f"queues first: {command}"
    )
