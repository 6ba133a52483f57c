"""A worker process from birth to exit: it boots, says READY, runs, carries everything away, says BYE."""

from __future__ import annotations

import os
import threading
from functools import partial

from sqspipes_mp.host.numeric import limit_threads, reseed
from sqspipes_mp.ipc.assignment import Assignment
from sqspipes_mp.ipc.birth import begin, orphaned, volunteer
from sqspipes_mp.ipc.channel import EXIT_BOOT, EXIT_FAULT, EXIT_OK, Channel, Kind
from sqspipes_mp.ipc.report.report import pack_exception
from sqspipes_mp.ipc.scoreboard import CALL_STARTED, PID, S_BOOTING, S_DRAINING, S_READY, STATE
from sqspipes_mp.pipeline.function import Products
from sqspipes_mp.worker.context import WorkerContext
from sqspipes_mp.worker.ready import Ready
from sqspipes_mp.worker.receive.intake import Intake
from sqspipes_mp.worker.run.modes import Mode, mode_of
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.run.runner import Runner
from sqspipes_mp.worker.run.source import Source
from sqspipes_mp.worker.send.outbox import Outbox
from sqspipes_mp.worker.send.window import ResultWindow

#: Seconds a worker that ends with a fault waits for its poll in flight.
_POLL_GRACE = 2.0


def worker_main(orders: Assignment) -> None:
    """Run one worker; returns when it has ended cleanly, exits otherwise."""
    begin(orders.birth)
    volunteer()
    if orders.stack is not None:
        orders.stack.arm()
    channel = Channel(orders.birth.sock)
    board, slot = orders.board, orders.slot
    board.put(slot, CALL_STARTED, 0)
    board.put(slot, PID, os.getpid())
    board.put(slot, STATE, S_BOOTING)
    try:
        settings = orders.plan.settings
        limit_threads(orders.plan.numeric_threads)
        reseed()
        if settings.setup is not None:
            pid = os.getpid()
            settings.setup()
            if os.getpid() != pid:
                # A child that setup= has forked, and that came back: it is no worker.
                os._exit(EXIT_OK)
        station = WorkerContext(orders, orders.broker.open(wallet=board.wallet), channel)
        mode = mode_of(station)
    except BaseException as error:
        # A boot failure of any kind, sys.exit included, is told to the supervisor in the worker's own words.
        report = pack_exception(error, stage=orders.stage.name, pid=os.getpid(), message_id=None, booting=True)
        channel.send(Kind.FAILED, {"boot": True}, report.to_bytes())
        os._exit(EXIT_BOOT)
    try:
        _work(station, mode)
    except BaseException as error:
        # The engine's own fault, or the user's exit hook: either way it must be seen.
        station.fault(error)
    if station.faulted.is_set():
        os._exit(EXIT_FAULT)
    station.say(Kind.BYE)


def _work(station: WorkerContext, mode: Mode) -> None:
    plan, stage, ready = station.orders.plan, station.stage, mode.ready
    outbox = Outbox(station, ready)
    results = ResultWindow(station, outbox) if plan.sink == stage.index else None
    products = Products.of(plan.pipeline, plan.settings, stage, plan.priority)
    parts = Parts(station, mode.function, ready, outbox, products, results)
    threading.Thread(target=partial(_listen, station, ready, results), name="orders", daemon=True).start()
    station.board.put(station.slot, STATE, S_READY)
    station.say(Kind.READY)
    if stage.is_source:
        Source(parts).run()
    else:
        runner = Runner(parts)
        intake = Intake(station, ready, outbox, runner.lifetime)
        intake.start()
        runner.run(mode.serve(parts, runner))
        if station.faulted.is_set():
            # What a poll in flight brings must be on the scoreboard, or the keeper could not give it back.
            station.stop_receiving()
            intake.join(_POLL_GRACE)
    station.board.put(station.slot, STATE, S_DRAINING)
    outbox.close()
    parts.run_callbacks()
    if not station.faulted.is_set():
        mode.function.finish()
        station.connection.close()


def _listen(station: WorkerContext, ready: Ready, results: ResultWindow | None) -> None:
    """Take the supervisor's orders; its silence for good means that it is gone."""
    while (frame := station.channel.recv()) is not None:
        if frame.kind is Kind.DRAIN:
            station.drain()
            ready.poke()
            if results is not None:
                results.wake()
        elif frame.kind is Kind.RELEASE:
            station.release.set()
        elif frame.kind is Kind.ACK and results is not None:
            for number in frame.header["numbers"]:
                results.acknowledge(number)
            if not frame.header["numbers"]:
                results.let_go()
        elif frame.kind is Kind.RECYCLE:
            station.stop_receiving()
            ready.poke()
    orphaned()
