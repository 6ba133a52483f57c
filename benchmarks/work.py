"""What is run: functions of a set length, for any kind of worker, that note when each call began and ended."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: One call in a tally: monotonic start and end, seconds.
_RECORD = struct.Struct("=dd")
#: Compressible, but not at once.
_TEXT = bytes(random.Random(1).choices(b"abcdefghij ", k=4096))


def _python(units: int) -> None:
    total = 0
    for number in range(units * 100):
        total += number * number % 7


def _zlib(units: int) -> None:
    for _ in range(units):
        zlib.compress(_TEXT, 6)


def _numpy(units: int) -> None:
    import numpy as np  # noqa: PLC0415  (optional)

    numbers = np.linspace(0.0, 1.0, 20_000)
    for _ in range(units):
        np.sin(numbers)


def _sleep(units: int) -> None:
    time.sleep(units / 1e6)


#: What can be run: each takes a number of units.
KINDS: dict[str, Callable[[int], None]] = {"python": _python, "zlib": _zlib, "numpy": _numpy, "sleep": _sleep}
ABOUT = {
    "python": "a loop of pure Python: holds the GIL",
    "zlib": "zlib.compress of 4 KiB pieces: C code that lets go of the GIL",
    "numpy": "numpy.sin over 20,000 numbers: C code that lets go of the GIL",
    "sleep": "time.sleep: stands for waiting on a network",
}


def installed(kind: str) -> bool:
    """Tell whether what a kind needs is here."""
    return kind != "numpy" or importlib.util.find_spec("numpy") is not None


def calibrate(kind: str) -> float:
    """Return how many units of a kind last one millisecond on an idle CPU here (the best of several tries)."""
    if kind == "sleep":
        return 1000.0
    function, units = KINDS[kind], 1
    function(1)
    while True:
        best = min(_timed(function, units) for _ in range(5))
        if best > 0.01:
            return units / (best * 1000)
        units *= 2


def _timed(function: Callable[[int], None], units: int) -> float:
    started = time.perf_counter()
    function(units)
    return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Tally:
    """A file to which every call appends its start and end: one clock for any mode, in whatever process it runs.

    ``calls``: how many are expected; the last one sends SIGTERM to ``stop`` (an engine's process), unless that is 0.
    """

    path: str
    calls: int
    stop: int = 0

    def note(self, started: float) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            # One write, which the kernel appends whole.
            os.write(fd, _RECORD.pack(started, time.monotonic()))
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        if self.stop and size >= self.calls * _RECORD.size:
            os.kill(self.stop, signal.SIGTERM)

    def spans(self) -> list[tuple[float, float]]:
        """Return (start, end) of each call, in the order they ended; not a piece of one that is being written."""
        data = Path(self.path).read_bytes()
        whole = data[: len(data) // _RECORD.size * _RECORD.size]
        return [(start, end) for start, end in _RECORD.iter_unpack(whole)]

    def rate(self) -> float:
        """Return calls per second, from the first one's start to the last one's end."""
        spans = self.spans()
        if len(spans) < self.calls:
            raise RuntimeError(f"{len(spans)} of {self.calls} calls were made")
        return len(spans) / (max(end for _, end in spans) - min(start for start, _ in spans))


@dataclass(frozen=True, slots=True)
class Job:
    """A task function, picklable: runs ``units`` of a kind and notes it."""

    kind: str
    units: int
    tally: Tally

    def __call__(self, value: int) -> int:
        started = time.monotonic()
        KINDS[self.kind](self.units)
        self.tally.note(started)
        return value
