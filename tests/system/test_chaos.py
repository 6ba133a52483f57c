"""A short storm: two programs killed, stopped and started again over faulty queues. The long one is in benchmarks/."""

from pathlib import Path

import pytest

from tests.chaos import Weather, storm


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["sqlite", "fifo", "sqs"])
def test_a_storm_loses_and_doubles_nothing(tmp_path: Path, broker: str) -> None:
    # Poison that is retried would take longer, by its backoff alone, than all the rest.
    weather = Weather(
        broker=broker, items=150, poison=2, kinds=("reject",), seed=7, visibility=2.0, every=0.25, restart=2.0, most=8
    )
    result = storm(weather, tmp_path)
    assert result.broken == []
    assert result.verdict.dead >= 2
    assert result.done.total() >= 2
