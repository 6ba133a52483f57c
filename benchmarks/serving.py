"""An engine in a process of its own, which goes when the benchmark goes, however that ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator

from sqspipes_mp import Engine
from sqspipes_mp.ipc.birth import die_with_parent


@contextlib.contextmanager
def serving(engine: Engine, stage: str) -> Iterator[int]:
    """Run one stage of an engine beside the block; yield the pid of its supervisor."""
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(engine, stage, os.getpid()))
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.terminate()
        process.join(60)
        process.kill()


def _serve(engine: Engine, stage: str, parent: int) -> None:
    die_with_parent(parent)
    engine.run(only=stage)
