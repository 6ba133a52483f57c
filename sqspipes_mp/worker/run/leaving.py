"""What a worker that ends does with the messages it still has (worker)."""

from __future__ import annotations

from sqspipes_mp.worker.context import Delivery
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.send.outgoing import Release


def hand_over(parts: Parts) -> None:
    """Before a planned end: leave to others what was not begun, and what still comes in."""
    ready, stopping = parts.ready, parts.station.full_stop.is_set
    closed = False
    while not (closed or stopping()):
        # Asked first: nothing is put after the closing.
        closed = ready.closed
        parts.run_callbacks()
        if held := ready.take_all():
            parts.outbox.put(Release(tuple(held), 0.0))
        if not closed:
            ready.wait(stopping)


def give_back(parts: Parts, back: list[Delivery], charged: list[Delivery]) -> None:
    """Return what was not begun, once no worker of this engine would take it again.

    ``back``: to go back as well; ``charged``: as failed attempts.
    """
    station, results, outbox = parts.station, parts.results, parts.outbox
    if results is not None:
        results.wait_taken()
    unacknowledged = results.take_unacknowledged() if results is not None else []
    held = [done.delivery for done in unacknowledged if done.delivery is not None]
    if not station.full_stop.is_set():
        if held:
            outbox.put(Release(tuple(held), 0.0))
        return
    while not (station.release.is_set() or station.faulted.is_set()):
        station.release.wait(1.0)
        parts.run_callbacks()
    held = [*back, *parts.ready.take_all(), *held]
    if charged:
        outbox.put(Release(tuple(charged), 0.0, charge=True))
    if held:
        outbox.put(Release(tuple(held), 0.0))
