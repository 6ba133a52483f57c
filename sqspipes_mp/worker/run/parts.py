"""The objects that a worker's main thread needs, in one dataclass (worker)."""

from __future__ import annotations

from dataclasses import dataclass

from sqspipes_mp.pipeline.outputs import Products
from sqspipes_mp.worker.context import WorkerContext
from sqspipes_mp.worker.fifo_order import GroupOrder
from sqspipes_mp.worker.pause import Pause
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.run.function import Function
from sqspipes_mp.worker.send.failures import Failures
from sqspipes_mp.worker.send.outbox import Outbox
from sqspipes_mp.worker.send.result_window import ResultWindow


@dataclass(frozen=True, slots=True)
class Parts:
    """The objects of one worker, put together in ``worker/main.py``."""

    context: WorkerContext
    #: The user's function.
    function: Function
    #: Messages received, not started.
    ready: Ready
    #: Keeps the order of FIFO groups.
    order: GroupOrder
    #: Sees to messages that failed.
    failures: Failures
    #: Sends outputs, then deletes inputs.
    outbox: Outbox
    #: Makes messages of returned values.
    products: Products
    #: Follows the orders to pause and to go on.
    pause: Pause
    #: Streams results to an iterating caller; None without one.
    results: ResultWindow | None

    def run_callbacks(self) -> None:
        """Run the ``TaskCallback``s of the results that were accepted meanwhile."""
        callbacks = self.ready.callbacks
        while callbacks:
            callbacks.popleft()()
            self.context.check_process()
