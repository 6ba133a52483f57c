"""The orders that clients of the control socket may give, each a method (supervisor).

An order is a JSON object with ``do``, one of the table in ``Orders``. To add one: a method ``_name(order, client)``
that answers now, or keeps the client and answers in a later turn (``client.answer``, ``client.refuse``), and a line of
the table. It must not block.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

from sqspipes_mp.ipc.channel import Frame, Kind
from sqspipes_mp.ipc.stack_dump import DUMP
from sqspipes_mp.messages.hint import hint
from sqspipes_mp.supervisor.cancelling import Cancelling
from sqspipes_mp.supervisor.child import Child
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.control import Client, Refused
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.pausing import Pausing
from sqspipes_mp.supervisor.scaling import Scaling
from sqspipes_mp.supervisor.slot import LAST_WORDS, Slot, Worker
from sqspipes_mp.supervisor.stop_requests import Requests

#: Seconds that workers have to say where they are; one whose GIL is held in C code stays silent.
_STACK_PATIENCE = 2.0


@dataclass(slots=True)
class _Stacks:
    """A ``stack`` order that waits for its workers."""

    client: Client
    ident: object
    #: When to answer with the stacks that have come, monotonic seconds.
    until: float
    #: Workers that are still to answer, by ``Child.number``.
    awaited: dict[int, tuple[Slot, Worker]]
    told: list[dict[str, object]] = field(default_factory=list)
    #: Whether the workers write their stacks because of a signal.
    signalled: bool = False


class Orders:
    """Carries orders out."""

    def __init__(
        self,
        children: Children,
        events: Events,
        requests: Requests,
        pausing: Pausing,
        scaling: Scaling,
        cancelling: Cancelling,
    ) -> None:
        self._children = children
        self._events = events
        self._requests = requests
        self._pausing = pausing
        self._scaling = scaling
        self._cancelling = cancelling
        self._table = {
            "statistics": self._statistics,
            "look": self._look,
            "stop": self._stop,
            "stack": self._stack,
            "pause": self._pause,
            "resume": self._resume,
            "scale": self._scale,
            "cancel": self._cancel,
        }
        self._stacks: list[_Stacks] = []

    def carry(self, order: dict[str, Any], client: Client) -> None:
        """Carry an order out. Raises ``Refused``."""
        method = self._table.get(order["do"])
        if method is None:
            raise Refused(f"no such order; there are {', '.join(self._table)}")
        method(order, client)

    def deadline(self) -> float:
        """Return when ``look`` is due, monotonic seconds."""
        times = [stacks.until for stacks in self._stacks]
        if any(stacks.signalled for stacks in self._stacks):
            # Nobody tells that a dump is whole.
            times.append(time.monotonic() + LAST_WORDS)
        return min(times, default=math.inf)

    def look(self, now: float) -> None:
        """Give the answers that are due at ``now`` (monotonic seconds)."""
        for stacks in list(self._stacks):
            if stacks.signalled:
                self._read_dumps(stacks)
            if now >= stacks.until or not stacks.awaited:
                self._answer_stacks(stacks)

    def on_stack(self, child: Child, frame: Frame) -> None:
        """Take a worker's answer to ``Kind.STACK``."""
        for stacks in [each for each in self._stacks if not each.signalled]:
            found = stacks.awaited.pop(child.number, None)
            if found is not None:
                stacks.told.append({**_worker(*found), "stack": frame.blob.decode("utf-8", "replace")})
                if not stacks.awaited:
                    self._answer_stacks(stacks)

    # -- the orders ---------------------------------------------------------------------------------------------

    def _statistics(self, order: dict[str, Any], client: Client) -> None:
        """Hand out the statistics, read-only: for who cannot open them by the pid, in another pid namespace say."""
        try:
            fd = self._children.board.open_statistics()
        except OSError as error:
            raise Refused(f"this system hands out no read-only descriptor ({error})") from None
        try:
            client.answer(order.get("id"), fd)
        finally:
            os.close(fd)

    def _look(self, order: dict[str, Any], client: Client) -> None:
        """Have the keeper count the queues for somebody who looks, for 30 s; counts cost requests, which it tells."""
        self._children.tell_keeper(Kind.LOOK)
        client.answer(order.get("id"))

    def _stop(self, order: dict[str, Any], client: Client) -> None:
        """Drain the run, as a first SIGTERM does; a second order changes nothing."""
        self._requests.stop()
        client.answer(order.get("id"))

    def _pause(self, order: dict[str, Any], client: Client) -> None:
        """Pause ``stage``: its workers finish their calls, give back what they hold, and receive no more."""
        self._pausing.pause(self._stage(order), client, order.get("id"))

    def _resume(self, order: dict[str, Any], client: Client) -> None:
        """Have ``stage`` go on."""
        self._pausing.resume(self._stage(order))
        client.answer(order.get("id"))

    def _scale(self, order: dict[str, Any], client: Client) -> None:
        """Have ``workers`` (a number) in ``stage`` from now on."""
        self._scaling.scale(self._stage(order), order.get("workers"), client, order.get("id"))

    def _cancel(self, order: dict[str, Any], client: Client) -> None:
        """Cancel the running ``call``, named by its message's hop id."""
        self._cancelling.cancel(order.get("call"), client, order.get("id"))

    def _stage(self, order: dict[str, Any]) -> int:
        """Return the index of the order's ``stage``. Raises ``Refused``."""
        plan = self._children.plan
        names = {plan.pipeline.stages[index].name: index for index in plan.selected}
        name = order.get("stage")
        if not isinstance(name, str) or name not in names:
            raise Refused(f"stage must be one of {', '.join(names)}, got {name!r}{hint(name, names)}")
        return names[name]

    def _stack(self, order: dict[str, Any], client: Client) -> None:
        """Tell where workers are: those of ``stage``, or its ``worker`` (a number); ``signal``: ask by a signal."""
        asked = self._workers(order)
        writing = self._writing()
        awaited = {worker.child.number: (slot, worker) for slot, worker in asked}
        stacks = _Stacks(client, order.get("id"), time.monotonic() + _STACK_PATIENCE, awaited)
        stacks.signalled = order.get("signal") is True
        self._stacks.append(stacks)
        for slot, worker in asked:
            if not stacks.signalled:
                self._events.tell(worker.child.channel, Kind.STACK)
            elif slot.late is None and worker.child.number not in writing:
                # Else the dump is on its way already.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.child.pid, DUMP)

    def _read_dumps(self, stacks: _Stacks) -> None:
        """Take the stacks that are written whole; a dead worker's never will be."""
        for number, (slot, worker) in list(stacks.awaited.items()):
            if slot.worker is not worker:
                del stacks.awaited[number]
            elif worker.stack.whole:
                del stacks.awaited[number]
                stacks.told.append({**_worker(slot, worker), "stack": worker.stack.read_all()})
                if slot.late is None and number not in self._writing():
                    worker.stack.clear()

    def _writing(self) -> set[int]:
        """Return the workers, by ``Child.number``, whose stack an earlier order has asked for by a signal."""
        return {number for stacks in self._stacks if stacks.signalled for number in stacks.awaited}

    def _workers(self, order: dict[str, Any]) -> list[tuple[Slot, Worker]]:
        stage, name, number = self._stage(order), order.get("stage"), order.get("worker")
        found = [
            (slot, worker)
            for slot, worker in self._children.workers
            if slot.seat.stage == stage and slot.ready and (number is None or slot.seat.index == number)
        ]
        if not found:
            which = "" if number is None else f" number {number}"
            raise Refused(f"stage {name} has no worker{which} that is ready")
        return found

    def _answer_stacks(self, stacks: _Stacks) -> None:
        self._stacks.remove(stacks)
        silent = [_worker(slot, worker) for slot, worker in stacks.awaited.values()]
        stacks.client.answer(stacks.ident, stacks=stacks.told, silent=silent)


def _worker(slot: Slot, worker: Worker) -> dict[str, object]:
    return {"stage": slot.stage.name, "worker": slot.seat.index, "pid": worker.child.pid}
