"""A shutdown under any order of deaths, STOPPEDs, time and second signals.

Longer: ``SHUTDOWN_EXAMPLES=20000 pytest tests/unit/test_shutdown_machine.py``.
"""

import math
import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sqspipes_mp.supervisor.shutdown import KEEPER_GRACE, KEEPER_GRACE_NOW, POLL_GRACE, Shutdown, Step

EXAMPLES = int(os.environ.get("SHUTDOWN_EXAMPLES", "400"))


class ShutdownMachine(RuleBasedStateMachine):
    """The supervisor's side: it asks at ``deadline()`` at the latest, and after whatever happens."""

    @initialize(
        grace=st.sampled_from([0.0, 0.5, POLL_GRACE, 25.0]),
        workers=st.integers(0, 4),
        stopped=st.integers(0, 4),
        keeper=st.booleans(),
    )
    def begin(self, grace: float, workers: int, stopped: int, keeper: bool) -> None:
        self.began = self.now = 1000.0
        self.grace = grace
        self.hastened: float | None = None
        # Of each living worker: whether it may still receive.
        self.workers = [place >= stopped for place in range(workers)]
        self.keeper = keeper
        self.keeper_killed = False
        self.told: list[tuple[float, Step]] = []
        self.childless_at: float | None = None if self.workers else self.now
        self.killed = False
        self.over = False
        self.shutdown = Shutdown(self.now, grace)
        self.ask()

    def ask(self) -> None:
        receiving = sum(self.workers)
        steps = self.shutdown.steps(self.now, workers=len(self.workers), receiving=receiving, keeper=self.keeper)
        for step in steps:
            self.check(step)
            self.told.append((self.now, step))
        assert len(steps) == len(set(steps))
        if not self.workers and not self.keeper:
            assert self.over, "nobody is left and it is not over"

    def check(self, step: Step) -> None:
        assert not self.over, "something was to be done after the end"
        # A keeper may have been replaced since it was killed.
        assert step is Step.KILL_KEEPER or step not in [told for _, told in self.told], "told twice"
        if step is Step.RELEASE:
            assert self.workers
            assert not any(self.workers) or self.now >= self.began + POLL_GRACE
        elif step is Step.KILL_WORKERS:
            assert self.workers
            assert self.hastened is not None or self.now >= self.began + self.grace
            self.killed = True
        elif step is Step.QUIT_KEEPER:
            assert not self.workers
            assert self.keeper
        elif step is Step.KILL_KEEPER:
            assert not self.workers
            assert self.keeper
            assert self.childless_at is not None
            grace = KEEPER_GRACE if self.hastened is None else KEEPER_GRACE_NOW
            assert self.now >= self.childless_at + grace
            self.keeper_killed = True
        elif step is Step.OVER:
            assert not self.workers
            assert not self.keeper
            self.over = True

    # -- what happens -------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.over)
    @rule(share=st.sampled_from([0.25, 0.5, 1.0]))
    def time_passes_until_the_deadline(self, share: float) -> None:
        wait = self.shutdown.deadline() - self.now
        if 0 < wait < math.inf:
            self.now += wait * share
        self.ask()

    @rule(seconds=st.sampled_from([0.01, 1.0, 5.0, 60.0]))
    def the_supervisor_is_kept_waiting(self, seconds: float) -> None:
        self.now += seconds
        self.ask()

    @precondition(lambda self: not self.over and self.workers)
    @rule(data=st.data())
    def a_worker_stops_receiving(self, data: st.DataObject) -> None:
        self.workers[data.draw(st.integers(0, len(self.workers) - 1))] = False
        self.ask()

    @precondition(lambda self: not self.over and self.workers)
    @rule(data=st.data())
    def a_worker_is_gone(self, data: st.DataObject) -> None:
        del self.workers[data.draw(st.integers(0, len(self.workers) - 1))]
        if not self.workers:
            self.childless_at = self.now
        self.ask()

    @precondition(lambda self: not self.over and self.keeper)
    @rule()
    def the_keeper_is_gone(self) -> None:
        self.keeper = False
        self.ask()

    @precondition(lambda self: not self.over and self.workers and not self.keeper)
    @rule()
    def the_keeper_is_replaced(self) -> None:
        """Before it is told to quit: what happens after that is ``test_a_keeper_replaced_too_late_is_killed_too``."""
        self.keeper = True
        self.ask()

    @precondition(lambda self: not self.over)
    @rule()
    def a_second_signal(self) -> None:
        self.hastened = self.now if self.hastened is None else self.hastened
        self.shutdown.hasten(self.now)
        self.ask()
        assert self.killed or not self.workers

    # -- always -------------------------------------------------------------------------------------------------

    @invariant()
    def what_is_due_was_told(self) -> None:
        if not hasattr(self, "shutdown") or self.over:
            return
        told = {step for _, step in self.told}
        if self.workers:
            if not any(self.workers) or self.now >= self.began + POLL_GRACE:
                assert Step.RELEASE in told
            if self.hastened is not None or self.now >= self.began + self.grace:
                assert Step.KILL_WORKERS in told
        elif self.keeper:
            assert Step.QUIT_KEEPER in told

    def teardown(self) -> None:
        """Nothing more goes well: nobody stops, ends or quits by itself; only what is killed dies."""
        if not hasattr(self, "shutdown"):
            return
        for _ in range(20):
            if self.over:
                return
            deadline = self.shutdown.deadline()
            self.now = max(self.now, deadline if deadline < math.inf else 0.0)
            self.ask()
            if self.killed and self.workers:
                self.workers.clear()
                self.childless_at = self.now
            if self.keeper_killed:
                self.keeper = False
        assert self.over, "it never ends"


TestShutdowns = ShutdownMachine.TestCase
TestShutdowns.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=30, derandomize=True, database=None, deadline=None
)


def test_a_keeper_replaced_too_late_is_killed_too() -> None:
    shutdown = Shutdown(0.0, 25.0)
    assert shutdown.steps(0.0, workers=0, receiving=0, keeper=True) == [Step.QUIT_KEEPER]
    assert shutdown.steps(KEEPER_GRACE, workers=0, receiving=0, keeper=True) == [Step.KILL_KEEPER]
    # It was killed, and replaced within the same turn; the new one cannot reach the broker either.
    told = [shutdown.steps(KEEPER_GRACE + n, workers=0, receiving=0, keeper=True) for n in range(1, 100)]
    assert [Step.KILL_KEEPER] in told


def test_there_is_no_deadline_for_what_was_told() -> None:
    shutdown = Shutdown(0.0, 0.0)
    shutdown.steps(0.0, workers=1, receiving=0, keeper=True)
    assert shutdown.deadline() > 0.0
