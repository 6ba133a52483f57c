"""The outcome of an order in a sentence: for the command line, ``top`` and the page (any process). Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqspipes_mp.ipc.running.notes import worker_name
from sqspipes_mp.ipc.running.units import counted

Values = Mapping[str, Any]

#: Characters of a message's id for people; its beginnings are as good to every command.
SHOWN_ID = 12


def outcome(order: Values, answer: Values) -> str:
    """Return the outcome of an order that was carried out; the reach is told where the order could pass for wider."""
    told = _TOLD.get(str(order.get("do")))
    if told is None:
        return "done"
    text = told(order, answer)
    return f"{text} ({answer['reach']})" if order["do"] in {"pause", "resume", "scale"} else text


def _pause(order: Values, answer: Values) -> str:
    return f"{order['stage']} is paused; calls that run still: {answer['running']}"


def _resume(order: Values, _answer: Values) -> str:
    return f"{order['stage']} goes on"


def _scale(order: Values, answer: Values) -> str:
    rest = [f"{answer[key]} still {text}" for key, text in (("booting", "boot"), ("leaving", "run")) if answer[key]]
    told = f"{order['stage']}: {counted(answer['workers'], 'worker')}, {answer['was']} before"
    return f"{told}{''.join(f'; {each}' for each in rest)}"


def _cancel(_order: Values, answer: Values) -> str:
    beside = f"; {counted(answer['beside'], 'call')} beside it will run again" if answer["beside"] else ""
    ident = str(answer["cancelled"])[:SHOWN_ID]
    return f"{worker_name(answer)}: the call {ident} is cancelled, its message is a dead letter{beside}"


def _stop(_order: Values, _answer: Values) -> str:
    return "it is stopping: running calls end first, what is held goes back to its queue"


def _stack(_order: Values, answer: Values) -> str:
    silent = len(answer["silent"])
    told = f"stacks of {counted(len(answer['stacks']), 'worker')}"
    return f"{told}; {silent} gave no answer" if silent else told


_TOLD: dict[str, Callable[[Values, Values], str]] = {
    "pause": _pause, "resume": _resume, "scale": _scale, "cancel": _cancel, "stop": _stop, "stack": _stack,
}  # fmt: skip
