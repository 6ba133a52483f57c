"""Leases are judged by a clock that goes on while the machine sleeps."""

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sqspipes_mp.brokers.base import Handle, Received
from sqspipes_mp.brokers.sqlite import session as sqlite_session
from sqspipes_mp.host import clock
from sqspipes_mp.ipc.leases import REGION_BYTES, LeaseState, LeaseTable
from sqspipes_mp.keeper.extend import due
from sqspipes_mp.worker import context as station
from sqspipes_mp.worker.receive import intake
from tests.unit.sqlite_bench import bodies, opened, send, take
from tests.unit.test_keeper_decisions import _LEASE

SLEPT = 300.0


@pytest.mark.skipif(sys.platform != "linux", reason="CLOCK_BOOTTIME is Linux's")
def test_the_clock_counts_sleep() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= clock.lease_now() <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= clock.lease_now_ns() / 1e9 <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_message_of_the_file_is_visible_after_a_sleep(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as connection:
        send(connection, "in", "a")
        (message,) = take(connection, "in", visibility=SLEPT - 1)
        assert message.leased_at is not None
        assert abs(clock.lease_now() - message.leased_at) < 60
        real = clock.lease_now_ns
        monkeypatch.setattr(sqlite_session, "lease_now_ns", lambda: real() + int(SLEPT * 1e9))
        assert bodies(connection, "in") == ["a"]


@pytest.mark.parametrize("fifo", [False, True])
def test_a_worker_that_wakes_holds_nothing_that_ran_out(fifo: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    region = LeaseTable(memoryview(bytearray(REGION_BYTES)), 0)
    now = clock.lease_now()
    region.write(
        0, 0, Handle("q", "r", "i"), None, receives=1, charges=0, received_at=now, deadline=now + 30, sent_at=0.0
    )
    one = SimpleNamespace(leases=region, fifo=fifo)
    delivery = SimpleNamespace(lease=0, until=now + 30)
    assert station.WorkerContext.holds(one, delivery)  # type: ignore[arg-type]
    monkeypatch.setattr(station, "lease_now", lambda: clock.lease_now() + SLEPT)
    assert not station.WorkerContext.holds(one, delivery)  # type: ignore[arg-type]


def received(leased_at: float | None) -> Received:
    return Received(Handle("q", "r", "i"), "{}", 1, 0, None, 0.0, leased_at=leased_at)


class Place:
    """A worker that could not take anything: nothing of it counts a message."""

    def __init__(self) -> None:
        self.stage = SimpleNamespace(name="work")
        self.fifo = False
        self.long_call_since = lambda then, seconds: False


@pytest.mark.parametrize("known", [False, True], ids=["a reply from afar", "the file's own word"])
def test_what_ran_out_on_its_way_is_not_begun(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    away = 0.0
    begun: list[object] = []

    def fetch(queues: object, count: int, wait: float) -> list[Received]:
        nonlocal away
        sent_at = clock.lease_now()
        away = SLEPT
        return [received(sent_at if known else None)]

    monkeypatch.setattr(intake, "lease_now", lambda: clock.lease_now() + away)
    monkeypatch.setattr(intake, "slept", lambda since, monotonic: away)
    one = SimpleNamespace(
        _context=Place(),
        _fetch=fetch,
        _lease=15.0,
        _ready=SimpleNamespace(put=begun.append),
        _came=lambda *_: None,
        _lock=threading.Lock(),
        _asked=1,
        _pause=SimpleNamespace(paused=False),
    )
    one._leased_at = intake.Intake._leased_at.__get__(one)
    one._take_in = intake.Intake._take_in.__get__(one)
    intake.Intake._receive(one, ["q"], 1, 0.0)  # type: ignore[arg-type]
    assert begun == []


def test_a_long_poll_has_an_end_however_long_its_answer_lay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    one = SimpleNamespace(_lease=15.0)
    sent_at = clock.lease_now()
    monkeypatch.setattr(intake, "lease_now", lambda: sent_at + 60)
    monkeypatch.setattr(intake, "slept", lambda since, monotonic: 0.0)
    began = intake.Intake._leased_at(one, [received(None)], sent_at, 0.0)  # type: ignore[arg-type]
    assert began == sent_at + intake.LONG_POLL
    assert sent_at + 60 > began + 15 * 3 / 4


def test_a_sleep_is_what_one_clock_counts_and_the_other_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    since, monotonic = clock.lease_now(), time.monotonic()
    assert clock.slept(since, monotonic) < 5
    monkeypatch.setattr(clock, "lease_now", lambda: since + (time.monotonic() - monotonic) + SLEPT)
    assert clock.slept(since, monotonic) == pytest.approx(SLEPT, abs=1)


def test_the_cap_of_a_call_counts_from_its_start_by_its_own_clock() -> None:
    lease = replace(_LEASE, state=LeaseState.RUNNING, received_at=1000.0, deadline=1015.0, started_at=100.0)
    (extension,), _ = due([lease], 1010.0, visibility=60.0, first=15.0, timeout=20.0, longest=None, ahead=900.0)
    assert extension.seconds == 40  # 100 + 20 + 60 / 2, seen from 110


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queues.db"
