"""Chaos: programs share a pipeline while everything they consist of is killed, stopped and started again.

::

    pipeline   the three stages, and the program that runs them (``python -m benchmarks.chaos.pipeline``)
    storm      runs those programs and does the killing, by seeded dice
    verdict    reads the queues afterwards: what was lost, doubled or dead-lettered

``tests/system/test_chaos.py`` runs a short storm, ``python -m benchmarks.chaos`` a long one.
"""

from benchmarks.chaos.storm import FAULTS, Result, Weather, storm

__all__ = ["FAULTS", "Result", "Weather", "storm"]
