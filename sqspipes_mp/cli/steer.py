"""``sqspipes-mp pause, resume, scale, cancel``: orders to a running engine (the command line's process)."""

from __future__ import annotations

from argparse import Namespace

from sqspipes_mp.cli.console import Console
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.cli.look import order


def pause(flags: Namespace, console: Console) -> Exit:
    """Pause a stage."""
    order(flags.target, {"do": "pause", "stage": flags.stage}, console)
    return Exit.DONE


def resume(flags: Namespace, console: Console) -> Exit:
    """Have a paused stage go on."""
    order(flags.target, {"do": "resume", "stage": flags.stage}, console)
    return Exit.DONE


def scale(flags: Namespace, console: Console) -> Exit:
    """Change the number of a stage's workers."""
    name, equals, count = flags.workers.partition("=")
    if not (name and equals and count.isascii() and count.isdigit()):
        raise Refused(f"scale takes NAME=N, a task and the number of its workers, not {flags.workers!r}")
    order(flags.target, {"do": "scale", "stage": name, "workers": int(count)}, console)
    return Exit.DONE


def cancel(flags: Namespace, console: Console) -> Exit:
    """Cancel a running call."""
    order(flags.target, {"do": "cancel", "call": flags.id}, console)
    return Exit.DONE
