"""A machine that slept: what was received before is judged by a clock that went on meanwhile, as the queue's did."""

import contextlib
import mmap
import signal
from dataclasses import replace

import pytest

from sqspipes_mp import SQS, Engine, Task
from sqspipes_mp.host import clock
from sqspipes_mp.ipc.leases import LeaseState
from sqspipes_mp.keeper import main as keeper_main
from sqspipes_mp.keeper.extend import due
from sqspipes_mp.worker import context
from sqspipes_mp.worker.receive import intake
from standin import StandIn
from tests.gates import Background, Gate, Log, direct_children, eventually, feed, kill
from tests.process.test_lost_leases import first_one_waits, sink, source
from tests.unit.test_keeper_decisions import _LEASE

#: Longer than SQS remembers deduplication ids, which would hide a second copy.
ASLEEP = 301


def test_after_a_sleep_nothing_is_sent_for_what_another_machine_has_completed(
    sqs: SQS, server: StandIn, log: Log, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shared by all processes that are forked from here.
    slept = mmap.mmap(-1, 8)
    real = clock.lease_now
    for module in (context, intake, keeper_main):
        monkeypatch.setattr(module, "lease_now", lambda: real() + int.from_bytes(slept[:8]))
    work = Task(first_one_waits, name="work", args=(log, gate))
    machines = [
        Engine([source, work, sink], domain="t", broker=sqs, fifo=True, start_method="fork", visibility_timeout=60)
        for _ in range(2)
    ]
    feed(machines[0], "work", [7])
    with Background(machines[0], only="work") as sleeper:
        log.wait_for(1)
        # It wakes later than its worker, and so does not see first that the lease is lost.
        keeper = direct_children()[0]
        kill(keeper, signal.SIGSTOP)
        with contextlib.ExitStack() as stack:
            stack.callback(kill, keeper, signal.SIGCONT)
            server.advance(ASLEEP)
            slept[:8] = ASLEEP.to_bytes(8)
            with Background(machines[1], only="work"):
                eventually(lambda: server.messages("t-source.fifo")[0]["deleted"], "the other machine completed it")
                machines[1].stop()
            assert len(server.messages("t-work.fifo")) == 1
            server.advance(ASLEEP)
            gate.open()
            machines[0].stop()
    assert len(server.messages("t-work.fifo")) == 1
    assert (log.lines(), sleeper.summary["work"].done) == (["ran", "ran"], 0)


def test_a_running_calls_lease_is_kept_until_its_timeout_though_the_machine_slept_before_it_began() -> None:
    # Monotonic 100 is 400 of the leases' clock: the machine has slept for 300 s since it was started.
    lease = replace(_LEASE, state=LeaseState.RUNNING, received_at=400.0, deadline=415.0, started_at=100.0)
    [extension], _ = due([lease], 410.0, visibility=60.0, first=15.0, timeout=20.0, longest=None, ahead=300.0)
    assert extension.seconds == 40
