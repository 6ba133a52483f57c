"""Cancels a running call, by order: its worker is killed, and the keeper dead-letters its message (supervisor).

The mark on the call comes before the look whether it runs, as with a late call. A call may end between that look and
the kill: the state of its lease at the worker's death decides, and so the answer waits for the death.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sqspipes_mp.ipc.leases import Cause, Lease, LeaseState, id_digest
from sqspipes_mp.ipc.statistics import RunningCall
from sqspipes_mp.supervisor.children import Children
from sqspipes_mp.supervisor.control import Client, Refused
from sqspipes_mp.supervisor.slot import Slot, Worker

log = logging.getLogger("sqspipes_mp.supervisor")

#: Fewest characters of an id that name a call.
_SHORTEST = 4
#: States of a call that counts as cancelled at its worker's death: none of its outputs is known to be accepted.
_CANCELLED = frozenset({LeaseState.RUNNING, LeaseState.DONE, LeaseState.FAILED, LeaseState.CHARGING})


@dataclass(frozen=True, slots=True)
class _Cancel:
    """An order whose worker is about to die."""

    client: Client
    ident: object
    #: The message's hop id.
    hop: str
    lease: Lease
    #: Calls that ran beside it.
    beside: int


class Cancelling:
    """Cancels calls."""

    def __init__(self, children: Children) -> None:
        self._children = children
        #: By the slot's number.
        self._orders: dict[int, _Cancel] = {}

    def cancel(self, text: object, client: Client, ident: object) -> None:
        """Cancel the call whose message's hop id begins with ``text``. Raises ``Refused``."""
        slot, worker, call = self._find(text)
        if slot.cause is not None:
            raise Refused(f"{slot.name} (pid {worker.child.pid}) is being killed already, for another reason")
        region, lease = worker.region, worker.region.read(call.lease, self._children.plan.queue_names)
        over = Refused(f"the call {call.hop} is over")
        # Read again: the lease is this call's only if the call runs still.
        if lease is None or lease.state is not LeaseState.RUNNING or not self._runs(slot, call):
            raise over
        region.blame(lease, Cause.CANCEL)
        if not region.runs(lease):
            region.spare()
            raise over
        slot.kill(Cause.CANCEL)
        self._children.board.cancel(id_digest(lease.handle.message_id))
        beside = len(self._children.board.running(slot.index)) - 1
        self._orders[slot.index] = _Cancel(client, ident, call.hop, lease, max(0, beside))
        log.warning(
            "%s (pid %d): the call %s is cancelled, on demand (sqspipes-mp cancel, say)",
            slot.name,
            worker.child.pid,
            call.hop,
        )
        worker.child.kill()

    def dead(self, slot: Slot, worker: Worker) -> None:
        """Answer the order for which a slot's worker is dead; before the keeper may judge its leases."""
        order = self._orders.pop(slot.index, None)
        if order is None:
            return
        now = worker.region.read(order.lease.index)
        if now is not None and now.generation == order.lease.generation and now.state in _CANCELLED:
            order.client.answer(
                order.ident, cancelled=order.hop, stage=slot.stage.name, worker=slot.seat.index, beside=order.beside
            )
            return
        self._children.board.forget_cancelled(id_digest(order.lease.handle.message_id))
        order.client.refuse(order.ident, f"the call {order.hop} was over before its worker could be killed")

    def _find(self, text: object) -> tuple[Slot, Worker, RunningCall]:
        if not isinstance(text, str) or len(text) < _SHORTEST:
            raise Refused(
                f"call must be the id of a running call, or the first {_SHORTEST} or more characters of it, "
                f"got {text!r}; top shows it in its column message"
            )
        found = {
            call.hop: (slot, worker, call)
            for slot, worker in self._children.workers
            for call in self._children.board.running(slot.index)
            if call.hop.startswith(text)
        }
        if len(found) > 1:
            raise Refused(f"the ids of several running calls begin so: {', '.join(sorted(found))}")
        if not found:
            raise Refused(
                f"no call {text} runs here: it is over, or has not begun, or its message only waits, or is held"
            )
        return next(iter(found.values()))

    def _runs(self, slot: Slot, call: RunningCall) -> bool:
        calls = self._children.board.running(slot.index)
        return any((each.started, each.hop, each.lease) == (call.started, call.hop, call.lease) for each in calls)
