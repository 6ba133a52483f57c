"""slot.py and keeper_slot.py: the life of a worker and of the keeper, without a process.

Longer: ``SLOT_EXAMPLES=20000 pytest tests/unit/test_slot.py``.
"""

import ast
import math
import os
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import sqspipes_mp.supervisor
from sqspipes_mp import Task
from sqspipes_mp.ipc.leases import Cause
from sqspipes_mp.pipeline.plan import Seat
from sqspipes_mp.pipeline.stages import build
from sqspipes_mp.supervisor.child import Child
from sqspipes_mp.supervisor.keeper_slot import FAILURES, KeeperSlot, Loss
from sqspipes_mp.supervisor.slot import LAST_WORDS, SILENCE, Call, Slot, State, Worker

EXAMPLES = int(os.environ.get("SLOT_EXAMPLES", "300"))
LATE = Call(Cause.TIMEOUT, 1, None)
CHILD = cast("Child", object())


def work(value: object) -> object:
    return value


def empty() -> Slot:
    return Slot(
        0, Seat(0, 0), build([Task(work, input=True)], domain="t", fifo=False, visibility=60.0).stages[0], "work[0]"
    )


def worker() -> Worker:
    nothing: Any = object()
    return Worker(nothing, nothing, nothing)


def booting(now: float = 1.0) -> Slot:
    slot = empty()
    slot.started(worker(), now)
    return slot


def ready() -> Slot:
    slot = booting()
    slot.got_ready()
    return slot


def test_a_planned_start_is_due_once_until_the_worker_is_there() -> None:
    slot = empty()
    assert (slot.state, slot.start_due(math.inf)) == (State.EMPTY, False)
    slot.plan_start(5.0)
    assert (slot.state, slot.start_due(4.9), slot.start_due(5.0)) == (State.WAITING, False, True)
    slot.started(worker(), 5.0)
    assert (slot.state, slot.started_at, slot.start_due(math.inf)) == (State.BOOTING, 5.0, False)


def test_a_start_that_is_cancelled_never_comes() -> None:
    slot = empty()
    slot.plan_start(5.0)
    slot.cancel_start()
    assert (slot.state, slot.start_due(math.inf)) == (State.EMPTY, False)


def test_a_worker_that_says_goodbye_has_left_as_asked() -> None:
    slot = ready()
    assert slot.state is State.READY
    slot.leaves(7.0)
    assert (slot.state, slot.leaving_since) == (State.LEAVING, 7.0)
    assert (slot.died(), slot.state) == (Cause.CLEAN, State.EMPTY)


def test_a_worker_that_dies_without_a_word_has_crashed() -> None:
    for slot in (booting(), ready()):
        assert (slot.died(), slot.state) == (Cause.CRASH, State.EMPTY)


@pytest.mark.parametrize(("leaves", "state"), [(True, State.FINISHED), (False, State.EMPTY)])
def test_a_slot_is_finished_where_its_source_ended_and_its_worker_left(leaves: bool, state: State) -> None:
    slot = ready()
    slot.source_ended()
    if leaves:
        slot.leaves(7.0)
    slot.died()
    assert slot.state is state


def test_a_worker_that_is_killed_has_not_left_even_where_it_said_goodbye() -> None:
    slot = ready()
    slot.source_ended()
    slot.kill(Cause.MEMORY)
    slot.leaves(7.0)
    assert slot.state is State.KILLED
    assert (slot.died(), slot.state) == (Cause.MEMORY, State.EMPTY)


def test_the_first_cause_of_a_kill_counts() -> None:
    slot = ready()
    slot.kill(Cause.MEMORY, known=True)
    slot.kill(Cause.CUT)
    assert slot.knows_call
    assert slot.died() is Cause.MEMORY


def test_a_late_call_has_time_for_its_stack_and_longer_until_that_is_whole() -> None:
    slot = ready()
    slot.call_is_late(LATE, 10.0)
    assert (slot.state, slot.cause, slot.kill_at) == (State.LATE, Cause.TIMEOUT, 10.0 + LAST_WORDS)
    assert [slot.kill_due(now) for now in (10.0, 10.0 + LAST_WORDS)] == [False, True]
    assert slot.put_off_kill(10.5)
    assert slot.kill_at == 10.5 + LAST_WORDS
    assert not slot.put_off_kill(10.0 + SILENCE)
    assert slot.died() is Cause.TIMEOUT


def test_a_late_call_that_comes_back_kills_nobody() -> None:
    slot = ready()
    slot.call_is_late(LATE, 10.0)
    slot.call_came_back()
    assert (slot.state, slot.cause, slot.kill_due(math.inf)) == (State.READY, None, False)
    assert slot.died() is Cause.CRASH


def test_a_worker_that_is_cut_off_while_its_late_call_comes_back_was_cut_off() -> None:
    # Its next call, if it has begun one, must not be charged with a crash.
    slot = ready()
    slot.call_is_late(LATE, 10.0)
    slot.kill(Cause.CUT)
    assert slot.cause is Cause.TIMEOUT
    slot.call_came_back()
    assert (slot.state, slot.died()) == (State.KILLED, Cause.CUT)


def test_a_new_worker_inherits_nothing_of_the_last_one() -> None:
    slot = ready()
    slot.source_ended()
    slot.stopped_receiving()
    slot.wants_replacement(starved=True)
    slot.leaves(3.0)
    slot.look_for_hold(90.0)
    slot.call_is_late(LATE, 10.0)
    slot.kill(Cause.CUT)
    slot.died()
    slot.started(worker(), 20.0)
    fresh = booting(20.0)
    names = [name for name in Slot.__slots__ if name not in {"worker", "stage"}]
    assert [getattr(slot, name) for name in names] == [getattr(fresh, name) for name in names]


class SlotMachine(RuleBasedStateMachine):
    """A slot under any order of facts: one worker at most, and one reason for its end."""

    def __init__(self) -> None:
        super().__init__()
        self.slot, self.now = empty(), 1.0
        self.left = self.asked = self.over = False
        self.killed: list[Cause] = []

    living = precondition(lambda self: self.slot.worker is not None)
    vacant = precondition(lambda self: self.slot.worker is None and not self.slot.finished)

    @rule(step=st.floats(0.0, 2.0))
    def wait(self, step: float) -> None:
        self.now += step

    @vacant
    @rule(step=st.floats(0.0, 2.0))
    def plan(self, step: float) -> None:
        self.slot.plan_start(self.now + step)
        assert self.slot.state is State.WAITING

    @vacant
    @rule()
    def cancel(self) -> None:
        self.slot.cancel_start()
        assert self.slot.state is State.EMPTY

    @vacant
    @rule()
    def start(self) -> None:
        self.slot.started(worker(), self.now)
        assert self.slot.state is State.BOOTING
        assert self.slot.cause is None
        self.left, self.killed = False, []

    @living
    @rule(said=st.sampled_from(["got_ready", "stopped_receiving", "source_ended", "leaves"]))
    def say(self, said: str) -> None:
        getattr(self.slot, said)(*[self.now] * (said == "leaves"))
        self.left |= said == "leaves"

    @living
    @rule(cause=st.sampled_from([Cause.CUT, Cause.MEMORY, Cause.FULL, Cause.ROOM]))
    def kill(self, cause: Cause) -> None:
        self.slot.kill(cause)
        self.killed.append(cause)

    @precondition(lambda self: self.slot.worker is not None and self.slot.cause is None)
    @rule()
    def late(self) -> None:
        self.slot.call_is_late(LATE, self.now)
        assert self.slot.state is State.LATE

    @precondition(lambda self: self.slot.worker is not None and self.slot.late is not None)
    @rule(back=st.booleans())
    def kill_late(self, back: bool) -> None:
        if not self.slot.kill_due(self.now):
            return
        if back:
            self.slot.call_came_back()
            assert self.slot.cause is (self.killed[0] if self.killed else None)
        elif self.slot.put_off_kill(self.now):
            assert self.slot.kill_at == self.now + LAST_WORDS

    @living
    @rule()
    def die(self) -> None:
        late, ended = self.slot.late, self.slot.ended
        expected = late.cause if late else self.killed[0] if self.killed else Cause.CLEAN if self.left else Cause.CRASH
        assert self.slot.died() is expected
        assert self.slot.finished == (ended and expected is Cause.CLEAN)

    @invariant()
    def one_state(self) -> None:
        slot = self.slot
        there = slot.state not in {State.EMPTY, State.WAITING, State.FINISHED}
        assert there == (slot.worker is not None)
        assert not (there and slot.start_due(math.inf))
        if there:
            assert (slot.state in {State.LATE, State.KILLED}) == (slot.cause is not None)
            assert (slot.kill_at is not None) == (slot.state is State.LATE)


SlotMachine.TestCase.settings = settings(max_examples=EXAMPLES, deadline=None)
TestSlotMachine = SlotMachine.TestCase


# -- the keeper ---------------------------------------------------------------------------------------------------


def test_a_keeper_that_dies_before_the_first_was_ready_ends_the_engine() -> None:
    slot = KeeperSlot()
    slot.started(CHILD, 1.0)
    assert slot.died() is Loss.AT_BOOT


def test_a_lost_keeper_is_replaced_until_too_many_in_a_row_were_never_ready() -> None:
    slot = KeeperSlot()
    slot.started(CHILD, 1.0)
    assert slot.got_ready()
    for _ in range(3):
        assert slot.died() is Loss.REPLACED
        slot.started(CHILD, 2.0)
        assert not slot.ready
        assert not slot.got_ready()
    losses = []
    for _ in range(FAILURES + 1):
        losses.append(slot.died())
        slot.started(CHILD, 3.0)
    assert losses == [Loss.REPLACED] * FAILURES + [Loss.TOO_MANY]


def test_a_keeper_that_leaves_is_no_loss_and_its_successor_has_not_left() -> None:
    slot = KeeperSlot()
    slot.started(CHILD, 1.0)
    slot.leaves(2.0)
    assert slot.died() is Loss.NONE
    slot.started(CHILD, 3.0)
    assert slot.leaving_since is None


def test_a_keeper_that_stood_still_is_killed_once() -> None:
    slot = KeeperSlot()
    slot.started(CHILD, 1.0)
    slot.killed(9.0)
    assert slot.patient_since == 9.0


# -- their owner --------------------------------------------------------------------------------------------------


def test_only_a_slot_assigns_its_fields() -> None:
    fields = {*Slot.__slots__, *KeeperSlot.__slots__}
    owners = {"slot.py", "keeper_slot.py"}
    for path in Path(sqspipes_mp.supervisor.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and path.name not in owners:
                of = ast.unparse(node.value)
                assert of == "self" or node.attr not in fields, f"{path.name}:{node.lineno} assigns {of}.{node.attr}"
