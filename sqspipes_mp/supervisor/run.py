"""Runs a plan: chooses fork, spawn or forkserver, makes the scoreboard, runs the supervisor."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import socket
import sys
import threading
from multiprocessing import util
from pathlib import Path
from typing import Any

from sqspipes_mp.brokers.base import Broker
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.host import descriptors
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.host.numeric_threads import environment, prepare
from sqspipes_mp.host.title import set_title
from sqspipes_mp.ipc.birth import Birth, begin
from sqspipes_mp.ipc.channel import DOWN, Channel, Kind, ParentChannel, ParentGone
from sqspipes_mp.ipc.log_line import join
from sqspipes_mp.ipc.map_lock import MapLock
from sqspipes_mp.ipc.outcome import Outcome
from sqspipes_mp.ipc.scoreboard import Block, Scoreboard
from sqspipes_mp.ipc.statistics import SEATS, WANTED
from sqspipes_mp.pipeline.ends import describe_end
from sqspipes_mp.pipeline.plan import RunPlan
from sqspipes_mp.supervisor.children import Mains
from sqspipes_mp.supervisor.fresh import OwnForkServer, unloadable
from sqspipes_mp.supervisor.loop import Supervisor, Ticking
from sqspipes_mp.supervisor.stop_requests import Wakeup

log = logging.getLogger("sqspipes_mp.supervisor")

#: Longest path of a folder for a socket of multiprocessing's, bytes: unix(7) has 108 with the end, "/listener-" and 8
#: characters follow.
_LONGEST_FOLDER = 107 - 18
#: Descriptors of the supervisor for each worker: socket, pidfd, stack file, and multiprocessing's pipes.
_PER_WORKER = 5
#: Descriptors for all else that a process of ours opens: wake-ups, the keeper, the queue service's connection.
_OTHERS = 24


def supervise(
    plan: RunPlan,
    broker: Broker,
    board: Scoreboard,
    mains: Mains,
    context: Any,
    wakeup: Wakeup,
    caller: ParentChannel | None = None,
    progress: Ticking | None = None,
    orders: socket.socket | None = None,
) -> Outcome:
    """Run the plan to its end in this process; the arguments are those of ``Supervisor``."""
    method = context.get_start_method()
    names = ", ".join(f"{plan.pipeline.stages[index].name} x{plan.workers[index]}" for index in plan.selected)
    with contextlib.ExitStack() as stack:
        workers = {plan.pipeline.stages[index].name: plan.workers[index] for index in plan.selected}
        log.info(
            "starting %s on %s: %s (%s); %s",
            plan.pipeline.domain, broker.describe(), names, method, describe_end(plan),
            extra={"domain": plan.pipeline.domain, "broker": broker.describe(), "workers": workers},
        )  # fmt: skip
        if method == "fork":
            broker.warm()
            prepare(plan.numeric_threads, cpus())
        else:
            # Fresh processes import the user's module, and numeric libraries with it, before the package's code runs.
            stack.enter_context(environment(plan.numeric_threads))
        return Supervisor(plan, broker, board, context, mains, wakeup, caller, progress, orders).run()


def new_board(plan: RunPlan) -> Scoreboard:
    """Return a fresh scoreboard for a run; the caller makes it, and may read it during the run."""
    blocks = []
    for index in plan.selected:
        seats = plan.room_of(index)
        # A region more for each worker of the start: the keeper may still have to judge its predecessor's.
        blocks.append(Block(index, seats, plan.calls_of(index), seats + plan.workers[index] + 2))
    board = Scoreboard.create_for(len(plan.pipeline.stages), blocks, plan.lanes)
    for index, workers in plan.workers.items():
        board.set_stage(index, WANTED, workers)
        board.set_stage(index, SEATS, workers)
    return board


def supervisor_main(
    birth: Birth,
    plan: RunPlan,
    broker: Broker,
    board: Scoreboard,
    mains: Mains,
    method: str,
    orders: socket.socket,
    lock: MapLock | None,  # noqa: ARG001  (held for as long as this process lives)
) -> None:
    """Supervise in a process of its own, for a caller that iterates; the last frame holds the outcome."""
    begin(birth)
    set_title(plan.pipeline.domain, "supervisor")
    join(plan.logs)
    wakeup = Wakeup()
    channel = ParentChannel(birth.sock, hears=DOWN)
    context = _context(method)
    try:
        outcome = supervise(plan, broker, board, mains, context, wakeup, channel, orders=orders)
        blob = pickle.dumps(outcome)
    finally:
        wakeup.close()
        release(context)
    birth.sock.setblocking(True)
    # A caller that is gone needs no outcome.
    with contextlib.suppress(ParentGone):
        channel.flush()
        Channel(birth.sock).send(Kind.BYE, {}, blob)


def choose_context(plan: RunPlan, broker: Broker) -> Any:
    """Return the multiprocessing context that starts the children; ``release`` frees it.

    Raises ``ConfigError`` where tasks cannot be sent to the fresh processes that ``start_method`` asks for.
    """
    _check_descriptors(plan)
    wanted = plan.settings.start_method
    if wanted is not None:
        if wanted != "fork" and (problem := unloadable((plan, broker))):
            raise ConfigError(
                "Engine(start_method)",
                wanted,
                '"fork" (or None) for these tasks',
                f"They cannot be sent to a fresh process ({problem}); define them at module level",
            )
        return _context(wanted)
    if not sys.platform.startswith("linux"):
        return _context("spawn")
    others = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    if not others:
        _chosen.method = "fork"
        return _context("fork")
    names = ", ".join(others[:5])
    problem = unloadable((plan, broker))
    if problem is not None:
        log.warning(
            "forking although other threads are alive (%s): a lock one of them holds stays locked in the workers. "
            "The safe way, forkserver, needs tasks that can be pickled: %s",
            names,
            problem,
        )
        return _context("fork")
    if _chosen.method == "fork":
        log.warning(
            "the workers of this run are fresh processes (forkserver), those of an earlier run were forked: threads "
            "are alive by now (%s). What the program has loaded, patched or set since its start is not in them. End "
            "the threads, or say Engine(start_method=)",
            names,
        )
    _chosen.method = "forkserver"
    return _context("forkserver")


class _Chosen:
    """The start method that was chosen for the latest run of this program; None: none yet."""

    method: str | None = None


_chosen = _Chosen()


def descriptors_needed(workers: int) -> int:
    """Return the descriptors that a supervisor opens for a run with so many workers."""
    return _OTHERS + _PER_WORKER * workers


def _check_descriptors(plan: RunPlan) -> None:
    """Raise ``ConfigError`` where a run needs more descriptors than this process may have.

    Without the check, the last workers would never start.
    """
    found = descriptors.left()
    if found is None:
        return
    opened, most = found
    count = sum(plan.workers.values())
    needed = opened + descriptors_needed(count)
    if needed > most:
        room = max(0, (most - opened - _OTHERS) // _PER_WORKER)
        raise ConfigError(
            "the number of workers, of all tasks that run here,",
            count,
            f"at most {room} where a process may have {most} open files (ulimit -n) and {opened} are open: the "
            f"supervisor has {_PER_WORKER} for each worker, and {_OTHERS} others are needed",
            f"Raise the limit to {needed} or more (ulimit -n, LimitNOFILE=, nofile), or run fewer workers",
        )


def _context(method: str) -> Any:
    if method != "fork":
        _check_folders(method)
    return OwnForkServer() if method == "forkserver" else multiprocessing.get_context(method)


def _check_folders(method: str) -> None:
    """Raise ``ConfigError`` for a folder without which multiprocessing starts no fresh process."""
    try:
        # A fresh process gets it as its own.
        Path.cwd()
    except OSError as error:
        raise ConfigError(
            "the working directory", str(error), f"there for {method}", "Start the program in a folder that stays"
        ) from error
    if method != "forkserver":
        return
    cure = "Set TMPDIR to a folder with a short path that this user may write to"
    try:
        folder = util.get_temp_dir()
    except OSError as error:
        raise ConfigError("the temporary folder", str(error), "one where forkserver may make its own", cure) from error
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        raise ConfigError("the temporary folder", folder, "short enough for a socket's path (forkserver)", cure)


def release(context: Any) -> None:
    """End the forkserver of a context whose processes have ended."""
    if isinstance(context, OwnForkServer):
        context.close()
