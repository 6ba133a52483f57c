"""A short storm: two programs killed, stopped and started again over faulty queues. The long one is in benchmarks/."""

from pathlib import Path

import pytest

from benchmarks.chaos import Weather, storm

#: Each kind of process killed, each stopped, each order given; two more turns are the dice's.
FIRST = (
    "worker killed",
    "keeper killed",
    "supervisor killed",
    "worker stopped",
    "keeper stopped",
    "program stopped",
    "stage paused",
    "stage resized",
)


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["sqlite", "fifo", "sqs"])
def test_a_storm_loses_and_doubles_nothing(tmp_path: Path, broker: str) -> None:
    # A poison that kills takes all its attempts, each on a fresh worker: cheap enough where nothing else fails.
    kinds = ("reject", "sigkill") if broker == "sqlite" else ("reject",)
    weather = Weather(
        broker=broker,
        items=150,
        poison=2,
        kinds=kinds,
        seed=7,
        visibility=2.0,
        every=0.25,
        restart=2.0,
        most=10,
        first=FIRST,
        backoff=0.2,
    )
    result = storm(weather, tmp_path)
    assert result.broken == []
    assert result.verdict.dead >= 2
    assert result.done.keys() >= set(FIRST)
