"""Some seeds of values that go on and on while everything is killed and drained. Hundreds: benchmarks/chains."""

from pathlib import Path

import pytest

from benchmarks.chains import BROKERS, run


@pytest.mark.slow
@pytest.mark.parametrize("broker", BROKERS)
def test_chains_lose_and_double_nothing(tmp_path: Path, broker: str) -> None:
    result = run(broker, 11, tmp_path)
    assert result.broken == []
    assert result.lost == 0
    assert result.done["killed between send and delete"] == 1
