"""Workers, supervisor and keeper in any order, one step at a time, against SQS's rules.

Real here: the scoreboard with its regions, the worker's ``WorkerContext``, and the whole ``Keeper``. Modelled: the
broker, the clock, and a worker's threads as single steps. The keeper runs in a thread that stands still at each point
where its process could be killed or another could be quicker; only one of the two threads ever runs, so nothing is
random.

Longer: ``LEASE_EXAMPLES=5000 pytest tests/unit/test_lease_machine.py``.
"""

import itertools
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sqspipes_mp import Task
from sqspipes_mp.brokers.base import Completion, DeadLetter, Depth, Handle, Received
from sqspipes_mp.errors import BrokerBusy
from sqspipes_mp.ipc import leases as region_module
from sqspipes_mp.ipc.birth import Assignment
from sqspipes_mp.ipc.leases import Blame, Cause, Lease, LeaseState, LeaseTable, id_digest
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.keeper import main as keeper_main
from sqspipes_mp.keeper.extend import due
from sqspipes_mp.keeper.judge import Judgement, judge
from sqspipes_mp.messages.attempts import MOST_BACKOFF
from sqspipes_mp.messages.envelope import decode
from sqspipes_mp.messages.limits import MAX_VISIBILITY
from sqspipes_mp.pipeline.plan import RunPlan, Settings, make_plan
from sqspipes_mp.pipeline.stages import build
from sqspipes_mp.supervisor.run import new_board
from sqspipes_mp.worker import context as station_module
from sqspipes_mp.worker.context import Delivery, WorkerContext

EXAMPLES = int(os.environ.get("LEASE_EXAMPLES", "150"))
BODY = '{"meta": {"priority": 0}, "value": 1}'
MESSAGES, ENTRIES = 40, 16
#: What an assignment has and these machines need not.
UNUSED: Any = None
MOST_ATTEMPTS = 3
CHARGEABLE = {LeaseState.RUNNING, LeaseState.DONE, LeaseState.FAILED, LeaseState.CHARGING}
KEPT = {LeaseState.HELD, LeaseState.RUNNING, LeaseState.DONE, LeaseState.FAILED}
#: What a lease is in before it goes each way.
COURSES = {"complete": LeaseState.DONE, "fail": LeaseState.RUNNING, "give back": LeaseState.HELD}
GUILTY = {Cause.CRASH, Cause.TIMEOUT, Cause.MEMORY}


def source() -> Iterator[int]:
    yield from ()


def function(value: int) -> int:
    return value


def plan_of(visibility: float, timeout: float | None) -> RunPlan:
    work = Task(function, name="work", workers=2, threads=4, timeout=timeout, max_attempts=MOST_ATTEMPTS)
    pipeline = build([source, work, Task(function, name="sink")], domain="t", fifo=False, visibility=visibility)
    return make_plan(pipeline, Settings(visibility=visibility), only="work")


PLANS = {
    (visibility, timeout): plan_of(visibility, timeout)
    for visibility, timeout in ((2.0, None), (2.0, 1.0), (10.0, 30.3), (60.0, None), (60.0, 20.0))
}


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return int(self.now * 1e9)


# --- the broker ---


@dataclass
class Message:
    """``accepted``: its outputs are downstream; ``buried``: a copy is in the dead-letter queue; ``attempts``: charges
    there may be: calls that failed, and deaths in which it ran."""

    ident: str
    visible_at: float = 0.0
    receives: int = 0
    received_at: float = 0.0
    charges: int = 0
    deleted: bool = False
    accepted: bool = False
    buried: bool = False
    attempts: int = 0


class Queue:
    """SQS's rules for one standard queue; ``rows``: it keeps charges, and completes in one step, as SQLite does."""

    def __init__(self, clock: Clock, *, rows: bool) -> None:
        self.clock = clock
        self.rows = rows
        #: They come as they are asked for, after those that are there already.
        self.messages: dict[str, Message] = {}

    def receive(self, most: int, visibility: float) -> list[Received]:
        ready = [m for m in self.messages.values() if not m.deleted and m.visible_at <= self.clock.now]
        if not ready and len(self.messages) < MESSAGES:
            message = Message(f"m{len(self.messages)}")
            self.messages[message.ident] = message
            ready = [message]
        found = []
        for message in ready[:most]:
            message.receives += 1
            message.received_at = self.clock.now
            message.visible_at = self.clock.now + visibility
            handle = Handle("t-source", f"{message.ident}-{message.receives}", message.ident)
            charges = message.charges if self.rows else 0
            found.append(Received(handle, BODY, message.receives, charges, None, 5.0))
        return found

    def current(self, handle: Handle) -> Message | None:
        message = self.messages[handle.message_id]
        return None if message.deleted or handle.receipt != f"{message.ident}-{message.receives}" else message

    def extend(self, handles: Sequence[Handle], seconds: float, *, attempts: int = 0) -> list[Handle]:
        stale = []
        for handle in handles:
            message = self.current(handle)
            if message is None or self.clock.now + seconds > message.received_at + MAX_VISIBILITY:
                stale.append(handle)
                continue
            message.visible_at = self.clock.now + seconds
            message.charges = max(message.charges, attempts)
        return stale

    def delete(self, handles: Sequence[Handle]) -> list[Handle]:
        stale = []
        for handle in handles:
            message = self.current(handle)
            if message is None:
                stale.append(handle)
                continue
            assert message.accepted or message.buried, "deleted before anything else had it"
            message.deleted = True
        return stale


# --- the keeper, stopped at will ---


class Killed(BaseException):
    """The keeper's process ends here."""


class Puppet:
    """A thread that runs only within ``resume``, up to the next point asked for."""

    def __init__(self, run: Callable[["Puppet"], None]) -> None:
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._until = ""
        self._killed = False
        self._error: BaseException | None = None
        self.at = "turn"
        self._last = ""
        self._thread = threading.Thread(target=self._main, args=(run,), daemon=True)
        self._thread.start()

    def resume(self, until: str) -> None:
        """Go on to the next point of that name, or to the end of the turn."""
        self._until = until
        self._go.release()
        assert self._back.acquire(timeout=60)
        if self._error is not None:
            raise self._error

    def kill(self) -> None:
        self._killed = True
        self._go.release()
        self._thread.join(60)

    def point(self, name: str) -> None:
        """Stand still here if asked to; the first of several points of one name counts."""
        first, self._last = self._last != name, name
        if name == "turn" or (first and name == self._until):
            self.at = name
            self._back.release()
            self._go.acquire()
            if self._killed:
                raise Killed

    def _main(self, run: Callable[["Puppet"], None]) -> None:
        self._go.acquire()
        try:
            if not self._killed:
                run(self)
        except Killed:
            return
        except BaseException as error:
            self._error = error
        self._back.release()


class WatchedRegion:
    """A region as the keeper sees it: there is a point after the look at all its leases, and before every note."""

    def __init__(self, region: LeaseTable, machine: "LeaseMachine", puppet: Puppet) -> None:
        self._region, self._machine, self._puppet = region, machine, puppet

    def __getattr__(self, name: str) -> Any:
        if name in {"keep", "lose", "mark_judged"}:
            self._puppet.point("note")
            if name == "mark_judged":
                self._machine.judged(self._region)
        return getattr(self._region, name)

    def leases(self, queues: tuple[str, ...]) -> list[Lease]:
        found = list(self._region.leases(queues))
        self._puppet.point("look")
        return found


class WatchedBoard:
    def __init__(self, board: Scoreboard, machine: "LeaseMachine", puppet: Puppet) -> None:
        self._board, self._machine, self._puppet = board, machine, puppet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._board, name)

    def region(self, index: int) -> WatchedRegion:
        return WatchedRegion(self._board.region(index), self._machine, self._puppet)

    def used_regions(self) -> Iterator[WatchedRegion]:
        for region in self._board.used_regions():
            yield WatchedRegion(region, self._machine, self._puppet)

    def charge(self, writer: int, digest: bytes, attempts: int) -> None:
        self._puppet.point("note")
        ident = next(m.ident for m in self._machine.queue.messages.values() if id_digest(m.ident) == digest)
        self._machine.charged(ident, attempts)
        self._board.charge(writer, digest, attempts)
        self._puppet.point("noted")


class KeepersConnection:
    """The broker as the keeper sees it: a point before and after each call, each of which may find it busy."""

    batch, carriers, settle, linger, keeps_charges = 10, 1, 0.0, 0.0, True

    def __init__(self, machine: "LeaseMachine", puppet: Puppet) -> None:
        self._machine, self._puppet = machine, puppet

    def extend(self, handles: Sequence[Handle], seconds: float, *, attempts: int = 0) -> list[Handle]:
        machine = self._machine
        if attempts:
            for handle in handles:
                machine.charged(handle.message_id, attempts)
        if seconds > 0 and not attempts:
            machine.extending(handles)
        elif seconds == 0:
            machine.releasing(handles)
        return self._call(lambda: machine.queue.extend(handles, seconds, attempts=attempts))

    def complete(self, completions: Sequence[Completion], on_sent: object = None) -> list[Handle]:
        handles = [completion.input for completion in completions if completion.input is not None]
        assert not any(completion.outputs for completion in completions)
        return self._call(lambda: self._machine.queue.delete(handles))

    def dead_letter(self, letters: Sequence[DeadLetter]) -> list[Handle]:
        handles = [letter.handle for letter in letters]
        for letter in letters:
            self._machine.buried(letter)
        self._puppet.point("call")
        for handle in handles:
            self._machine.queue.messages[handle.message_id].buried = True
        return self._call(lambda: self._machine.queue.delete(handles))

    def tend(self) -> None:
        self._puppet.point("call")

    def depth(self, queue: str) -> Depth:
        raise AssertionError("nobody asked to look for the end")

    def _call(self, act: Callable[[], list[Handle]]) -> list[Handle]:
        self._puppet.point("call")
        busy, self._machine.busy = self._machine.busy, None
        if busy == "unheard":
            raise BrokerBusy("the request was lost")
        stale = act()
        if busy == "unanswered":
            raise BrokerBusy("the reply was lost")
        self._puppet.point("called")
        return stale


# --- workers ---


@dataclass
class Work:
    """What one thread of a worker is about: its generator yields where the process may be killed."""

    delivery: Delivery
    steps: Iterator[None]


@dataclass
class Worker:
    """``number`` counts incarnations; ``pending``: received, no lease written yet, with the time of the request;
    ``calls``: the call each started lease is in."""

    number: int
    slot: int
    station: WorkerContext
    region: LeaseTable
    pending: list[tuple[Received, float]] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    busy: list[Work] = field(default_factory=list)
    late: tuple[int, int] | None = None
    condemned: bool = False
    calls: dict[int, int] = field(default_factory=dict)


@dataclass
class Death:
    """A worker's death."""

    number: int
    region: int
    cause: Cause
    #: Messages that ran.
    running: list[str]
    #: The message whose call the worker was killed for; None: it had failed before, or is not known.
    late: str | None
    #: Whether the call that the worker was killed for is known, so that no other one is a suspect.
    known: bool = False
    batch: bool = False
    handles: tuple[Handle, ...] = ()
    #: Messages whose calls had raised before.
    failed: tuple[str, ...] = ()

    def due(self) -> list[str]:
        """Return the messages to charge at this death."""
        return [*self.failed, *self.guilty()]

    def guilty(self) -> list[str]:
        if self.late is not None:
            return [self.late]
        return self.running if self.cause is Cause.CRASH and len(self.running) == 1 and not self.batch else []

    def suspects(self) -> list[str]:
        guilty = self.guilty()
        suspected = self.cause in GUILTY and not self.known
        return [ident for ident in self.running if ident not in guilty] if suspected else []


class LeaseMachine(RuleBasedStateMachine):
    @initialize(which=st.sampled_from(sorted(PLANS, key=str)), rows=st.booleans())
    def begin(self, which: tuple[float, float | None], rows: bool) -> None:
        self.visibility, self.timeout = which
        self.plan = PLANS[which]
        self.clock = Clock()
        self.patches: list[Any] = [
            patch.object(keeper_main, "time", self.clock),
            *(patch.object(module, "lease_now", self.clock.monotonic) for module in (keeper_main, station_module)),
        ]
        # Looking through all entries is most of what this test would do.
        self.patches += [patch.object(module, "LEASES", ENTRIES) for module in (region_module, station_module)]
        for each in self.patches:
            each.start()
        self.board = new_board(self.plan)
        self.queue = Queue(self.clock, rows=rows)
        self.busy: str | None = None
        self.busy_in_a_row = 0
        self.numbers = itertools.count()
        self.seats: list[Worker | None] = [None, None]
        self.unreaped: list[Worker] = []
        self.deaths: list[Death] = []
        self.unjudged: set[int] = set()
        self.isolated: set[str] = set()
        #: (worker, lease, generation) that nobody promised to keep: the keeper, or the worker's intake, stood still.
        self.neglected: set[tuple[int, int, int]] = set()
        self.keeper: Puppet | None = None
        self.refill(0)
        self.refill(1)

    def teardown(self) -> None:
        if not hasattr(self, "board"):
            return
        try:
            if self.keeper is not None:
                self.keeper.kill()
            self.settle_all()
        finally:
            if self.keeper is not None:
                self.keeper.kill()
            for each in self.patches:
                each.stop()
            self.board.close()

    def settle_all(self) -> None:
        """Kill and judge everybody: then every message is done, buried, or there to be received."""
        self.keeper, self.busy = None, None
        for worker in list(filter(None, self.seats)):
            self.kill(worker)
        while self.unreaped:
            self.reap_first(Cause.CRASH)
        self.turn()
        assert all(self.board.region(index).free for index in range(self.board.regions))
        self.clock.now += MAX_VISIBILITY
        for message in self.queue.messages.values():
            assert message.deleted or message.visible_at <= self.clock.now, "hidden for good"
            assert not message.deleted or message.accepted or message.buried, "lost"

    # -- what the keeper does is judged here --------------------------------------------------------------------

    def owner(self, handle: Handle) -> tuple[Worker, Delivery] | None:
        """Return the living worker that has this very delivery on the scoreboard."""
        for worker in filter(None, self.seats):
            for delivery in worker.deliveries:
                if delivery.received.handle == handle:
                    return worker, delivery
        return None

    def extending(self, handles: Sequence[Handle]) -> None:
        """Right after the keeper's second look. (Within the call a worker may still begin to close one: no harm but
        a message hidden for a visibility timeout too long.)"""
        for handle in handles:
            owner = self.owner(handle)
            if owner is not None:
                state = owner[0].region.state(owner[1].lease)
                assert state in KEPT, f"extended while its worker has it {state.name}"

    def releasing(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            assert self.owner(handle) is None, "released what a living worker holds"
            if any(handle in death.handles and handle.message_id in death.suspects() for death in self.deaths):
                assert self.board.isolated(id_digest(handle.message_id)), "released, and may meet others again"

    def charged(self, ident: str, attempts: int) -> None:
        assert any(ident in death.due() for death in self.deaths), f"{ident} was charged for no death"
        assert attempts <= self.queue.messages[ident].attempts, f"{ident} was charged twice for one death"

    def buried(self, letter: DeadLetter) -> None:
        ident = letter.handle.message_id
        assert any(ident in death.due() for death in self.deaths), "dead-lettered without having run at a death"
        assert self.queue.messages[ident].attempts >= MOST_ATTEMPTS, "dead-lettered too early"
        assert letter.body == BODY

    def judged(self, region: LeaseTable) -> None:
        """The keeper is about to give the region free: nothing of it may still be hidden."""
        death = next(death for death in reversed(self.deaths) if death.region == region.index)
        for lease in region.leases(self.plan.queue_names):
            message = self.queue.current(lease.handle)
            if message is None:
                continue
            assert lease.state is not LeaseState.SENT or lease.lost, "sent, and not deleted"
            if lease.state in {LeaseState.FAILED, LeaseState.CHARGING} and not message.buried:
                noted = max(message.charges, self.board.charges(id_digest(message.ident), self.plan.selected[0]))
                assert noted > lease.charges or self.clock.now > message.received_at + MAX_VISIBILITY, "not charged"
            if lease.handle.message_id in death.due() and lease.state in CHARGEABLE:
                assert message.visible_at <= self.clock.now + MOST_BACKOFF
            elif not lease.lost:
                assert message.visible_at <= self.clock.now, "a dead worker's message was not given back"
        for ident in death.suspects():
            assert self.board.isolated(id_digest(ident)), "ran beside others at a death, and may do so again"
            self.isolated.add(ident)
        self.unjudged.discard(region.index)

    # -- time ---------------------------------------------------------------------------------------------------

    @rule(share=st.sampled_from([0.1, 0.5, 0.97, 1.0]))
    def rest(self, share: float) -> None:
        """As long as the keeper rests at most; then it takes a turn."""
        self.clock.now += share * self.longest_rest
        self.nothing_kept_expires()
        self.turn()
        if not self.busy_in_a_row:
            self.forgive()

    @rule(share=st.sampled_from([0.7, 0.97]), leases=st.sampled_from([0.6, 1.2, 3.0]))
    def rest_often(self, share: float, leases: float) -> None:
        """For longer than a receive hides its messages, say."""
        for _ in range(int(leases * self.plan.first_lease / (share * self.longest_rest))):
            self.rest(share)

    @rule(slot=st.integers(0, 1), course=st.sampled_from(["complete", "fail", "give back"]), steps=st.integers(0, 5))
    def worker_is_quicker(self, slot: int, course: str, steps: int) -> None:
        """A lease is due, the keeper has looked, and now its worker is about to close it."""
        self.come_to(slot, course, 0)
        self.keeper_stands_still(self.plan.first_lease / 2)
        self.keeper_goes_on("turn")
        self.keeper_stands_still(self.visibility / 2)
        self.keeper_goes_on("look")
        worker = self.seats[slot]
        if worker is not None:
            for work in worker.busy[-1:]:
                self.go_on(worker, work, steps)

    @rule(seconds=st.sampled_from([0.3, 1.0, 3.0, 8.0, 20.0, 70.0]))
    def keeper_stands_still(self, seconds: float) -> None:
        self.neglect()
        self.clock.now += seconds

    def turn(self) -> None:
        """Finish the keeper's turn if it is within one, and have it take another."""
        if self.keeper is None:
            self.start_keeper()
        assert self.keeper is not None
        if self.keeper.at != "turn":
            self.resume("turn")
        self.resume("turn")

    @property
    def longest_rest(self) -> float:
        return min(1.0, self.visibility / 8)

    def neglect(self) -> None:
        for worker in filter(None, self.seats):
            for delivery in worker.deliveries:
                lease = worker.region.read(delivery.lease)
                if lease is not None:
                    self.neglected.add((worker.number, lease.index, lease.generation))
            worker.pending = [(received, -math.inf) for received, _ in worker.pending]

    def forgive(self) -> None:
        """The keeper is back: what it has extended in time after all is kept from now on."""
        for worker in filter(None, self.seats):
            for delivery in worker.deliveries:
                lease = worker.region.read(delivery.lease)
                message = self.queue.current(delivery.received.handle)
                if lease is None or not lease.extended or lease.lost or message is None:
                    continue
                if message.visible_at >= self.clock.now:
                    self.neglected.discard((worker.number, lease.index, lease.generation))

    # -- the keeper ---------------------------------------------------------------------------------------------

    def start_keeper(self) -> None:
        def run(puppet: Puppet) -> None:
            broker: Any = SimpleNamespace(longest_hold=MAX_VISIBILITY)
            board: Any = WatchedBoard(self.board, self, puppet)
            connection: Any = KeepersConnection(self, puppet)
            channel: Any = SimpleNamespace(send=lambda kind: None)
            orders = Assignment(plan=self.plan, broker=broker, board=board, birth=UNUSED)
            keeper = keeper_main.Keeper(orders, connection, channel)

            def listen(timeout: float) -> None:
                assert 0 <= timeout <= self.longest_rest
                puppet.point("turn")

            keeper._listen = listen  # type: ignore[method-assign]
            keeper.run()

        self.keeper = Puppet(run)
        # It boots; its first turn comes next.
        self.resume("turn")

    def resume(self, until: str) -> None:
        assert self.keeper is not None
        asked = self.busy
        self.keeper.resume(until)
        if asked is not None and self.busy is None:
            self.busy_in_a_row += 1
            if self.busy_in_a_row > 1:
                self.neglect()
        elif self.keeper.at == "turn":
            self.busy_in_a_row = 0

    @rule(until=st.sampled_from(["look", "call", "called", "note", "noted", "turn"]))
    def keeper_goes_on(self, until: str) -> None:
        if self.keeper is None:
            self.start_keeper()
        self.resume(until)

    @precondition(lambda self: self.keeper is not None)
    @rule()
    def keeper_dies(self) -> None:
        assert self.keeper is not None
        self.keeper.kill()
        self.keeper = None

    @rule(until=st.sampled_from(["look", "call", "called", "note", "noted"]))
    def keeper_dies_at(self, until: str) -> None:
        self.keeper_goes_on(until)
        self.keeper_dies()

    @rule(how=st.sampled_from(["unheard", "unanswered"]))
    def broker_is_busy(self, how: str) -> None:
        self.busy = how

    # -- the supervisor -----------------------------------------------------------------------------------------

    @rule(slot=st.integers(0, 1))
    def refill(self, slot: int) -> None:
        if self.seats[slot] is not None or any(worker.slot == slot for worker in self.unreaped):
            return
        region = self.board.free_region(self.plan.seats[slot].stage)
        if region is None:
            return
        assert region.index not in self.unjudged, "a region was reused before it was judged"
        others = [*filter(None, self.seats), *self.unreaped]
        assert region.index not in {worker.region.index for worker in others}
        region.assign(slot)
        orders = Assignment(
            plan=self.plan,
            broker=UNUSED,
            board=self.board,
            birth=UNUSED,
            slot=slot,
            seat=self.plan.seats[slot],
            region=region.index,
        )
        self.seats[slot] = Worker(next(self.numbers), slot, WorkerContext(orders, UNUSED, UNUSED), region)

    @rule(slot=st.integers(0, 1), data=st.data())
    def call_runs_late(self, slot: int, data: st.DataObject) -> None:
        """The supervisor sees a call over its timeout; the worker goes on until the kill arrives."""
        worker = self.seats[slot]
        if worker is None or worker.condemned:
            return
        running = [d.lease for d in worker.deliveries if worker.region.state(d.lease) is LeaseState.RUNNING]
        if running:
            self.blame(worker, data.draw(st.sampled_from(running)))

    def blame(self, worker: Worker, lease: int | None, cause: Cause = Cause.TIMEOUT) -> None:
        """Mark a call and condemn its worker; nobody where its call has several messages, or none is known."""
        read = None if lease is None else worker.region.read(lease)
        worker.late, worker.condemned = None, cause is Cause.TIMEOUT
        if read is not None and not read.company:
            worker.region.blame(read, cause)
            worker.late = (read.index, read.generation)

    @rule(slot=st.integers(0, 1))
    def worker_dies(self, slot: int) -> None:
        worker = self.seats[slot]
        if worker is not None:
            self.kill(worker)

    def kill(self, worker: Worker) -> None:
        self.seats[worker.slot] = None
        self.unreaped.append(worker)

    @rule(slot=st.integers(0, 1), cause=st.sampled_from([Cause.CRASH, Cause.CRASH, Cause.MEMORY, Cause.CUT]))
    def worker_is_lost(self, slot: int, cause: Cause) -> None:
        """It dies in the state it is in, is reaped at once, and a new one comes."""
        worker = self.seats[slot]
        if worker is not None:
            self.kill(worker)
        while self.unreaped:
            self.reap_first(cause)
        self.refill(slot)

    @precondition(lambda self: self.unreaped)
    @rule(cause=st.sampled_from([Cause.CRASH, Cause.CRASH, Cause.MEMORY, Cause.CUT, Cause.CLEAN]))
    def reap_first(self, cause: Cause) -> None:
        worker = self.unreaped.pop(0)
        if worker.condemned:
            cause = Cause.TIMEOUT
        running = {
            d.lease: d.received.handle.message_id
            for d in worker.deliveries
            if worker.region.state(d.lease) is LeaseState.RUNNING
        }
        if cause is Cause.MEMORY and worker.late is None and len(running) == 1:
            self.blame(worker, next(iter(running)), cause)
        blamed = self.blamed(worker)
        # One that had failed is charged for that.
        late = blamed[0] if blamed is not None and blamed[1] in {LeaseState.RUNNING, LeaseState.DONE} else None
        handles = tuple(d.received.handle for d in worker.deliveries if d.lease in running)
        together = any(region.company for lease in running if (region := worker.region.read(lease)) is not None)
        failed = tuple(
            d.received.handle.message_id
            for d in worker.deliveries
            if worker.region.state(d.lease) in {LeaseState.FAILED, LeaseState.CHARGING}
        )
        death = Death(
            worker.number, worker.region.index, cause, list(running.values()), late, blamed is not None, together,
            handles, failed,
        )  # fmt: skip
        for ident in death.guilty():
            self.queue.messages[ident].attempts += 1
        self.deaths.append(death)
        self.unjudged.add(worker.region.index)
        worker.region.mark_dead(cause, -9, 4711)

    def blamed(self, worker: Worker) -> tuple[str, LeaseState] | None:
        """Return the message a worker was killed for, and its state, unless its outputs are accepted."""
        for delivery in worker.deliveries:
            read = worker.region.read(delivery.lease)
            if read is not None and (read.index, read.generation) == worker.late and read.state in CHARGEABLE:
                return delivery.received.handle.message_id, read.state
        return None

    # -- workers ------------------------------------------------------------------------------------------------

    @rule(slot=st.integers(0, 1), most=st.integers(1, 3))
    def receive(self, slot: int, most: int) -> None:
        worker = self.seats[slot]
        if worker is not None:
            worker.pending += [(each, self.clock.now) for each in self.queue.receive(most, self.plan.first_lease)]

    @rule(slot=st.integers(0, 1))
    def write_lease(self, slot: int) -> None:
        worker = self.seats[slot]
        if worker is None or not worker.pending or not worker.station.room:
            return
        received, asked_at = worker.pending.pop(0)
        punctual = self.clock.now - asked_at <= self.plan.first_lease / 4
        leased_at = max(asked_at, self.clock.now - self.plan.first_lease / 4)
        lease, failed, until = worker.station.open_lease(received, leased_at, self.plan.first_lease)
        message = self.queue.messages[received.handle.message_id]
        assert failed <= message.attempts, "charged more often than it failed"
        alone = worker.station.is_suspect(received)
        # A first delivery that came too late for its lease is not asked about: nothing begins in it.
        assert alone or message.ident not in self.isolated or self.queue.current(received.handle) is None
        worker.deliveries.append(Delivery(received, decode(BODY, message.ident), lease, failed + 1, until, alone))
        if not punctual:
            entry = worker.region.read(lease)
            assert entry is not None
            self.neglected.add((worker.number, lease, entry.generation))

    def waiting(self, worker: Worker, *states: LeaseState) -> list[Delivery]:
        """Return the worker's deliveries in these states that no thread of it is at."""
        taken = {id(work.delivery) for work in worker.busy}
        return [d for d in worker.deliveries if id(d) not in taken and worker.region.state(d.lease) in states]

    @rule(slot=st.integers(0, 1))
    def start_call(self, slot: int) -> None:
        worker = self.seats[slot]
        if worker is None:
            return
        running = [d for d in worker.deliveries if worker.region.state(d.lease) is LeaseState.RUNNING]
        free = set(range(self.plan.calls)) - {worker.calls[d.lease] for d in running}
        held = self.waiting(worker, LeaseState.HELD)
        if not held or not free or any(d.alone for d in running) or (held[0].alone and running):
            return
        delivery = held[0]
        if not worker.station.holds(delivery):
            self.close(worker, delivery)
            return
        worker.calls[delivery.lease] = min(free)
        worker.region.start(delivery.lease, self.clock.now, min(free), BODY)

    @rule(slot=st.integers(0, 1), most=st.integers(2, 4), started=st.integers(1, 4))
    def start_batch(self, slot: int, most: int, started: int) -> None:
        """One call with several messages; its worker may stand still before all of them are marked."""
        worker = self.seats[slot]
        if worker is None or any(worker.region.state(d.lease) is LeaseState.RUNNING for d in worker.deliveries):
            return
        members = [d for d in self.waiting(worker, LeaseState.HELD) if not d.alone and worker.station.holds(d)][:most]
        if len(members) > 1:
            for delivery in members[:started]:
                worker.calls[delivery.lease] = 0
                worker.region.start_together(delivery.lease, self.clock.now)

    @rule(slot=st.integers(0, 1), most=st.integers(2, 4), started=st.integers(1, 4), data=st.data())
    def a_batch_is_lost(self, slot: int, most: int, started: int, data: st.DataObject) -> None:
        self.receive(slot, most)
        for _ in range(most):
            self.write_lease(slot)
        self.start_batch(slot, most, started)
        if data.draw(st.booleans()):
            # Its call raised: its members run one by one.
            worker = self.seats[slot]
            for delivery in self.waiting(worker, LeaseState.RUNNING) if worker is not None else ():
                worker.region.set_state(delivery.lease, LeaseState.HELD)
            self.start_call(slot)
        self.worker_is_lost(slot, Cause.CRASH)

    @rule(
        slot=st.integers(0, 1), course=st.sampled_from(["", "complete", "fail", "give back"]), steps=st.integers(0, 5)
    )
    def come_to(self, slot: int, course: str, steps: int) -> None:
        """Bring one message some way through a worker; it then stands there."""
        worker = self.seats[slot]
        if worker is None:
            return
        if not self.waiting(worker, LeaseState.HELD):
            if not worker.pending:
                self.receive(slot, 1)
            self.write_lease(slot)
        held = self.waiting(worker, LeaseState.HELD)[:1]
        if course in {"complete", "fail"} or (steps and not course):
            self.start_call(slot)
        if not course or not held or held[0] not in worker.deliveries:
            return
        (delivery,) = held
        if course == "complete" and worker.region.state(delivery.lease) is LeaseState.RUNNING:
            worker.region.set_state(delivery.lease, LeaseState.DONE)
        if worker.region.state(delivery.lease) is COURSES[course]:
            self.carry(worker, delivery, course, steps)

    def carry(self, worker: Worker, delivery: Delivery, course: str, steps: int) -> None:
        begin = {"fail": self.failing, "complete": self.completing, "give back": self.giving_back}[course]
        work = Work(delivery, begin(worker, delivery))
        worker.busy.append(work)
        self.go_on(worker, work, steps)

    def go_on(self, worker: Worker, work: Work, steps: int) -> None:
        for _ in range(steps):
            if next(work.steps, "over") == "over":
                worker.busy.remove(work)
                return

    @rule(
        slot=st.integers(0, 1),
        course=st.sampled_from(["", "complete", "fail", "give back"]),
        steps=st.integers(0, 5),
        cause=st.sampled_from([Cause.CRASH, Cause.MEMORY, Cause.CUT]),
    )
    def lost_on_the_way(self, slot: int, course: str, steps: int, cause: Cause) -> None:
        self.come_to(slot, course, steps)
        self.worker_is_lost(slot, cause)

    @rule(slot=st.integers(0, 1), count=st.integers(1, 4), late=st.sampled_from([None, 0, 1, 3]))
    def lost_with_calls_running(self, slot: int, count: int, late: int | None) -> None:
        worker = self.seats[slot]
        for _ in range(count):
            self.come_to(slot, "", 1)
        if worker is not None and late is not None and not worker.condemned:
            running = [d.lease for d in worker.deliveries if worker.region.state(d.lease) is LeaseState.RUNNING]
            self.blame(worker, running[late] if late < len(running) else None)
        self.worker_is_lost(slot, Cause.CRASH)

    @rule(slot=st.integers(0, 1), data=st.data())
    def next_step(self, slot: int, data: st.DataObject) -> None:
        """Begin to carry something away, or go on with it."""
        worker = self.seats[slot]
        if worker is None:
            return
        choices: list[tuple[str, Any]] = [("go on", work) for work in worker.busy]
        choices += [("finish", d) for d in self.waiting(worker, LeaseState.RUNNING)]
        choices += [("fail", d) for d in self.waiting(worker, LeaseState.RUNNING)]
        choices += [("complete", d) for d in self.waiting(worker, LeaseState.DONE)]
        choices += [("give back", d) for d in self.waiting(worker, LeaseState.HELD, LeaseState.DONE)]
        if not choices:
            return
        verb, subject = choices[data.draw(st.integers(0, len(choices) - 1))]
        if verb == "finish":
            worker.region.set_state(subject.lease, LeaseState.DONE)
            if not worker.region.late_for(subject.lease):
                return
            verb = "fail"
        if verb != "go on":
            self.carry(worker, subject, verb, 1)
        else:
            self.go_on(worker, subject, 1)

    def failing(self, worker: Worker, delivery: Delivery) -> Iterator[None]:
        """``Outbox._give_back`` with a charge, ``_bury_now`` after the last attempt."""
        message = self.queue.messages[delivery.received.handle.message_id]
        handle = delivery.received.handle
        # The call is over, and the carrier has not come to it yet: whatever ends the worker now, it is charged.
        message.attempts += 1
        worker.region.set_state(delivery.lease, LeaseState.FAILED)
        yield
        if delivery.attempt >= MOST_ATTEMPTS:
            worker.station.charge(delivery)
            yield
            worker.region.set_state(delivery.lease, LeaseState.CLOSING)
            yield
            message.buried = True
            yield
            self.queue.delete([handle])
            yield
            worker.station.forget_charges(delivery)
        else:
            worker.region.set_state(delivery.lease, LeaseState.CHARGING)
            yield
            worker.station.charge(delivery)
            yield
            self.queue.extend([handle], 1.0, attempts=delivery.attempt)
        yield
        self.close(worker, delivery)

    def giving_back(self, worker: Worker, delivery: Delivery) -> Iterator[None]:
        worker.region.set_state(delivery.lease, LeaseState.CLOSING)
        yield
        self.queue.extend([delivery.received.handle], 0.0)
        yield
        self.close(worker, delivery)

    def completing(self, worker: Worker, delivery: Delivery) -> Iterator[None]:
        """``Outbox._complete``; where sending and deleting are one transaction, nobody is told between them."""
        handle = delivery.received.handle
        message = self.queue.messages[handle.message_id]
        if self.queue.rows:
            if self.queue.current(handle) is not None:
                message.accepted = True
            self.queue.delete([handle])
        else:
            message.accepted = True
            yield
            worker.region.set_state(delivery.lease, LeaseState.SENT)
            yield
            self.queue.delete([handle])
        yield
        self.close(worker, delivery)
        worker.station.forget_charges(delivery)

    def close(self, worker: Worker, delivery: Delivery) -> None:
        worker.station.close_lease(delivery.lease)
        worker.deliveries.remove(delivery)

    # -- always -------------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "queue"):
            for message in self.queue.messages.values():
                assert not message.deleted or message.accepted or message.buried

    @invariant()
    def nothing_kept_expires(self) -> None:
        for worker in filter(None, getattr(self, "seats", ())):
            for delivery in worker.deliveries:
                lease = worker.region.read(delivery.lease, self.plan.queue_names)
                assert lease is not None, "an entry nobody is writing cannot be read"
                if lease.state not in KEPT or (worker.number, lease.index, lease.generation) in self.neglected:
                    continue
                if self.queue.messages[lease.handle.message_id].deleted:
                    continue  # By this worker, which is about to clear the entry.
                message = self.queue.current(lease.handle)
                running = lease.state is LeaseState.RUNNING
                if running and self.timeout is not None and self.clock.now > lease.started_at + self.timeout:
                    # Its worker should be dead by now; what comes back from here on is nobody's promise.
                    self.neglected.add((worker.number, lease.index, lease.generation))
                    continue
                assert message is not None, "a kept message went to another worker"
                assert message.visible_at >= self.clock.now, "a kept lease expired"
                assert not lease.lost

    @invariant()
    def nothing_outlives_its_cap(self) -> None:
        for worker in filter(None, getattr(self, "seats", ())):
            for delivery in worker.deliveries:
                lease = worker.region.read(delivery.lease, self.plan.queue_names)
                if lease is None or (message := self.queue.current(lease.handle)) is None:
                    continue
                assert message.visible_at <= message.received_at + MAX_VISIBILITY
                neglected = (worker.number, lease.index, lease.generation) in self.neglected
                if lease.state is LeaseState.RUNNING and self.timeout is not None and not neglected:
                    # What was still held got a whole visibility timeout; a running one is rounded up to full seconds.
                    held = lease.started_at + self.visibility
                    cap = max(held, lease.started_at + self.timeout + self.visibility / 2)
                    assert message.visible_at <= cap + 1 + 2 * self.longest_rest


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# --- due() alone, over a whole life of a lease ---


def kept(
    lease: Lease, *, until: float, visibility: float, timeout: float | None, delay: float = 0.0
) -> list[tuple[float, float]]:
    """Let the keeper look whenever ``due`` asks for it; return (when, until when) of its extensions."""
    now, made = lease.received_at, []
    while now < until:
        first = min(visibility, 15.0)
        extensions, again = due(
            [lease], now, visibility=visibility, first=first, timeout=timeout, longest=MAX_VISIBILITY
        )
        for extension in extensions:
            assert lease.deadline >= now, "too late"
            lease = replace(lease, deadline=now + delay + extension.seconds, extended=True)
            made.append((now, lease.deadline))
        assert again > now
        now = again
    return made


FRESH = Lease(0, 1, LeaseState.RUNNING, Handle("q", "r", "m"), None, 1, 0, 0.0, 0.0, 0.0, 0.0, False, False)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(
    st.floats(2, 600) | st.sampled_from([2.0, 15.0, 60.0]),
    st.floats(0.01, 1000) | st.none(),
    st.floats(0, 20),
    st.floats(0, 1e6),
)
def test_a_lease_is_kept_to_its_cap_and_not_beyond(
    visibility: float, timeout: float | None, started: float, born: float
) -> None:
    first = min(visibility, 15.0)
    lease = replace(FRESH, received_at=born, deadline=born + first, started_at=born + min(started, first / 2))
    end = MAX_VISIBILITY if timeout is None or visibility >= 60 else 2000.0
    end = min(end, 200 * visibility)
    made = kept(lease, until=born + end, visibility=visibility, timeout=timeout)
    cap = math.inf if timeout is None else lease.started_at + timeout + visibility / 2
    last = max([lease.deadline, *(until for _, until in made)])
    # A minute is kept clear of SQS's own limit.
    assert last >= min(cap, born + end, born + MAX_VISIBILITY - 60) - 0.02
    assert last <= max(cap + 1, lease.deadline)
    assert last <= born + MAX_VISIBILITY
    # Half a visibility timeout apart, but for the last one.
    times = [when for when, _ in made]
    assert all(later - earlier >= visibility / 2 - 0.51 for earlier, later in itertools.pairwise(times[:-1]))
    assert len(made) <= 2 * (min(cap, born + end) - born) / (visibility - 1) + 3


def test_a_lease_found_past_its_cap_is_left_to_end() -> None:
    lease = replace(FRESH, deadline=15.0, started_at=1.0)
    assert due([lease], 120.0, visibility=60.0, first=15.0, timeout=5.0, longest=MAX_VISIBILITY)[0] == []
    # One that is only late, and has not reached its cap, is tried: its receipt may still be good.
    assert len(due([lease], 30.0, visibility=60.0, first=15.0, timeout=5.0, longest=MAX_VISIBILITY)[0]) == 1


# --- torn reads ---


def entry_of(number: int) -> tuple[Handle, str, tuple[int, int], tuple[float, float, float], float]:
    """Return handle, group, counts, times and start of the entry with that number: all of it tells which it is."""
    text = f"{number}."
    receipt = text * (1 + number * 7919 % (1024 // len(text)))
    handle = Handle("q1", receipt, f"m{number}" + "é" * (number % 50))
    return (
        handle,
        "g" * (1 + number % 128),
        (number, number // 2),
        (number + 0.25, number + 15.25, number / 3),
        number + 1.5,
    )


def rewrite_for_ever(board: Scoreboard, entries: int, started: Any) -> None:
    region = board.region(0)
    for number in itertools.count(1):
        index = number % entries
        handle, group, counts, times, start = entry_of(number)
        region.set_state(index, LeaseState.FREE)
        (receives, charges), (received_at, deadline, sent_at) = counts, times
        region.write(
            index, 1, handle, group, receives=receives, charges=charges, received_at=received_at, deadline=deadline,
            sent_at=sent_at,
        )  # fmt: skip
        region.start(index, start, 0, BODY)
        if number % 3:
            region.set_state(index, LeaseState.DONE)
        if number == entries:
            started.set()


def test_leases_rewritten_at_full_speed_are_read_whole_or_not_at_all() -> None:
    context = multiprocessing.get_context("fork")
    with closing(Scoreboard.create(1, 1)) as board:
        region = board.region(0)
        region.assign(0)
        started = context.Event()
        entries = 3
        writer = context.Process(target=rewrite_for_ever, args=(board, entries, started), daemon=True)
        writer.start()
        try:
            assert started.wait(60)
            seen: set[int] = set()
            whole = torn = turn = 0
            while turn < 60_000 or (len(seen) <= entries and writer.is_alive()):
                lease = region.read(turn % entries, ("q0", "q1"))
                turn += 1
                if lease is None:
                    torn += 1
                    continue
                whole += 1
                number = lease.receives
                handle, group, counts, times, start = entry_of(number)
                assert (lease.handle, lease.group, (lease.receives, lease.charges)) == (handle, group, counts)
                assert (lease.received_at, lease.deadline, lease.sent_at) == times
                assert lease.state in KEPT
                assert number % entries == lease.index
                if lease.state is not LeaseState.HELD:
                    assert lease.started_at == start
                assert not lease.extended
                assert not lease.lost
                seen.add(number)
            assert writer.is_alive()
            assert whole
            assert len(seen) > entries
        finally:
            writer.kill()
            writer.join(60)
            writer.close()


def test_a_lost_call_beside_the_one_left_is_no_proof_against_it() -> None:
    lost, left = replace(FRESH, lost=True), replace(FRESH, index=1)
    assert judge([lost, left], Cause.CRASH, None) == Judgement((left,), (), (), (lost, left))
    blame = [Blame(index, FRESH.generation, Cause.TIMEOUT) for index in range(2)]
    assert judge([lost, left], Cause.TIMEOUT, blame[0]) == Judgement((left,), (), (), ())
    assert judge([lost, left], Cause.TIMEOUT, blame[1]) == Judgement((), (), (left,), ())
    assert judge([lost, left], Cause.CUT, None) == Judgement((left,), (), (), ())


def test_nobody_of_a_batch_is_blamed_also_when_only_one_is_marked_yet() -> None:
    member = replace(FRESH, company=True)
    assert judge([member], Cause.CRASH, None) == Judgement((member,), (), (), (member,))
    blame = Blame(0, FRESH.generation, Cause.TIMEOUT)
    assert judge([member], Cause.TIMEOUT, blame) == Judgement((member,), (), (), (member,))
