"""``sqspipes-mp pause, resume, scale, cancel``: orders to a running engine (the command line's process)."""

from __future__ import annotations

from argparse import Namespace

from sqspipes_mp.cli.console import Console
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.cli.look import order


def pause(flags: Namespace, console: Console) -> Exit:
    """Pause a stage."""
    answer = order(flags.target, {"do": "pause", "stage": flags.stage}, console)
    console.say(f"{flags.stage} is paused; calls that run still: {answer['running']}")
    return Exit.DONE


def resume(flags: Namespace, console: Console) -> Exit:
    """Have a paused stage go on."""
    order(flags.target, {"do": "resume", "stage": flags.stage}, console)
    console.say(f"{flags.stage} goes on")
    return Exit.DONE


def scale(flags: Namespace, console: Console) -> Exit:
    """Change the number of a stage's workers."""
    name, equals, count = flags.workers.partition("=")
    if not (name and equals and count.isascii() and count.isdigit()):
        raise Refused(f"scale takes NAME=N, a task and the number of its workers, not {flags.workers!r}")
    answer = order(flags.target, {"do": "scale", "stage": name, "workers": int(count)}, console)
    rest = [f"{answer[key]} still {text}" for key, text in (("booting", "boot"), ("leaving", "run")) if answer[key]]
    console.say(f"{name}: {answer['workers']} workers, {answer['was']} before{''.join(f'; {each}' for each in rest)}")
    return Exit.DONE


def cancel(flags: Namespace, console: Console) -> Exit:
    """Cancel a running call."""
    answer = order(flags.target, {"do": "cancel", "call": flags.id}, console)
    beside = f"; {answer['beside']} calls beside it run again" if answer["beside"] else ""
    console.say(f"{answer['stage']}[{answer['worker']}]: the call {answer['cancelled']} is cancelled{beside}")
    return Exit.DONE
