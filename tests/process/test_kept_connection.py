"""The connection that ``put`` keeps: one client for many calls, none of it in a child, or after half a minute.

What is counted are clients and sockets, never time.
"""

import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from sqspipes_mp import BrokerError, Engine, SQLite, Task
from sqspipes_mp.brokers.sqs import SQS
from sqspipes_mp.caller import kept_connection
from standin import StandIn
from standin.brokers import sqs_at
from tests.gates import eventually, waiting


def work(value: object) -> None:
    pass


def engine_with(broker: object) -> Engine:
    return Engine([Task(work, input=True)], domain="t", broker=broker)  # type: ignore[arg-type]


@pytest.fixture(params=["lean", "boto3"])
def sqs(request: pytest.FixtureRequest, server: StandIn) -> SQS:
    server.reset()
    return sqs_at(server.url, lean=request.param == "lean")


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pids of the processes that have opened a connection, each time they did."""
    found: list[int] = []
    for broker in (SQS, SQLite):
        monkeypatch.setattr(broker, "open", _noting(broker.open, found))
    return found


def _noting(opening: Callable[..., object], found: list[int]) -> Callable[..., object]:
    def open_(*args: object, **settings: object) -> object:
        found.append(os.getpid())
        return opening(*args, **settings)

    return open_


def sockets(server: StandIn) -> set[int]:
    """Return the local ports of this process's connections to the stand-in."""
    port = urlsplit(server.url).port
    process = psutil.Process()
    # psutil 5 has another name for it.
    look = getattr(process, "net_connections", None) or process.connections
    return {each.laddr.port for each in look("tcp") if each.raddr and each.raddr.port == port}


def in_child(look: Callable[[], object]) -> str:
    """Return the text of what a forked child has found."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        told = "nothing"
        try:
            told = str(look())
        except BaseException as error:
            told = repr(error)
        finally:
            os.write(writing, told.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    return told


def test_many_calls_share_one_connection(server: StandIn, sqs: SQS, opens: list[int]) -> None:
    engine = engine_with(sqs)
    for value in range(10):
        engine.put(value)
    ports = sockets(server)
    engine.put_many(range(10))
    assert engine.stats()["work"].visible == 20
    assert len(opens) == 1
    assert ports
    assert ports <= sockets(server)
    engine.close()
    assert not sockets(server)
    engine.put(0)
    assert len(opens) == 2


def test_sixteen_threads_put_at_once(server: StandIn, sqs: SQS, opens: list[int]) -> None:
    engine = engine_with(sqs)
    gathered = threading.Barrier(16)

    def put(value: int) -> str:
        gathered.wait()
        for _ in range(4):
            engine.put(value)
        return engine.put(value)

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(put, range(16)))) == 16
    assert len(opens) == 1
    assert len(sockets(server)) <= 2 * 16
    assert engine.stats()["work"].visible == 80


def test_a_connection_that_rested_is_not_used_again(
    server: StandIn, sqs: SQS, opens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(sqs)
    engine.put(0)
    before, threads = sockets(server), threading.active_count()
    monkeypatch.setattr(kept_connection, "IDLE", 0.0)
    engine.put(0)
    assert not before & sockets(server)
    assert len(opens) == 2
    assert threading.active_count() == threads


def test_a_run_forks_without_it(server: StandIn, sqs: SQS, opens: list[int]) -> None:
    engine = engine_with(sqs)
    engine.put(0)
    before = sockets(server)
    assert engine.run(until="drained", idle=0.0)["work"].done == 1
    assert not sockets(server)
    assert before
    engine.put(0)
    assert opens.count(os.getpid()) == 2


def test_the_next_call_after_an_error_begins_anew(server: StandIn, sqs: SQS, opens: list[int]) -> None:
    engine = engine_with(sqs)
    engine.put(0)
    server.plan("SendMessageBatch", "denied")
    with pytest.raises(BrokerError):
        engine.put(1)
    engine.put(2)
    assert len(opens) == 2


def test_a_child_has_no_copy_and_a_connection_of_its_own(server: StandIn, sqs: SQS, opens: list[int]) -> None:
    engine = engine_with(sqs)
    engine.put(0)
    before = sockets(server)

    def look() -> object:
        inherited = sockets(server)
        engine.put(1)
        mine = sockets(server)
        engine.close()
        return inherited, bool(mine), mine & before, sockets(server), opens.count(os.getpid())

    assert in_child(look) == str((set(), True, set(), set(), 1))
    engine.put(2)
    # The server has heard no goodbye: the parent's sockets go on.
    assert before <= sockets(server)
    assert len(opens) == 1
    assert engine.stats()["work"].visible == 3


def test_a_fork_while_another_thread_puts(server: StandIn, sqs: SQS) -> None:
    engine = engine_with(sqs)
    engine.put(0)
    idle = sockets(server)
    server.pause()
    with ThreadPoolExecutor(2) as pool:
        try:
            # The second has a new socket: the idle one is taken.
            puts = [pool.submit(engine.put, value) for value in (1, 2)]
            eventually(lambda: len(sockets(server)) > len(idle), "two puts are under way")
            inherited = in_child(lambda: sockets(server))
        finally:
            server.resume()
        assert inherited == str(set())
        told = in_child(lambda: engine.put(3))
        assert len(told) == 32, told
        assert len({put.result() for put in puts}) == 2
    assert engine.stats()["work"].visible == 4


def test_a_file_is_opened_once_and_anew_where_it_was_moved(tmp_path: Path, opens: list[int]) -> None:
    engine = engine_with(SQLite(tmp_path / "t.db"))
    for value in range(5):
        engine.put(value)
    assert waiting(engine, "work") == (5, 0, 0)
    assert len(opens) == 1
    for file in tmp_path.iterdir():
        file.unlink()
    engine.put(0)
    assert waiting(engine, "work") == (1, 0, 0)
    assert in_child(lambda: (engine.put(1), waiting(engine, "work"))[1]) == "(2, 0, 0)"
    engine.put(2)
    assert waiting(engine, "work") == (3, 0, 0)


def test_an_engine_with_a_connection_is_pickled_without_it(tmp_path: Path) -> None:
    engine = engine_with(SQLite(tmp_path / "t.db"))
    engine.put(1)
    pickle.loads(pickle.dumps(engine)).put(2)
    assert waiting(engine, "work") == (2, 0, 0)
