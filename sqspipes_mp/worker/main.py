"""A worker process from birth to exit: it boots, says READY, runs, carries everything away, says BYE."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from functools import partial

from sqspipes_mp.host import descriptors
from sqspipes_mp.host.numeric_threads import limit_threads, reseed
from sqspipes_mp.host.title import set_title
from sqspipes_mp.ipc.birth import Assignment, begin, orphaned, volunteer
from sqspipes_mp.ipc.channel import EXIT_BOOT, EXIT_FAULT, EXIT_OK, Channel, Kind
from sqspipes_mp.ipc.log_line import join
from sqspipes_mp.ipc.report.report import pack_exception
from sqspipes_mp.ipc.statistics import CALL_STARTED, PID, S_BOOTING, S_DRAINING, S_READY, STATE
from sqspipes_mp.pipeline.outputs import Products
from sqspipes_mp.pipeline.task import environment
from sqspipes_mp.worker.context import NO_DESCRIPTOR, WorkerContext, no_thread
from sqspipes_mp.worker.fifo_order import GroupOrder
from sqspipes_mp.worker.pause import Pause
from sqspipes_mp.worker.receive.intake import Intake
from sqspipes_mp.worker.run.modes import Mode, mode_of
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.run.runner import Runner
from sqspipes_mp.worker.run.source import Source
from sqspipes_mp.worker.send.accepted_calls import Accepted
from sqspipes_mp.worker.send.failures import Failures
from sqspipes_mp.worker.send.outbox import Outbox
from sqspipes_mp.worker.send.result_window import ResultWindow
from sqspipes_mp.worker.stacks import stacks

log = logging.getLogger("sqspipes_mp.worker")

#: Seconds that a thread of ours waits for the GIL while the function computes; Python's own 5 ms are a round trip.
_SWITCH = 0.0005
#: Seconds a worker that ends with a fault waits for its poll in flight.
_POLL_GRACE = 2.0


def worker_main(assignment: Assignment) -> None:
    """Run one worker; returns when it has ended cleanly, exits otherwise."""
    begin(assignment.birth)
    assert assignment.seat is not None
    set_title(assignment.plan.pipeline.domain, f"{assignment.stage.name}/{assignment.seat.index}")
    volunteer()
    sys.setswitchinterval(_SWITCH)
    if assignment.stack is not None:
        assignment.stack.arm()
    channel = Channel(assignment.birth.sock)
    board, slot = assignment.board, assignment.slot
    board.put(slot, CALL_STARTED, 0)
    board.put(slot, PID, os.getpid())
    board.put(slot, STATE, S_BOOTING)
    try:
        settings, pid = assignment.plan.settings, os.getpid()
        os.environ.update(environment(assignment.stage.task, assignment.seat.index))
        limit_threads(assignment.plan.numeric_threads)
        reseed()
        if settings.setup is not None:
            settings.setup()
        join(assignment.plan.logs)
        if os.getpid() != pid:
            # A child that setup= or env= has forked and that came back is no worker.
            os._exit(EXIT_OK)
        context = WorkerContext(assignment, assignment.broker.open(wallet=board.wallet), channel)
        mode = mode_of(context)
    except BaseException as error:
        # A boot failure of any kind, sys.exit included, is told to the supervisor in the worker's own words.
        report = pack_exception(error, stage=assignment.stage.name, pid=os.getpid(), message_id=None, booting=True)
        channel.send(Kind.FAILED, {"boot": True}, report.to_bytes())
        os._exit(EXIT_BOOT)
    try:
        _work(context, mode)
    except BaseException as error:
        if no_thread(error):
            # Of this process, which is replaced when the system has room again; the keeper releases its messages.
            context.say(Kind.FAILED, {"refused": str(error)})
            os._exit(EXIT_BOOT)
        # The engine's own fault, or an error of the user's exit hook: both are reported.
        context.fault(error)
    if context.faulted.is_set():
        os._exit(EXIT_FAULT)
    context.say(Kind.BYE)


def _work(context: WorkerContext, mode: Mode) -> None:
    plan, stage, ready = context.assignment.plan, context.stage, mode.ready
    order = GroupOrder(context, ready)
    failures = Failures(context, ready, order)
    accepted = Accepted(context.board, context.slot, goes_on=stage.task.is_generator) if stage.is_source else None
    outbox = Outbox(context, ready, order, failures, accepted)
    results = ResultWindow(context, outbox) if plan.sink == stage.index else None
    products = Products(plan, stage)
    pause = Pause(context, ready, outbox)
    parts = Parts(context, mode.function, ready, order, failures, outbox, products, pause, results)
    threading.Thread(target=partial(_listen, parts), name="orders", daemon=True).start()
    pause.follow()
    context.board.put(context.slot, STATE, S_READY)
    descriptors.keep(partial(_short, context))
    if stage.is_source:
        context.say(Kind.READY)
        Source(parts).run()
    else:
        runner = Runner(parts)
        intake = Intake(parts, runner.lifetime)
        intake.start()
        context.say(Kind.READY)
        runner.run(mode.serve(parts, runner))
        if context.faulted.is_set():
            # Messages of a poll in flight must be on the scoreboard, or the keeper could not release them.
            context.stop_receiving()
            intake.join(_POLL_GRACE)
    context.board.put(context.slot, STATE, S_DRAINING)
    outbox.close()
    parts.run_callbacks()
    if not context.faulted.is_set():
        mode.function.finish()
        context.connection.close()


def _short(context: WorkerContext) -> None:
    """Have a worker replaced whose connection found no descriptor left."""
    log.warning("%s (pid %d) is replaced: %s", context.stage.name, os.getpid(), NO_DESCRIPTOR)
    context.recycle(NO_DESCRIPTOR)


def _listen(parts: Parts) -> None:
    """Take the supervisor's orders until its end, which is this worker's, too."""
    context, ready, results = parts.context, parts.ready, parts.results
    while (frame := context.channel.recv()) is not None:
        if frame.kind is Kind.DRAIN:
            context.ending.until = frame.header.get("until", math.inf)
            context.drain()
            ready.poke()
            if results is not None:
                results.wake()
        elif frame.kind is Kind.RELEASE:
            parts.pause.release()
            if context.full_stop.is_set():
                context.release.set()
        elif frame.kind is Kind.PAUSE:
            parts.pause.follow(frame.header["order"])
        elif frame.kind is Kind.ACK and results is not None:
            for number in frame.header["numbers"]:
                results.acknowledge(number)
        elif frame.kind is Kind.LET_GO and results is not None:
            results.let_go()
        elif frame.kind is Kind.REPLACE:
            # For lack of memory: a long call may end early.
            context.ending.stopping = True
            context.stop_receiving()
            ready.poke()
        elif frame.kind is Kind.STACK:
            context.say(Kind.STACK_TOLD, {}, stacks().encode("utf-8", "replace"))
    orphaned()
