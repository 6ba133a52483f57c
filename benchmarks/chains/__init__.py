"""Chains of continuations under fire: the same value goes on and on, while everything is killed and drained.

::

    job    two stages whose calls end where the clock says, so that a call that runs again ends elsewhere
    run    one seeded run: it kills, also between a continuation's send and its delete, and compares the outputs

``tests/system/test_chains.py`` runs a few seeds, ``python -m benchmarks.chains`` hundreds.
"""

from benchmarks.chains.run import BROKERS, Result, run

__all__ = ["BROKERS", "Result", "run"]
