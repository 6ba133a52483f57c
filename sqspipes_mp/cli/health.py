"""``sqspipes-mp health``: exit code 0 for a healthy engine, with one line why (the command line's process).

Made for probes that run every few seconds: it loads no other part of the command line, and asks nobody.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from sqspipes_mp.ipc.running.folders import Engine, Unanswered, engines, matches
from sqspipes_mp.ipc.running.health import Verdict, verdict
from sqspipes_mp.ipc.running.memory import Gone, open_memory
from sqspipes_mp.ipc.running.served import Served, is_address

USAGE = """\
usage: sqspipes-mp health [TARGET] [--ready]

Exit code 0: the engine lives. 1: it does not, or there is none. One line says why. It never fails because the broker is
away, a call is long, or C code keeps the GIL.

  TARGET   a domain, a pid, the MODULE:ENGINE text as it was started, or http://HOST:PORT of an engine's server;
           without: every engine of this user here
  --ready  0 only where each stage has a worker that is ready and in touch with the broker, busy, or paused too
"""


def main(arguments: Sequence[str]) -> int:
    """Print the verdict, and return the exit code: 0 or 1."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    flags = {argument for argument in arguments if argument.startswith("-")}
    targets = [argument for argument in arguments if argument not in flags]
    if flags - {"--ready"} or len(targets) > 1:
        print(USAGE, end="", file=sys.stderr)
        return 1
    ready = bool(flags)
    if targets and is_address(targets[0]):
        return _ask_server(targets[0], ready=ready)
    if targets:
        found = [engine for engine in engines() if matches(engine, targets[0])]
    else:
        # A folder may be shared with other containers, whose engines are their probes' to judge.
        found = [engine for engine in engines() if engine.here]
    if not found:
        print(f"no engine{f' {targets[0]}' if targets else ''} runs here")
        return 1
    worst = [(engine, judged) for engine in found if not _good(judged := judge(engine), ready=ready)]
    engine, judged = worst[0] if worst else (found[0], judge(found[0]))
    others = f" ({len(worst)} of {len(found)} engines)" if len(found) > 1 and worst else ""
    print(f"{engine.name}: {judged.why}{others}")
    return 1 if worst else 0


def judge(engine: Engine) -> Verdict:
    """Return the verdict on an engine; one that cannot be looked at does not live."""
    try:
        memory = open_memory(engine)
    except Gone as error:
        return Verdict(live=False, ready=False, why=str(error))
    try:
        return verdict(memory.fixed_words(), time.monotonic_ns(), engine.stages)
    finally:
        memory.close()


def _ask_server(url: str, *, ready: bool) -> int:
    try:
        good, why = Served(url).health(ready=ready)
    except Unanswered as error:
        print(error)
        return 1
    print(f"{url}: {why}")
    return 0 if good else 1


def _good(judged: Verdict, *, ready: bool) -> bool:
    return judged.ready if ready else judged.live
