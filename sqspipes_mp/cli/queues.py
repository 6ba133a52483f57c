"""``sqspipes-mp status``, ``purge`` and ``delete``: a pipeline's queues (the command line's process)."""

from __future__ import annotations

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Iterator

from sqspipes_mp.brokers.base import Depth, as_keyed
from sqspipes_mp.brokers.url import CHOICE
from sqspipes_mp.caller.stats import PipelineStats, QueueStats, StageStats, opened
from sqspipes_mp.cli.console import Console, table
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.cli.loading import load
from sqspipes_mp.engine import Engine, every_queue, override
from sqspipes_mp.errors import ConfigError

log = logging.getLogger("sqspipes_mp.cli")

_COLUMNS = ("stage", "queue", "waiting", "in flight", "delayed", "dead")


def status(flags: Namespace, _console: Console) -> Exit:
    """Show the counts of every queue."""
    engine = engine_of(flags)
    stats = _stats(engine)
    warn_of_others(engine)
    if flags.json:
        print(json.dumps(_plain(stats), indent=2))
        return Exit.DONE
    rows = [row for stage in stats.stages for row in _rows(stage)]
    print(f"{stats.domain} on {stats.broker}\n\n{table(_COLUMNS, rows, left=2)}")
    if any(queue.depth is None for stage in stats.stages for queue in _queues(stage)):
        print("\n-: this queue does not exist yet; running the engine creates it")
    return Exit.DONE


def purge(flags: Namespace, _console: Console) -> Exit:
    """Remove every message of the pipeline's queues, after asking."""
    engine = engine_of(flags)
    names = _announce(engine, "purge", "Every message in these queues will be removed, dead letters included")
    if not names:
        return Exit.DONE
    if not agreed(flags, "Remove them all?"):
        return Exit.FAILED
    engine.purge()
    print(f"Purged {len(names)} queues.")
    return Exit.DONE


def delete(flags: Namespace, _console: Console) -> Exit:
    """Delete the pipeline's queues, after asking."""
    engine = engine_of(flags)
    names = _announce(engine, "delete", "These queues will be deleted, with every message in them")
    if not names:
        return Exit.DONE
    if not agreed(flags, "Delete them all?"):
        return Exit.FAILED
    engine.delete()
    print(f"Deleted {len(names)} queues.")
    return Exit.DONE


def engine_of(flags: Namespace) -> Engine:
    """Return the engine and broker that the command line names. Raises ``Refused`` and ``ConfigError``."""
    engine = load(flags.target)
    # The output names the broker; the warning about the choice is for commands that send messages.
    logging.getLogger(CHOICE).setLevel(logging.ERROR)
    override(engine, broker=flags.broker)
    if engine.broker.temporary:
        log.warning(
            "%s has a temporary file of its own in every process, so nothing of other processes is in this one. Name "
            'the broker with --broker URL, or in the code: Engine(broker="sqlite:///%s.db")',
            engine.domain,
            engine.domain,
        )
    return engine


def warn_of_others(engine: Engine) -> None:
    """Log a warning where one of the pipeline's queues is another pipeline's own, as far as the broker knows."""
    if not engine.broker.exists():
        return
    with opened(engine.broker) as connection:
        try:
            connection.check_owners(every_queue(engine).queues)
        except ConfigError as error:
            log.warning("not all of these messages are this pipeline's: %s", error)


def _stats(engine: Engine) -> PipelineStats:
    broker = engine.broker
    broker.check()
    if not broker.exists():
        # No file, most likely because the folder is the wrong one: a look must not create it.
        stages = tuple(
            StageStats(
                name=stage.name,
                inputs=tuple(QueueStats(name=name, depth=None) for name in stage.inputs),
                dead_letters=None if stage.dead is None else QueueStats(name=stage.dead, depth=None),
            )
            for stage in engine.pipeline.stages
        )
        return PipelineStats(domain=engine.domain, broker=broker.describe(), stages=stages)
    return engine.stats()


def _announce(engine: Engine, verb: str, what: str) -> list[str]:
    """Print the existing queues and their counts; return their names."""
    stats, own = _stats(engine), every_queue(engine).queue_names()
    found = {queue.name: queue.depth for stage in stats.stages for queue in _queues(stage) if queue.depth is not None}
    names = [name for name in own if name in found]
    place = f"{stats.domain} on {stats.broker}"
    if not names:
        print(f"{place} has no queues: nothing to {verb}.")
        return []
    with opened(engine.broker) as connection:
        connection.check_owners(every_queue(engine).queues)
        keyed = as_keyed(engine.broker, connection)
        keys = 0 if keyed is None else sum(keyed.keys(name)[0] for name in names)
    rows = [(name, _total(found[name])) for name in names]
    whose = "1 key, and the results kept for its" if keys == 1 else f"{keys:,} keys, and the results kept for their"
    too = f"\n{whose} value{'s' * (keys > 1)}, will be forgotten.\n" if keys else ""
    print(f"{what}; {place}:\n\n{table(('queue', 'messages'), rows)}\n{too}", flush=True)
    return names


def agreed(flags: Namespace, question: str) -> bool:
    """Ask, unless there is --yes; return whether the answer is yes. Raises ``Refused`` where there is no terminal."""
    if flags.yes:
        return True
    if not sys.stdin.isatty():
        raise Refused("there is no terminal to ask on: nothing was done. Add --yes to do it without asking")
    try:
        yes = input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}
    except (EOFError, KeyboardInterrupt):
        print()
        yes = False
    if not yes:
        print("Nothing was done.")
    return yes


def _queues(stage: StageStats) -> Iterator[QueueStats]:
    yield from stage.inputs
    if stage.dead_letters is not None:
        yield stage.dead_letters


def _total(depth: Depth) -> int:
    return depth.visible + depth.in_flight + depth.delayed


def _rows(stage: StageStats) -> Iterator[tuple[object, ...]]:
    if not stage.inputs:
        yield stage.name, "(a source: no queue)", "", "", "", ""
    dead = stage.dead_letters.depth if stage.dead_letters is not None else None
    for place, queue in enumerate(stage.inputs):
        depth = queue.depth
        counts = ("-", "-", "-") if depth is None else (depth.visible, depth.in_flight, depth.delayed)
        last = ("-" if dead is None else _total(dead)) if place == 0 else ""
        yield stage.name if place == 0 else "", queue.name, *counts, last


def _plain(stats: PipelineStats) -> dict[str, object]:
    return {
        "domain": stats.domain,
        "broker": stats.broker,
        "stages": [
            {
                "name": stage.name,
                "waiting": stage.visible,
                "in_flight": stage.in_flight,
                "delayed": stage.delayed,
                "dead": stage.dead,
                "queues": [_plain_queue(queue) for queue in stage.inputs],
                "dead_letter_queue": None if stage.dead_letters is None else _plain_queue(stage.dead_letters),
            }
            for stage in stats.stages
        ],
    }


def _plain_queue(queue: QueueStats) -> dict[str, object]:
    depth = queue.depth
    return {
        "name": queue.name,
        "exists": depth is not None,
        "waiting": None if depth is None else depth.visible,
        "in_flight": None if depth is None else depth.in_flight,
        "delayed": None if depth is None else depth.delayed,
    }
