"""The objects that a worker's main thread needs, in one dataclass (worker)."""

from __future__ import annotations

from dataclasses import dataclass

from sqspipes_mp.pipeline.outputs import Products
from sqspipes_mp.worker.context import WorkerContext
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.run.function import Function
from sqspipes_mp.worker.send.outbox import Outbox
from sqspipes_mp.worker.send.window import ResultWindow


@dataclass(frozen=True, slots=True)
class Parts:
    """What a main thread uses."""

    station: WorkerContext
    caller: Function
    #: Messages received, not started.
    ready: Ready
    #: Sends outputs, then deletes inputs.
    outbox: Outbox
    #: Makes messages of returned values.
    products: Products
    #: Streams results to an iterating caller; None without one.
    results: ResultWindow | None

    def run_callbacks(self) -> None:
        """Run the callbacks of what was accepted meanwhile."""
        while callback := self.ready.take_callback():
            callback()
            self.station.check_process()
