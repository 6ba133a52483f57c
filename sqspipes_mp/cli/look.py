"""``sqspipes-mp ps, top, stack, stop``: look at running engines and ask them (the command line's process).

The registry tells of engines, and their statistics are read; no code of the user's is imported.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqspipes_mp.cli.console import Console, table
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.cli.meant import engine_hint, stage_meant
from sqspipes_mp.cli.top.cells import time
from sqspipes_mp.cli.top.plain import state_text
from sqspipes_mp.cli.top.watch import Seen, ServedWatch, Watch, watch_of
from sqspipes_mp.ipc.running.asking import ask
from sqspipes_mp.ipc.running.folders import VARIABLE, Engine, Unanswered, candidates, engines, matches
from sqspipes_mp.ipc.running.memory import Gone, open_memory
from sqspipes_mp.ipc.running.outcomes import outcome
from sqspipes_mp.ipc.running.served import Served, is_address
from sqspipes_mp.ipc.running.state import state
from sqspipes_mp.ipc.statistics import ForeignLayout, Statistics

#: Seconds between two looks of which a rate is made.
_SAMPLE = 1.0
#: Seconds between two screens of ``top``.
_REFRESH = 2.0
#: Moves a terminal's cursor to its first line, and clears the rest.
_CLEAR = "\033[H\033[J"
#: The last line of a screen that takes no keys.
_EXTRA = "Ctrl-C ends; for keys: pip install 'sqspipes_mp[top]'"


# -- finding ----------------------------------------------------------------------------------------------------------


def find(target: str | None) -> Engine:
    """Return the engine that a person means; without a target the only one here. Raises ``Refused``."""
    if target is not None and is_address(target):
        with _refused():
            return Served(target)
    found = engines()
    meant = [engine for engine in found if matches(engine, target)] if target is not None else found
    if len(meant) == 1:
        return meant[0]
    if not found:
        where = ", ".join(candidates()) or f"{VARIABLE} is off"
        raise Refused(f"no engine of this user runs here (looked into: {where})", Exit.FAILED)
    names = "; ".join(engine.name for engine in (meant or found))
    if not meant:
        raise Refused(
            f"no engine {target!r} runs here; there are: {names}{engine_hint(target or '', found)}", Exit.FAILED
        )
    raise Refused(f"several engines run here, name one by its pid: {names}")


@contextmanager
def _opened(engine: Engine) -> Iterator[Statistics]:
    """Open an engine's statistics within the block. Raises ``Gone`` and ``ForeignLayout``."""
    memory = open_memory(engine)
    try:
        statistics = Statistics(memory.view)
        try:
            yield statistics
        finally:
            statistics.close()
    finally:
        memory.close()


@contextmanager
def _refused() -> Iterator[None]:
    """Turn ``Unanswered`` into ``Refused``."""
    try:
        yield
    except Unanswered as error:
        raise Refused(str(error), Exit.FAILED) from None


def _rest(seconds: float) -> None:
    threading.Event().wait(seconds)


# -- ps ---------------------------------------------------------------------------------------------------------------


def ps(flags: Namespace, console: Console) -> Exit:
    """Show the engines of this user, or the one that a person means."""
    found = engines() if flags.target is None else [find(flags.target)]
    first = {engine.run: _state_of(engine) for engine in found}
    if any(first.values()):
        _rest(_SAMPLE)
    rows = [_row(engine, first[engine.run]) for engine in found]
    if flags.json:
        print(json.dumps(rows))
    elif rows:
        columns = ("pid", "domain", "up", "workers", "done/s", "broker", "state")
        print(
            table(
                columns,
                [
                    (
                        str(row["pid"]), row["domain"], time(row["up"]).text, _or_dash(row["workers"]),
                        "-" if row["per_second"] is None else f"{row['per_second']:,.1f}", row["broker"], row["why"],
                    )
                    for row in rows
                ],
                left=2,
            )
        )  # fmt: skip
    else:
        console.say("no engine of this user runs here")
    return Exit.DONE


def _state_of(engine: Engine) -> dict[str, Any] | None:
    try:
        with _opened(engine) as statistics:
            return state(statistics, here=engine.here)
    except (Gone, ForeignLayout):
        return None


def _row(engine: Engine, since: dict[str, Any] | None) -> dict[str, Any]:
    """Return an engine's line; values that cannot be had are None."""
    row: dict[str, Any] = {key: engine.about.get(key) for key in ("run", "pid", "caller", "domain", "broker", "target")}
    row |= dict.fromkeys(("up", "workers", "per_second", "live", "ready"))
    try:
        with _opened(engine) as statistics:
            now = state(statistics, here=engine.here, since=since)
    except (Gone, ForeignLayout) as error:
        return {**row, "why": str(error)}
    rates = [stage["per_second"]["done"] for stage in now["stages"]]
    return {
        **row,
        "up": now["engine"]["up"],
        "workers": sum(worker["state"] not in {"none", "ended"} for worker in now["workers"]),
        "per_second": None if None in rates else sum(rates),
        "live": now["engine"]["live"],
        "ready": now["engine"]["ready"],
        "why": now["engine"]["why"],
    }


def _or_dash(value: object) -> str:
    return "-" if value is None else f"{value}"


# -- top --------------------------------------------------------------------------------------------------------------


def top(flags: Namespace, console: Console) -> Exit:
    """Show an engine's stages and workers: live on a terminal, else once, or again and again until its end."""
    once = flags.once or flags.json
    if not once and sys.stdin.isatty() and sys.stdout.isatty() and importlib.util.find_spec("textual") is not None:
        return _live(flags.target)
    engine = find(flags.target)
    watch = ServedWatch(engine) if isinstance(engine, Served) else Watch(str(engine.number("pid")))
    try:
        if (first := _look(watch)).why:
            console.say(first.why)
        _rest(_SAMPLE)
        while not (seen := _look(watch)).ended:
            if flags.json:
                print(json.dumps(seen.state))
            else:
                _print_state(seen, redrawn=sys.stdout.isatty() and not once)
            if once:
                return Exit.DONE
            _rest(_REFRESH)
    finally:
        watch.close()
    print("the engine has ended")
    return Exit.FAILED if once else Exit.DONE


def _look(watch: Watch | ServedWatch) -> Seen:
    seen = watch.look()
    if seen.state is None or seen.lost:
        raise Refused(seen.why, Exit.FAILED)
    return seen


def _print_state(seen: Seen, *, redrawn: bool) -> None:
    assert seen.state is not None
    # Without a terminal: as wide as a mail or a ticket shows it.
    size = shutil.get_terminal_size((119, 0))
    text = state_text(seen.state, size.columns, size.lines - 1 if redrawn else 0)
    print(f"{_CLEAR}{text}\n{_EXTRA}" if redrawn else text, end="" if redrawn else "\n", flush=True)


def _live(target: str | None) -> Exit:
    """Show the live view, which waits for an engine where none runs yet."""
    from sqspipes_mp.cli.top.app import Top  # noqa: PLC0415  (an extra, which takes long to load)

    if engines():
        find(target)
    with _refused():
        watch = watch_of(target)
    try:
        Top(watch).run()
    finally:
        watch.close()
    return Exit.DONE


# -- orders -----------------------------------------------------------------------------------------------------------


def order(target: str | None, keys: dict[str, object], console: Console) -> dict[str, Any]:
    """Send an order to the engine that a person means, tell its outcome, and return the answer. Raises ``Refused``."""
    engine = find(target)
    with _refused():
        if "stage" in keys:
            keys["stage"] = stage_meant(engine, keys["stage"])
        answer = ask(engine, keys)
    console.say(f"{engine.name}: {outcome(keys, answer)}")
    return answer


def stop(flags: Namespace, console: Console) -> Exit:
    """Stop an engine, as SIGTERM does."""
    order(flags.target, {"do": "stop"}, console)
    return Exit.DONE


def stack(flags: Namespace, console: Console) -> Exit:  # noqa: ARG001  (as each command)
    """Show where workers of a stage are now."""
    engine = find(flags.target)
    with _refused():
        stage = stage_meant(engine, flags.stage)
        keys: dict[str, object] = {"do": "stack", "stage": stage, "worker": flags.worker, "signal": flags.signal}
        answer = ask(engine, keys)
    for told in answer["stacks"]:
        print(f"{told['stage']}[{told['worker']}] (pid {told['pid']})\n{told['stack'].rstrip()}\n")
    for silent in answer["silent"]:
        cure = "" if flags.signal else "; --signal asks it by a signal"
        print(
            f"{silent['stage']}[{silent['worker']}] (pid {silent['pid']})\n"
            f"no answer: it gets no CPU, or C code keeps its GIL{cure}\n"
        )
    return Exit.FAILED if answer["silent"] else Exit.DONE
