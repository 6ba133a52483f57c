"""``sqspipes-mp demo``: ``pipeline`` over real files, and how fast it was (its own process)."""

from __future__ import annotations

import json
import random
import signal
import sys
import sysconfig
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from sqspipes_mp.cli.console import Console
from sqspipes_mp.cli.demo import pipeline as demo_pipeline
from sqspipes_mp.cli.demo.progress import Progress
from sqspipes_mp.cli.demo.report import Measured, OneProcess, as_json, as_text
from sqspipes_mp.cli.exits import Exit, Refused, Stopped
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.pipeline.task import check_workers

#: The sample measured in one process: one file in so many, but not fewer than the least.
_SHARE, _LEAST = 8, 50


def demo(flags: Namespace, console: Console) -> Exit:
    """Measure the files with the pipeline and in this process, and compare. Raises ``Refused``."""
    workers = _workers(flags.workers)
    root = Path(flags.path or sysconfig.get_path("stdlib"))
    if not root.exists():
        raise Refused(f"there is no {str(root)!r}. Give a folder of Python files, or one file")
    paths = list(demo_pipeline.find(str(root)))
    if not paths:
        print(f"There is no Python file (*.py) in {root}: nothing to measure.")
        return Exit.DONE
    measured: Measured | None = None
    shown = Progress(sys.stderr, shown=flags.progress != "off")
    with suppress(KeyboardInterrupt), _ended_by(signal.SIGHUP), shown as progress:
        alone = _one_process(paths if flags.full_comparison else _sample(paths), len(paths), progress)
        measured = _pipeline(root, workers, len(paths), progress)
    if measured is None:
        console.say("the demo was interrupted before its end, so there is nothing to compare")
        return Exit.DONE
    print(json.dumps(as_json(measured, alone), indent=2) if flags.json else as_text(measured, alone))
    return Exit.DONE


def _workers(text: str) -> Any:
    try:
        return check_workers("--workers", int(text) if text.isdecimal() else text)
    except ConfigError as error:
        raise Refused(str(error)) from None


def _sample(paths: Sequence[str]) -> list[str]:
    """Return files chosen at random, the same ones each time."""
    return random.Random(1).sample(paths, min(len(paths), max(_LEAST, len(paths) // _SHARE)))


def _one_process(paths: Sequence[str], total: int, progress: Progress) -> OneProcess:
    """Call the same functions here, without queues, and take the time."""
    began, lines = time.perf_counter(), 0
    for number, path in enumerate(paths):
        progress.show(f"in one process, to compare with: {number:,} of {len(paths):,} files")
        lines += demo_pipeline.rank(demo_pipeline.measure(path)).get("lines", 0)
    return OneProcess(files=len(paths), total=total, lines=lines, seconds=time.perf_counter() - began)


def _pipeline(root: Path, workers: Any, total: int, progress: Progress) -> Measured | None:
    """Run the pipeline; None: it was stopped before its end."""
    reports: list[dict[str, Any]] = []
    lines = 0
    engine = demo_pipeline.pipeline(str(root), workers)
    began = time.perf_counter()
    try:
        with engine.run(iterate=True, until="drained", progress=None if progress.shown else False) as results:
            for report in results:
                reports.append(report)
                lines += report.get("lines", 0)
                passed = time.perf_counter() - began
                progress.show(f"{len(reports):,} of {total:,} files, {lines:,} lines in {passed:.1f} s")
    finally:
        # What is left after an interruption is of no use to anybody: it goes without a word.
        engine.broker.cleanup()
    seconds = time.perf_counter() - began
    if results.summary is None or results.summary.reason != "drained":
        return None
    return Measured(root=root, reports=reports, seconds=seconds, stages=results.summary.stages, cpus=cpus())


@contextmanager
def _ended_by(number: signal.Signals) -> Iterator[None]:
    """Leave the block by an exception, so that nothing stays behind, unless the signal is ignored (nohup)."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Stopped

    before = signal.getsignal(number)
    if before is signal.SIG_DFL:
        signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)
