"""The runs an engine has going in this process: how each is started, and how all of them are stopped (caller)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.iteration import Iteration
from sqspipes_mp.plan import RunPlan
from sqspipes_mp.supervisor.outcome import Outcome
from sqspipes_mp.supervisor.run import choose_context, supervise
from sqspipes_mp.supervisor.signals import Wakeup


class Runs:
    """Starts runs and remembers how to stop them."""

    def __init__(self) -> None:
        self._stoppers: list[Callable[[], None]] = []

    def run(self, plan: RunPlan, broker: Broker) -> Outcome:
        """Supervise here until the run ends."""
        from sqspipes_mp.children import MAINS  # noqa: PLC0415  (only a run needs what runs in children)

        wakeup = Wakeup()
        self._stoppers.append(wakeup.stop)
        try:
            return supervise(plan, broker, MAINS, choose_context(plan, broker), wakeup)
        finally:
            self._stoppers.remove(wakeup.stop)
            wakeup.close()

    def iterate(self, plan: RunPlan, broker: Broker, owner: object) -> Iterator[Any]:
        """Supervise in a process of its own; ``owner`` lives as long as the iteration does."""
        from sqspipes_mp.children import MAINS  # noqa: PLC0415  (only a run needs what runs in children)

        stoppers = self._stoppers

        def ended() -> None:
            stoppers[:] = [stop for stop in stoppers if stop is not stopper]

        iteration = Iteration(plan, broker, MAINS, choose_context(plan, broker), ended, owner)
        weak = weakref.ref(iteration)

        def stopper() -> None:
            # Not a strong reference: losing the caller's last one is what closes an iteration.
            alive = weak()
            if alive is not None:
                alive.stop()

        stoppers.append(stopper)
        return iteration

    def stop(self) -> None:
        """Drain all of them."""
        for stopper in list(self._stoppers):
            stopper()
