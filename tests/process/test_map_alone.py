"""One map of a pipeline at a time, and never a result acknowledged that nobody was given."""

import contextlib
import gc
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import (
    Engine,
    MapIncomplete,
    MapRunning,
    QueuesNotEmpty,
    Reject,
    SQLite,
    SupervisorLost,
    Task,
    UnknownResult,
)
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from sqspipes_mp.caller.dead_letters import redrive
from sqspipes_mp.cli.exits import Exit, ending_of
from standin import StandIn
from standin.brokers import sqs_at
from tests.gates import (
    Gate,
    Log,
    alive,
    children,
    direct_children,
    ended,
    eventually,
    file_of,
    kill,
    program,
    values,
    waiting,
)

HOLDER = textwrap.dedent("""
    import os, subprocess, sys, threading
    from sqspipes_mp import Engine, MapRunning, SQLite, Task, SupervisorLost
    from tests.gates import Gate, Log

    def work(value, log, go):
        log.note(value, os.getpid())
        go.wait()
        return value

    def join(supervisor, log):
        # Stopped, and alone in its process group, it would be woken by SIGHUP and SIGCONT at our death (setpgid(2)).
        log.wait_for(1)
        os.setpgid(supervisor, os.getpgrp())

    def main():
        db, method, start, log, go, done = sys.argv[1:]
        log, go, done = Log(log), Gate(go), Log(done)
        engine = Engine([Task(work, input=True, workers=2, args=(log, go))], domain="t", broker=SQLite(db),
                        visibility_timeout=2, start_method=method.removesuffix("+thread"))
        Gate(start).wait()
        try:
            results = engine.map(range(60), key=str, resume=True)
        except MapRunning as error:
            done.note("refused", str(error))
            return
        done.note("began", os.getpid())
        if method.endswith("+thread"):
            threading.Thread(target=join, args=(results._child.pid, log)).start()
        try:
            for value in results:
                done.note("got", value)
        except SupervisorLost:
            done.note("lost")
            # It has let go.
            for value in engine.map(range(60), key=str, resume=True):
                done.note("got", value)

    if __name__ == "__main__":
        if sys.argv[2].endswith("+thread"):
            # What a thread forks does not die with it.
            thread = threading.Thread(target=main)
            thread.start()
            thread.join()
        else:
            main()
""")


def same(value):
    return value


def recorded(value, log):
    log.note(value)
    return value


def work(value, log, go):
    return value


def engine_at(db: Path) -> Engine:
    return Engine([Task(work, input=True, args=(None, None))], domain="t", broker=SQLite(db), visibility_timeout=2)


def refused(db: Path, pid: int) -> None:
    """See that a map, a purge and a delete are refused, and told who is at it."""
    engine = engine_at(db)
    for call in (lambda: engine.map([1], key=str), engine.purge, engine.delete):
        with pytest.raises(
            MapRunning, match=rf"pid {pid}( with its supervisor \d+)? on .* since \d{{4}}-.* UTC"
        ) as caught:
            call()
    assert ending_of(caught.value).code is Exit.FAILED


def got(done: Log) -> list[int]:
    return sorted(line[1] for line in done.lines() if isinstance(line, tuple) and line[0] == "got")


def caller_of(done: Log) -> int:
    return done.wait_for(1)[0][1]


def holders(path: str, pids: list[int]) -> set[int]:
    """Return which of the processes have the file open."""
    found = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if str(fd.readlink()) == path:
                        found.add(pid)
    return found


def test_of_two_that_start_together_one_is_refused(
    db: Path, tmp_path: Path, log: Log, new_gate: Callable[[], Gate]
) -> None:
    start, go = new_gate(), new_gate()
    done = Log(str(tmp_path / "done"))
    arguments = (db, "fork", start.path, log.path, go.path, done.path)
    with program(tmp_path, HOLDER, *arguments) as first, program(tmp_path, HOLDER, *arguments) as second:
        start.open()
        lines = done.wait_for(2)
        [pid] = [line[1] for line in lines if line[0] == "began"]
        [text] = [line[1] for line in lines if line[0] == "refused"]
        assert pid in (first.pid, second.pid)
        assert "map() of 't' must be alone" in text
        refused(db, pid)
        go.open()
        for process in (first, second):
            assert ended(process)[0] == 0
    assert got(done) == list(range(60))
    assert list(engine_at(db).map(range(60), key=str, resume=True)) == []
    assert Path(f"{db}-t.lock").read_text() == ""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn", "fork+thread"])
def test_a_stopped_holder_holds_and_only_caller_and_supervisor_do(
    db: Path, tmp_path: Path, log: Log, new_gate: Callable[[], Gate], method: str
) -> None:
    start, go = new_gate(), new_gate()
    start.open()
    done = Log(str(tmp_path / "done"))
    with program(tmp_path, HOLDER, db, method, start.path, log.path, go.path, done.path) as process:
        pid = caller_of(done)
        log.wait_for(2)
        family = [child.pid for child in children(pid)]
        workers = {line[1] for line in log.lines()}
        [supervisor] = holders(f"{db}-t.lock", family)
        assert supervisor not in workers
        assert holders(f"{db}-t.lock", [pid, *family]) == {pid, supervisor}
        for each in (pid, supervisor):
            os.kill(each, signal.SIGSTOP)
        refused(db, pid)
        for each in (pid, supervisor):
            os.kill(each, signal.SIGCONT)
        go.open()
        assert ended(process)[0] == 0
    assert got(done) == list(range(60))


@pytest.mark.parametrize("method", ["forkserver", "fork+thread"])
def test_the_supervisor_holds_it_when_the_caller_alone_is_killed(
    db: Path, tmp_path: Path, log: Log, new_gate: Callable[[], Gate], method: str
) -> None:
    start, go = new_gate(), new_gate()
    start.open()
    done = Log(str(tmp_path / "done"))
    with program(tmp_path, HOLDER, db, method, start.path, log.path, go.path, done.path) as process:
        pid = caller_of(done)
        log.wait_for(2)
        family = [child.pid for child in children(pid)]
        [supervisor] = holders(f"{db}-t.lock", family)
        if method == "fork+thread":
            eventually(lambda: os.getpgid(supervisor) == os.getpgid(pid))
        # Else it would end within moments.
        os.kill(supervisor, signal.SIGSTOP)
        kill(pid)
        process.wait()
        assert alive(supervisor)
        refused(db, pid)
        os.kill(supervisor, signal.SIGCONT)
        eventually(lambda: not any(alive(each) for each in family))
    before = got(done)
    after = list(engine_at(db).map(range(60), key=str, resume=True))
    assert sorted(set(before) | set(after)) == list(range(60))


def test_a_caller_that_is_killed_with_its_supervisor_leaves_no_lock(
    db: Path, tmp_path: Path, log: Log, new_gate: Callable[[], Gate]
) -> None:
    start, go = new_gate(), new_gate()
    start.open()
    done = Log(str(tmp_path / "done"))
    with program(tmp_path, HOLDER, db, "fork", start.path, log.path, go.path, done.path) as process:
        pid = caller_of(done)
        log.wait_for(2)
        family = [child.pid for child in children(pid)]
        # The kernel takes a forked supervisor with it.
        kill(pid)
        process.wait()
        eventually(lambda: not any(alive(each) for each in family))
        # Its words are still there, and count for nothing.
        assert f"pid {pid} " in Path(f"{db}-t.lock").read_text()
        assert sorted(engine_at(db).map(range(60), key=str, resume=True)) == list(range(60))


def test_the_caller_holds_it_when_the_supervisor_alone_is_killed(db: Path) -> None:
    results = engine_at(db).map(range(60), key=str, resume=True)
    first = next(results)
    supervisor = direct_children()[0]
    kill(supervisor)
    eventually(lambda: not alive(supervisor))
    refused(db, os.getpid())
    with pytest.raises(SupervisorLost):
        list(results)
    again = list(engine_at(db).map(range(60), key=str, resume=True))
    assert {first, *again} == set(range(60))
    engine_at(db).purge()


def test_what_the_user_forks_does_not_hold_it(db: Path, gate: Gate) -> None:
    results = engine_at(db).map(range(5), key=str)
    next(results)
    child = os.fork()
    if child == 0:
        try:
            gate.wait()
        finally:
            os._exit(0)
    try:
        # It closes it among its first steps.
        eventually(lambda: not holders(f"{db}-t.lock", [child]))
        assert alive(child)
        results.close()
        engine_at(db).purge()
    finally:
        gate.open()
        os.waitpid(child, 0)


def test_whatever_ends_it_the_next_one_may_begin(db: Path) -> None:
    def broken():
        yield 1
        raise ZeroDivisionError

    engine = engine_at(db)
    engine.put(1)
    with pytest.raises(QueuesNotEmpty):
        engine.map([1])
    engine.purge()
    lock = Path(f"{db}-t.lock")
    inode = lock.stat().st_ino
    with pytest.raises(ZeroDivisionError):
        list(engine.map(broken()))
    engine.purge()
    results = engine.map(range(500))
    next(results)
    del results
    gc.collect()
    engine.purge()
    other = Engine([Task(same, input=True)], domain="other", broker=SQLite(db))
    with engine.map(range(500)) as results:
        next(results)
        assert list(other.map([1])) == [1]
        other.purge()
    engine.delete()
    assert children() == []
    # With another file those that have opened this one and those that come would not exclude each other.
    assert lock.stat().st_ino == inode


def test_the_lock_of_a_temporary_file_goes_with_it() -> None:
    engine = Engine([Task(same, input=True)], domain="t", broker="sqlite://")
    with engine.map(range(3), ordered=True) as results:
        folder = Path(file_of(engine)).parent
        assert (folder / "queues.db-t.lock").exists()
        assert list(results) == [0, 1, 2]
    del engine, results
    gc.collect()
    assert not folder.exists()


# --- never acknowledged unless handed out ---


def test_what_others_put_meanwhile_goes_back_and_ends_it(db: Path) -> None:
    engine = Engine([Task(same, input=True)], domain="t", broker=SQLite(db))

    def source():
        yield 1
        engine.put("a stranger's")
        yield from range(2, 3_000)

    with pytest.raises(
        UnknownResult, match=r"a result of the message [0-9a-f]{64} came, which this map neither fed"
    ) as caught:
        list(engine.map(source()))
    assert isinstance(caught.value, MapIncomplete)
    assert len(caught.value.id) == 64
    assert "a stranger's" in values(engine, "same")
    assert children() == []


def test_on_sqs_too(server: StandIn) -> None:
    server.reset()
    engine = Engine([Task(same, input=True)], domain="alone", broker=sqs_at(server.url))

    def source():
        yield 1
        engine.put("a stranger's")
        yield from range(2, 3_000)

    with pytest.raises(UnknownResult):
        list(engine.map(source()))
    with engine.run(iterate=True) as results:
        assert "a stranger's" in results


def rejects_once(value, log: Log):
    log.note(value)
    if value == 0 and log.lines().count(0) == 1:
        raise Reject("once")
    return value


def test_a_dead_letter_redriven_into_its_own_map_is_not_swallowed(db: Path, log: Log) -> None:
    engine = Engine([Task(rejects_once, input=True, args=(log,))], domain="t", broker=SQLite(db))

    def source():
        yield 0
        while not redriven:
            yield 1
        yield from range(2, 1_000)

    redriven = []
    found = []
    for item in engine.map(source(), return_exceptions=True):
        found.append(item)
        if isinstance(item, Reject):
            redriven.append(eventually(lambda: redrive(engine.pipeline, engine.broker, None).letters))
    # Its error was handed out; its result is, too.
    assert found.count(0) == 1
    assert sorted(each for each in found if isinstance(each, int) and each > 1) == list(range(2, 1_000))
    assert values(engine, "rejects_once") == []


class Fussy:
    """Cannot be unpickled at the first try."""

    def __init__(self, log: Log, kind: type[BaseException]) -> None:
        self.log, self.kind = log, kind

    def __reduce__(self):
        return load, (self.log, self.kind)


def load(log: Log, kind: type[BaseException]):
    log.note("load")
    if len(log.lines()) == 1:
        raise kind
    return "loaded"


def fussy(value, log: Log, kind: type[BaseException]):
    return Fussy(log, kind)


def test_after_an_interrupted_read_the_next_run_hands_out_the_result(db: Path, log: Log) -> None:
    engine = Engine([Task(fussy, input=True, args=(log, KeyboardInterrupt))], domain="t", broker=SQLite(db))
    results = engine.map([1])
    with pytest.raises(KeyboardInterrupt):
        next(results)
    with pytest.raises(MapIncomplete):
        next(results)
    with engine.run(iterate=True, until="drained", idle=0.0) as again:
        assert list(again) == ["loaded"]


def test_a_result_that_could_not_be_read_is_handed_out_by_the_next_run(db: Path, log: Log) -> None:
    engine = Engine([Task(fussy, input=True, args=(log, LookupError))], domain="t", broker=SQLite(db))
    engine.put(1)
    with engine.run(iterate=True, until="drained", idle=0.0) as results, pytest.raises(LookupError):
        next(results)
    with engine.run(iterate=True, until="drained", idle=0.0) as results:
        assert list(results) == ["loaded"]


@pytest.mark.parametrize("stages", [1, 2])
def test_results_that_come_while_their_batch_is_being_sent_are_handed_out(
    db: Path, log: Log, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    real = SQLiteConnection.feed

    def feed(self: SQLiteConnection, outputs: Any, *, keyed: bool, wanted: Any = None) -> list[int]:
        if wanted is None or len(outputs) < 10:
            return real(self, outputs, keyed=keyed, wanted=wanted)
        half = len(outputs) // 2
        first = real(self, outputs[:half], keyed=keyed, wanted=wanted)
        # The second half has to wait, for a lock, say: the first one's results come meanwhile.
        log.wait_for(half)
        eventually(lambda: wanted() and len(results._deferred or ()) >= half)
        return first + [half + place for place in real(self, outputs[half:], keyed=keyed, wanted=wanted)]

    monkeypatch.setattr(SQLiteConnection, "feed", feed)
    last = Task(recorded, name="last", args=(log,), input=stages == 1 or None)
    tasks = [last] if stages == 1 else [Task(same, name="first", input=True), last]
    results: Any = Engine(tasks, domain="t", broker=SQLite(db), start_method="fork").map(range(10))
    assert sorted(results) == list(range(10))


# --- what can be resumed ---


@pytest.mark.parametrize("ordered", [False, True])
def test_leftovers_without_a_key_are_not_resumed(db: Path, ordered: bool) -> None:
    engine = Engine([Task(same, name="first", input=True), same], domain="t", broker=SQLite(db), visibility_timeout=2)
    results = engine.map(range(100, 130))
    next(results)
    results.close()
    with pytest.raises(QueuesNotEmpty, match=r"without a key.*resume=True.*Finish them with run.*purge\(\)$") as caught:
        engine.map(range(5), key=str, resume=True, with_input=True, ordered=ordered)
    assert caught.value.count in (29, 30)
    assert children() == []
    engine.run(until="drained", idle=0.0)
    found = list(engine.map(range(5), key=str, resume=True, with_input=True, ordered=ordered))
    assert sorted(found) == [(n, n) for n in range(5)]


def test_of_what_was_put_only_what_has_a_key_is_resumed(db: Path) -> None:
    engine = Engine([Task(same, input=True)], domain="t", broker=SQLite(db))
    engine.put(1, key="1")
    engine.put("later", key="later")
    assert list(engine.map([1, 2], key=str, resume=True, with_input=True, ordered=True)) == [
        (1, 1),
        (2, 2),
        (None, "later"),
    ]
    engine.put(3, key="3")
    engine.put("no key")
    with pytest.raises(QueuesNotEmpty, match=r"^1 message is .*with the 1 of the interrupted map, too") as caught:
        engine.map([3], key=str, resume=True)
    assert caught.value.count == 1


# --- in order, past what waits ---

BLOCKED = textwrap.dedent("""
    import sys
    from sqspipes_mp import Engine, SQLite, Task
    from tests.gates import Gate, Log

    def first(value, log, gate):
        if value == 0:
            log.note(value)
            gate.wait()
        return value

    def second(value, log, gate):
        log.note(value)
        gate.wait()
        return value

    if __name__ == "__main__":
        extra = (Log(sys.argv[2]), Gate(sys.argv[3]))
        engine = Engine([Task(first, input=True, workers=2, args=extra), Task(second, args=extra)], domain="t",
                        broker=SQLite(sys.argv[1]), visibility_timeout=6)
        for value in engine.map(range(1_000), key=str, ordered=True, resume=True):
            pass
""")


def first(value, *_):
    return value


def second(value, *_):
    return value


def test_in_order_a_killed_workers_lease_is_waited_for_at_the_limit(
    db: Path, tmp_path: Path, log: Log, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that one gulp goes far past the limit, however much the killed workers held.
    monkeypatch.setattr("sqspipes_mp.caller.map._CHUNK", 400)
    with program(tmp_path, BLOCKED, db, log.path, gate.path) as process:
        engine = Engine(
            [Task(first, input=True, workers=2), second], domain="t", broker=SQLite(db), visibility_timeout=6
        )
        # The value 0 is held in the first stage. Others wait in the queue of the second one, which no lease hides.
        log.wait_for(2)
        eventually(lambda: waiting(engine, "second")[0] > 0)
        family = [process.pid, *[child.pid for child in children(process.pid)]]
        for pid in family:
            kill(pid)
        process.wait()
        eventually(lambda: not any(alive(pid) for pid in family[1:]))
    found = list(engine.map(range(1_000), key=str, ordered=True, resume=True))
    assert found == list(range(1_000))


@pytest.mark.parametrize("asked", [{"ordered": True}, {"with_input": True}, {"ordered": True, "with_input": True}])
def test_new_values_before_those_that_were_left(db: Path, asked: dict[str, bool]) -> None:
    engine = Engine([Task(same, input=True)], domain="t", broker=SQLite(db), visibility_timeout=2)
    results = engine.map(range(150), key=str, ordered=True)
    next(results)
    results.close()
    # More than one run may have on the way, and some that no iterable comes to.
    engine.put_many(range(1_000, 1_060), key=str)

    def source():
        yield from range(2_000, 2_700)
        yield {"not", "JSON"}
        yield from range(150)

    found = list(engine.map(source(), key=str, resume=True, return_exceptions=True, **asked))
    if "with_input" in asked:
        assert all(value in (given, None) for value, given in found if not isinstance(given, BaseException))
        found = [given for _, given in found]
    numbers = [item for item in found if isinstance(item, int)]
    assert len(found) == len(numbers) + 1
    wanted = [*range(2_000, 2_700), *range(150), *range(1_000, 1_060)]
    if 0 not in numbers:
        wanted.remove(0)
    if "ordered" in asked:
        assert numbers == wanted
    assert sorted(numbers) == sorted(wanted)
