"""``run(iterate=True)``: when a result counts as done, backpressure, every way to close it."""

import gc
import json
import os
import signal
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from sqspipes_mp import SQS, ConfigError, EmptyTaskOutput, Engine, OutputError, SqsPipesError, SupervisorLost, Task
from sqspipes_mp.brokers.base import Completion, Output
from sqspipes_mp.ipc import channel as control
from tests.gates import (
    Gate,
    Log,
    alive,
    charges,
    children,
    dead,
    direct_children,
    ended,
    engine_at,
    eventually,
    feed,
    kill,
    present,
    program,
    query,
    values,
    waiting,
)


def source():
    yield from ()


def may_be_fed(*values):
    yield from ()


def same(value):
    return value


def noted(value, log: Log):
    log.note(value)
    return value


def one_stage(db: Path, count: int, *args: object, method=noted, **settings: Any) -> Engine:
    engine = engine_at(db, [source, Task(method, name="work", args=args)], **settings)
    feed(engine, "work", list(range(count)))
    return engine


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_a_copied_hop_hides_no_result_where_the_queue_does_not_vouch_for_it(sqs: SQS, fifo: bool) -> None:
    engine = Engine([source, Task(same, name="work")], domain="t", broker=sqs, fifo=fifo)
    meta = {"id": "copied", "hop": "0a" * 32}
    # FIFO drops the second by its deduplication id, which is the hop.
    count = 1 if fifo else 3
    queue = engine.pipeline.stage("work").inputs[-1]
    sqs.check()
    with closing(sqs.open()) as connection:
        connection.ensure(engine.pipeline.queues, create=True)
        for value in range(3):
            body = json.dumps({"meta": meta, "value": value})
            connection.complete([Completion(None, (Output(queue, body, meta["hop"], meta["hop"] if fifo else None),))])
    with engine.run(iterate=True, only="work", until="drained", idle=0.0) as results:
        assert sorted(results) == list(range(count))


def test_break_gives_the_last_result_again_and_no_earlier_one(db: Path) -> None:
    engine = one_stage(db, 10, method=same)
    with engine.run(iterate=True, only="work") as results:
        first = [next(results) for _ in range(4)]
    assert len(first) == 4
    assert waiting(engine, "work") == (7, 0, 0)
    with engine.run(iterate=True, only="work", until="drained", idle=0.0) as results:
        second = list(results)
    assert first[-1] in second
    assert not set(first[:-1]) & set(second)
    assert sorted(first[:-1] + second) == list(range(10))


def test_an_exception_in_the_loops_body_loses_nothing(db: Path) -> None:
    engine = one_stage(db, 5, method=same)
    seen = []
    with pytest.raises(ZeroDivisionError), engine.run(iterate=True, only="work") as results:
        for value in results:
            seen.append(value)
            if len(seen) == 3:
                raise ZeroDivisionError
    assert waiting(engine, "work") == (3, 0, 0)
    assert sorted([*seen[:2], *values(engine, "work")]) == list(range(5))


def test_asking_for_the_next_one_acknowledges(db: Path) -> None:
    engine = one_stage(db, 2, method=same)
    results = engine.run(iterate=True, only="work", until="drained", idle=0.0)
    next(results)
    assert sum(waiting(engine, "work")) == 2
    next(results)
    eventually(lambda: sum(waiting(engine, "work")) == 1)
    with pytest.raises(StopIteration):
        next(results)
    assert sum(waiting(engine, "work")) == 0


def test_a_slow_caller_bounds_what_is_computed(db: Path, log: Log) -> None:
    engine = one_stage(db, 300, log)
    with engine.run(iterate=True, only="work") as results:
        next(results)
        # 16 unacknowledged, and the one whose call has ended but whose result has to wait.
        log.wait_for(17)
        # Nothing says that no more will come; so take ten more, and see that ten more were computed.
        for _ in range(10):
            next(results)
        assert len(log.wait_for(27)) == 27
    assert len(log.lines()) == 27
    assert waiting(engine, "work") == (290, 0, 0)


def streamed(value, log: Log):
    log.note(os.getpid())
    yield value


def test_a_generators_timeout_does_not_count_what_its_caller_takes(db: Path, log: Log) -> None:
    engine = engine_at(db, [source, Task(streamed, name="work", args=(log,), timeout=1.5)])
    feed(engine, "work", list(range(20)))
    with engine.run(iterate=True, only="work", until="drained", idle=0.0) as results:
        seen = [next(results)]
        # 16 unacknowledged, and one that is through and waits for room.
        log.wait_for(17)
        threading.Event().wait(2.5)
        seen += results
    assert sorted(seen) == list(range(20))
    assert len(set(log.lines())) == 1


def picky(value):
    if value == 1:
        raise ZeroDivisionError
    return value


def boards() -> int:
    """Count this process's scoreboards."""
    links = Path("/proc/self/fd").iterdir()
    return sum("memfd:sqspipes_mp" in str(link.readlink()) for link in links if link.is_symlink())


def test_an_error_that_is_kept_keeps_no_shared_memory(db: Path) -> None:
    before = boards()
    engine = one_stage(db, 2, method=picky)
    results = engine.run(iterate=True, only="work")
    assert boards() > before
    with pytest.raises(ZeroDivisionError) as kept:
        list(results)
    assert boards() == before, kept
    assert engine.stats()["work"].failed == 1
    engine.purge()
    feed(engine, "work", [0, 2])
    with engine.run(iterate=True, only="work") as left:
        next(left)
    assert boards() == before, left
    assert left.summary is not None


def test_close_ends_everything_and_next_says_stop(db: Path) -> None:
    results = one_stage(db, 5, method=same).run(iterate=True, only="work")
    next(results)
    with pytest.raises(SqsPipesError, match="read the results to their end, or close them"):
        _ = results.summary
    results.close()
    assert children() == []
    assert results.summary.reason == "closed"
    with pytest.raises(StopIteration):
        next(results)
    results.close()


def test_close_before_the_first_result(db: Path) -> None:
    engine = one_stage(db, 5, method=same)
    engine.run(iterate=True, only="work").close()
    assert waiting(engine, "work") == (5, 0, 0)


def test_losing_the_last_reference_closes(db: Path) -> None:
    engine = one_stage(db, 5, method=same)
    results = engine.run(iterate=True, only="work")
    next(results)
    del results
    gc.collect()
    assert children() == []
    assert waiting(engine, "work") == (5, 0, 0)


def test_close_waits_for_the_running_call(db: Path, log: Log, gate: Gate) -> None:
    engine = one_stage(db, 1, log, gate, method=gated)
    results = engine.run(iterate=True, only="work")
    log.wait_for(1)
    opener = threading.Thread(target=gate.open)
    opener.start()
    results.close()
    opener.join()
    assert log.lines() == ["begin", "end"]
    assert waiting(engine, "work") == (1, 0, 0)


def gated(value, log: Log, gate: Gate):
    log.note("begin")
    gate.wait()
    log.note("end")
    return value


OPEN_AT_EXIT = """
import sys
from tests.process.test_iterate import *
db, size = sys.argv[1:]
engine = engine_at(db, [source, Task(padded, name="work", args=(int(size),))])
results = engine.run(iterate=True, only="work")
print(next(results)[0])
"""


def padded(value, size: int):
    return value, b"x" * size


@pytest.mark.parametrize("size", [0, 500_000], ids=["small", "fills the pipes"])
def test_an_iterator_left_open_at_the_interpreters_end_is_closed(tmp_path: Path, db: Path, size: int) -> None:
    engine = one_stage(db, 30, method=same)
    with program(tmp_path, OPEN_AT_EXIT, db, size) as process:
        code, output, errors = ended(process)
    assert (code, output, errors) == (0, "0\n", "")
    assert waiting(engine, "work") == (30, 0, 0)


def test_results_of_any_size_all_arrive(db: Path) -> None:
    engine = one_stage(db, 40, 700_000, method=padded)
    with engine.run(iterate=True, only="work", until="drained", idle=0.0) as results:
        assert sorted((value, len(data)) for value, data in results) == [(n, 700_000) for n in range(40)]


def big_source():
    for number in range(20):
        yield number, b"x" * 700_000


def test_a_sources_results_of_any_size_all_arrive(db: Path) -> None:
    engine = engine_at(db, [big_source])
    for _ in range(3):
        with engine.run(iterate=True) as results:
            assert [number for number, _ in results] == list(range(20))
            assert results.summary.reason == "ended"


def nothing(value):
    return None


def test_none_is_a_result(db: Path) -> None:
    with one_stage(db, 3, method=nothing).run(iterate=True, only="work", until="drained", idle=0.0) as results:
        assert list(results) == [None, None, None]


def pair(value):
    return value, {"a": (1, 2)}, {3, 4}


def test_results_keep_their_types(db: Path) -> None:
    with one_stage(db, 1, method=pair).run(iterate=True, only="work", until="drained", idle=0.0) as results:
        assert list(results) == [(0, {"a": (1, 2)}, {3, 4})]


def unpicklable(value):
    return threading.Lock()


def test_an_output_that_cannot_be_pickled_is_an_output_error(db: Path) -> None:
    engine = one_stage(db, 1, method=unpicklable)
    with pytest.raises(OutputError, match=r"stage 'work'.*lock.*cannot be pickled") as caught:
        next(engine.run(iterate=True, only="work"))
    # The function has returned: no frame of the worker has anything to tell.
    assert not any("sqspipes_mp/worker" in str(entry.path) for entry in caught.traceback)
    assert waiting(engine, "work") == (1, 0, 0)


def numbers():
    yield from range(50)


def drops_two(value, log: Log, gate: Gate):
    log.note(value)
    if value == 0:
        gate.wait()
    return EmptyTaskOutput if value == 2 else value


def test_what_is_dropped_is_not_done_before_an_earlier_result_of_its_group(db: Path, log: Log, gate: Gate) -> None:
    task = Task(drops_two, name="work", args=(log, gate), group=lambda value: "g", prefetch=5)
    engine = engine_at(db, [source, task], fifo=True, start_method="fork")
    with engine.run(iterate=True, only="work") as results:
        for warm in (10, 11):
            feed(engine, "work", [warm], group=str(warm))
            assert next(results) == warm
        feed(engine, "work", [0], group="0")
        log.wait_for(3)
        # Now a receive asks for several: the group comes as one.
        feed(engine, "work", [1, 2, 3], group="g")
        gate.open()
        assert [next(results), next(results)] == [0, 1]
        log.wait_for(6)
        # Long enough for a wrong delete: the next one's result is on its way.
        eventually(lambda: results._ready or results._listen(0.05))
    assert values(engine, "work") == [1, 2, 3]
    with engine.run(iterate=True, until="drained", idle=0, only="work") as results:
        assert list(results) == [1, 3]
    assert values(engine, "work") == []


def test_an_output_too_large_for_the_caller_is_an_error(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqspipes_mp.worker.send.result_window.MAX_RESULT", 1000)
    engine = engine_at(db, [source, Task(long, name="work")], start_method="fork", on_error="reject")
    feed(engine, "work", [500, 5000, 600])
    with engine.run(iterate=True, only="work", until="drained", idle=0) as results:
        assert sorted(map(len, results)) == [500, 600]
    assert [letter.failure.error for letter in engine.dead_letters()] == ["MessageTooLarge"]


def long(value):
    return "x" * value


def test_a_source_alone_can_be_iterated(db: Path) -> None:
    with engine_at(db, [numbers]).run(iterate=True) as results:
        assert list(results) == list(range(50))
        assert present(results.summary)["numbers"].done == 50


def fan_out(value):
    for number in range(40):
        yield value, number


def test_more_results_of_one_input_than_fit_on_the_way_all_arrive(db: Path) -> None:
    engine = one_stage(db, 3, method=fan_out)
    with engine.run(iterate=True, only="work", until="drained", idle=0.0) as results:
        assert sorted(results) == [(value, number) for value in range(3) for number in range(40)]
    assert waiting(engine, "work") == (0, 0, 0)


def test_the_supervisors_death_is_an_error_and_takes_everything_along(db: Path, log: Log, gate: Gate) -> None:
    engine = one_stage(db, 3, log, gate, method=gated, visibility_timeout=2)
    results = engine.run(iterate=True, only="work")
    log.wait_for(1)
    supervisor = direct_children()
    below = [process.pid for process in psutil.Process(supervisor[0]).children(recursive=True)]
    assert len(below) == 2
    kill(supervisor[0])
    with pytest.raises(SupervisorLost, match=rf"^the supervisor \(pid {supervisor[0]}\) was lost, .*SIGKILL"):
        next(results)
    with pytest.raises(SqsPipesError, match="its end was an exception"):
        _ = results.summary
    eventually(lambda: not any(map(alive, below)))
    with pytest.raises(StopIteration):
        next(results)


def dies_once(value, log: Log):
    log.note(value)
    if value == 5 and log.lines().count(5) == 1:
        kill(os.getpid())
    return value


def test_a_workers_death_in_the_middle_costs_and_doubles_no_result(db: Path, log: Log) -> None:
    engine = one_stage(db, 12, log, method=dies_once)
    with engine.run(iterate=True, only="work", until="drained", idle=0.0) as results:
        assert sorted(results) == list(range(12))
    assert waiting(engine, "work") == (0, 0, 0)


def fails_at_5(value, log: Log):
    log.note(value)
    if value == 5:
        raise ValueError(value)
    return value


def test_before_a_functions_exception_nothing_is_handed_out_that_comes_again(db: Path, log: Log) -> None:
    engine = one_stage(db, 12, log, method=fails_at_5)
    seen = []
    results = engine.run(iterate=True, only="work")
    log.wait_for(6)
    # The supervisor itself may be through already.
    eventually(lambda: not any(direct_children(pid) for pid in direct_children() if alive(pid)))
    with pytest.raises(ValueError, match="5"):
        for value in results:
            seen.append(value)
    left = values(engine, "work")
    assert 5 in left
    assert set(seen) | set(left) == set(range(12))
    # What the caller has finished with is done; the last one it was given may come again.
    assert not set(seen[:-1]) & set(left)


@pytest.mark.parametrize("most", [1, 3])
def test_replaced_workers_wait_until_their_results_are_taken(db: Path, log: Log, most: int) -> None:
    engine = engine_at(db, [source, Task(noted, name="work", args=(log,), max_tasks_per_worker=most)])
    feed(engine, "work", list(range(7)))
    with engine.run(iterate=True, only="work", until="drained", idle=0.0) as results:
        assert sorted(results) == list(range(7))
    assert sorted(log.lines()) == list(range(7))
    assert waiting(engine, "work") == (0, 0, 0)


def test_a_replaced_worker_ends_on_close_too(db: Path, log: Log) -> None:
    engine = engine_at(db, [source, Task(noted, name="work", args=(log,), max_tasks_per_worker=2)])
    feed(engine, "work", list(range(7)))
    with engine.run(iterate=True, only="work") as results:
        next(results)
    assert waiting(engine, "work") == (7, 0, 0)


def counting(log: Log):
    log.note("call")
    return len(log.lines())


def test_a_replaced_function_source_loses_none_of_its_results(db: Path, log: Log) -> None:
    engine = engine_at(db, [Task(counting, args=(log,), max_tasks_per_worker=2)])
    with engine.run(iterate=True) as results:
        assert [next(results) for _ in range(9)] == list(range(1, 10))


def test_stop_from_a_thread_ends_the_iteration(db: Path, log: Log) -> None:
    engine = one_stage(db, 1, log)
    results = engine.run(iterate=True, only="work")
    next(results)
    threading.Timer(0.0, engine.stop).start()
    with pytest.raises(StopIteration):
        next(results)
    assert results.summary is not None


SIGNALLED = """
import sys
from tests.process.test_iterate import *
db, log = sys.argv[1:]
log = Log(log)
engine = engine_at(db, [source, Task(same, name="work")])
try:
    with engine.run(iterate=True, only="work") as results:
        for value in results:
            log.note(value)
    log.note("after", results.summary.reason)
except KeyboardInterrupt:
    log.note("interrupted")
"""


@pytest.mark.parametrize(
    ("number", "last"), [(signal.SIGTERM, ("after", "SIGTERM")), (signal.SIGINT, "interrupted")], ids=["TERM", "INT"]
)
def test_a_signal_ends_the_loop_cleanly(tmp_path: Path, db: Path, log: Log, number: int, last: object) -> None:
    engine = one_stage(db, 5, method=same)
    with program(tmp_path, SIGNALLED, db, log.path) as process:
        log.wait_for(5)
        eventually(lambda: waiting(engine, "work") == (0, 0, 0), "the fifth is done")
        process.send_signal(number)
        code, _, errors = ended(process)
        # The last call may not quite be over.
        unexpected = [line for line in errors.splitlines() if not line.startswith("stopping")]
        assert (code, unexpected) == (0, [])
    assert log.lines()[-1] == last
    # The loop was waiting for the sixth result, so the fifth is done.
    assert waiting(engine, "work") == (0, 0, 0)


INTERRUPTED = """
import sys
from tests.process.test_iterate import *
db, log, gate = sys.argv[1:]
log = Log(log)
engine = engine_at(db, [source, Task(blocked, name="work", args=(log, Gate(gate)))])
try:
    with engine.run(iterate=True, only="work") as results:
        log.note("inside")
        next(results)
except KeyboardInterrupt:
    log.note("interrupted")
"""


def blocked(value, log: Log, gate: Gate):
    log.note(value)
    gate.wait()
    return value


def test_a_second_ctrl_c_kills_what_still_runs(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    engine = one_stage(db, 1, log, gate, method=blocked)
    with program(tmp_path, INTERRUPTED, db, log.path, gate.path) as process:
        log.wait_for(2)
        pids = [child.pid for child in children(process.pid)]
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "calls that run (1) have 25 s to end; a second Ctrl-C kills them" in process.stderr.readline()
        # The first one waits for the running call, for up to 25 s; so send until the worker is gone.
        eventually(lambda: not any(map(alive, pids)) or process.send_signal(signal.SIGINT))
        ended(process)
    # A keeper that is killed for being late leaves it to the end of its lease.
    eventually(lambda: waiting(engine, "work") == (1, 0, 0), "it is back")
    assert charges(engine) == [0]


CLOSED_IN_A_THREAD = """
import sys, threading
from tests.process.test_iterate import *
db, log = sys.argv[1:]
engine = engine_at(db, [source, Task(same, name="work")])
results = engine.run(iterate=True, only="work")
thread = threading.Thread(target=results.close)
thread.start()
thread.join()
Log(log).note("closed")
signal.pause()
"""


def test_an_iterator_closed_in_another_thread_leaves_sigterm_deadly(tmp_path: Path, db: Path, log: Log) -> None:
    one_stage(db, 1, method=same)
    with program(tmp_path, CLOSED_IN_A_THREAD, db, log.path) as process:
        log.wait_for(1)
        process.terminate()
        assert ended(process)[0] == -signal.SIGTERM


def test_iterators_closed_in_any_order_put_the_signal_handler_back(tmp_path: Path) -> None:
    engines = [one_stage(tmp_path / f"{n}.db", 1, method=same) for n in range(3)]
    before = signal.getsignal(signal.SIGTERM)
    iterators = [engine.run(iterate=True, only="work") for engine in engines]
    for place in (1, 0, 2):
        iterators[place].close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_sigterm_stops_every_open_iterator(tmp_path: Path) -> None:
    engines = [one_stage(tmp_path / f"{n}.db", 1, method=same) for n in range(2)]
    iterators = [engine.run(iterate=True, only="work") for engine in engines]
    signal.raise_signal(signal.SIGTERM)
    assert [list(iterator) for iterator in iterators] == [[], []]


KILLED = """
import sys
from tests.process.test_iterate import *
db, log, gate = sys.argv[1:]
engine = engine_at(db, [source, Task(gated, name="work", args=(Log(log), Gate(gate)))])
for value in engine.run(iterate=True, only="work"):
    pass
"""


def test_a_callers_sigkill_leaves_no_process(tmp_path: Path, db: Path, log: Log, gate: Gate) -> None:
    one_stage(db, 2, method=same)
    with program(tmp_path, KILLED, db, log.path, gate.path) as process:
        log.wait_for(1)
        below = [child.pid for child in children(process.pid)]
        assert len(below) == 3
        process.kill()
        eventually(lambda: not any(map(alive, below)))
        told = ended(process)[2].splitlines()
    # The kernel may kill the supervisor before it says anything.
    assert {line.partition(":")[0] for line in told} <= {"stopping (the caller is gone)"}
    assert not [line for line in told if "to end" in line or "in time" in line]


def test_a_second_engine_may_iterate_at_the_same_time(db: Path, tmp_path: Path) -> None:
    first = one_stage(db, 3, method=same)
    second = one_stage(tmp_path / "other.db", 3, method=same)
    with (
        first.run(iterate=True, only="work", until="drained", idle=0.0) as ones,
        second.run(iterate=True, only="work", until="drained", idle=0.0) as others,
    ):
        assert sorted(zip(ones, others, strict=True)) == [(n, n) for n in range(3)]


def without_room(value):
    if not value:
        whole = control.pack

        def pack(kind, header, blob):
            # What Python does where the frame of a large result does not fit beside the result.
            if kind is control.Kind.RESULT:
                control.pack = whole
                raise MemoryError
            return whole(kind, header, blob)

        control.pack = pack  # type: ignore[assignment]
    return value


def test_a_result_for_which_there_is_no_memory_fails_its_message_and_nothing_waits_for_it(db: Path) -> None:
    work = Task(without_room, name="work", on_error="reject")
    engine = engine_at(db, [source, work])
    feed(engine, "work", range(4))
    with engine.run(only="work", until="drained", idle=0.0, iterate=True) as results:
        assert sorted(results) == [1, 2, 3]
    [(_, failure)] = dead(engine, "work")
    assert failure.error == "MemoryError"


def test_beside_an_open_iterator_its_stages_are_not_run_again(db: Path) -> None:
    engine = engine_at(db, [may_be_fed, Task(same, name="work")])
    feed(engine, "work", list(range(3)))
    results = engine.run(iterate=True, only="work", until="drained", idle=0.0)
    next(results)
    for again in (lambda: engine.run(until="drained"), lambda: engine.map([1]), lambda: engine.run(iterate=True)):
        with pytest.raises(ConfigError, match=r"got 'work'. Close that iterator first"):
            again()
    # Not a stage of the iterator's.
    assert engine.run(only="may_be_fed", until="drained", idle=0.0)["may_be_fed"].failed == 0
    results.close()
    lost = engine.run(iterate=True, only="work", until="drained", idle=0.0)
    del lost
    assert engine.run(only="work", until="drained", idle=0.0)["work"].done == 3


def test_what_waits_behind_a_slow_caller_is_not_received_over_and_over(db: Path) -> None:
    engine = one_stage(db, 200, method=same, visibility_timeout=2)
    with engine.run(iterate=True, only="work") as results:
        next(results)
        # Twice half a visibility timeout, after which what a worker holds unstarted goes back; and twice more.
        threading.Event().wait(2.2)
        (before,) = query(db, "SELECT sum(receives) FROM messages")
        threading.Event().wait(2.2)
        (after,) = query(db, "SELECT sum(receives) FROM messages")
    # What was held went back, and was not taken again.
    assert before == after
