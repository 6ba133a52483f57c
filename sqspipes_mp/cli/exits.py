"""How a command ends: exit codes, and which one an exception means. Pure (the command line's process)."""

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


class Refused(Exception):
    """A command ends here, for a reason the user can act on; ``__cause__``: the user's own exception, if any."""

    def __init__(self, message: str, code: Exit = Exit.USAGE) -> None:
        self.message = message
        self.code = code
        super().__init__(message)


class Stopped(SystemExit):
    """SIGTERM came while nothing was running that could drain."""


@dataclass(frozen=True, slots=True)
class Ending:
    """``message``: what to tell, "" for nothing; ``traceback``: of whom, None where the message says it all."""

    code: Exit
    message: str = ""
    traceback: BaseException | None = None


def judge(error: BaseException, finish: str = "") -> Ending | None:
    """Return how a command ends that raised ``error``; None: it is no business of ours (argparse's exit).

    ``finish``: the command that finishes only what a run with a source has left.
    """
    if isinstance(error, Refused):
        return Ending(error.code, error.message, error.__cause__)
    notes = getattr(error, "__notes__", ())
    anew = finish if any(isinstance(note, LeftNote) for note in notes) else ""
    for note in notes:
        if isinstance(note, ChildNote):
            return _of_a_child(error, booting=note.booting, held=note.held, finish=anew)
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


def _of_a_child(error: BaseException, *, booting: bool, held: bool, finish: str) -> Ending:
    if booting and isinstance(error, (BrokerError, ConfigError)):
        return Ending(Exit.BOOT, f"the queues could not be used: {error}")
    if booting:
        return Ending(Exit.BOOT, "a process could not start: see what runs in setup, in init and in __init__", error)
    if isinstance(error, BrokerError):
        return Ending(Exit.FAILED, f"the queues cannot be used any more: {error}")
    # A source has no message.
    what = "a task failed; its message is back in its queue, or dead-lettered after its last attempt. "
    again = _finishing(finish) if finish else "Correct the task and run again"
    return Ending(
        Exit.FAILED,
        f"{what if held else 'a task failed. '}{again}, or go on despite failures: --on-error retry, --on-error reject",
        error,
    )


def _finishing(command: str) -> str:
    return (
        f"Correct the task; run again, the source begins anew and makes everything once more, so finish what is in the "
        f"queues first: {command}"
    )
