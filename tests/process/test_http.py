"""A run's HTTP process: what it tells, to whom, and that nothing that happens to it, or to the engine, goes wrong."""

import contextlib
import ctypes
import http.client
import json
import logging
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from sqspipes_mp import SQS, ConfigError, Engine, Task, current_message
from sqspipes_mp.ipc.running.folders import engines
from sqspipes_mp.ipc.running.memory import open_memory
from sqspipes_mp.observer.metrics import METRICS
from standin import StandIn
from standin.brokers import sqs_at
from tests.credential_server import serving
from tests.gates import Background, Gate, Log, children, engine_at, eventually, feed, kill, present, program, values

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "registry"
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(folder))
    return folder


class Server:
    """A client of one server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        try:
            connection.request(
                method, path, body or None, {name.replace("_", "-"): text for name, text in headers.items()}
            )
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def status(self, path: str) -> int:
        return self.ask(path)[0]

    def json(self, path: str) -> Any:
        return json.loads(self.ask(path)[2])

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Return each sample, as a strict parser reads it."""
        _, headers, text = self.ask("/metrics", Accept=OPENMETRICS)
        assert headers["content-type"].startswith("application/openmetrics-text")
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics().get((name, tuple(sorted({"domain": "t", **labels}.items()))))


def served() -> Server:
    """Return the server of the one engine that is registered, once it answers."""
    found: list[Server] = []

    def look() -> bool:
        address = [engine.text("http") for engine in engines()]
        with contextlib.suppress(OSError):
            found[:] = [Server(one) for one in address if Server(one).status("/livez") == 200]
        return len(found) == 1

    eventually(look, "an engine serves HTTP")
    return found[0]


def observers() -> list[psutil.Process]:
    """Return the HTTP processes below this one."""
    return [each for each in children() if is_observer(each)]


def is_observer(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "sqspipes_mp.observer" in " ".join(process.cmdline())
    return False


def source() -> Iterator[object]:
    yield from ()


def sink(value: object) -> object:
    return value


def held(value: object, gate: Gate, log: Log) -> object:
    current_message().progress(0.25, f"<b>at {value}")
    log.note(value)
    gate.wait()
    return value


def test_it_tells_numbers_to_all_and_everything_to_who_has_the_token(
    db: Path, gate: Gate, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQSPIPES_HTTP_TOKEN", "a token")
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    feed(engine, "work", ["x"])
    with Background(engine, only="work", http="127.0.0.1:0") as run:
        log.wait_for(1)
        server = served()
        eventually(lambda: server.status("/readyz") == 200, "it is ready")
        assert server.json("/healthz")["why"] == "every stage is ready"

        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            status, headers, _ = server.ask(path)
            assert (status, headers["content-type"].partition(";")[0]) == (200, kind)

        seen = server.json("/api/state")
        (worker,) = seen["workers"]
        (call,) = worker["calls"]
        assert call["fraction"] == 0.25
        assert set(call) == {"age", "fraction"}
        text = json.dumps(seen)
        # The notes and their commands are made of what is shown.
        assert seen["verdict"] == {"tone": "good", "told": "every stage is ready"}
        for hidden in ("at x", '"pid"', '"run"', '"target"', '"caller"', '"folder"'):
            assert hidden not in text

        status, headers, raw = server.ask("/api/state", Authorization="Bearer a token")
        assert status == 200
        (call,) = json.loads(raw)["workers"][0]["calls"]
        assert call["text"] == "<b>at x"
        assert call["id"]
        # No browser takes it for a page.
        assert "<" not in raw
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in headers["content-security-policy"]

        assert server.ask("/api/state", Authorization="Bearer another")[0] == 401
        assert server.ask("/api/state", Authorization="Basic a token")[0] == 401
        order = b'{"do": "stop"}'
        assert server.ask("/api/order", "POST", order)[0] == 401
        assert server.ask("/api/order", "POST", order, Authorization="Bearer guess")[0] == 401
        assert server.ask("/api/order?token=a%20token", "POST", order)[0] == 401

        def ordered(body: bytes, method: str = "POST") -> tuple[int, dict[str, str], str]:
            return server.ask("/api/order", method, body, Authorization="Bearer a token")

        for nonsense in (b"", b"[]", b'{"do": 1}', b'{"do": "statistics"}', b"[" * 9000, b'"' + b"x" * 20_000):
            assert ordered(nonsense)[0] == 400
        assert ordered(b'{"do": "fly"}')[0] == 409
        assert ordered(b"", "GET")[0] == 405
        assert server.ask("/nothing")[0] == 404
        told = json.loads(ordered(b'{"do": "stack", "stage": "work"}')[2])
        assert "in wait" in told["stacks"][0]["stack"]
        assert told["told"] == "stacks of 1 worker"
        ordered(b'{"do": "pause", "stage": "work"}')
        eventually(lambda: server.json("/api/state")["notes"], "it is told")
        (note,) = server.json("/api/state")["notes"]
        assert (note["told"], note["command"]) == ("work is paused", "sqspipes-mp resume t --stage work")
        ordered(b'{"do": "resume", "stage": "work"}')
        assert "this engine" in json.loads(ordered(order)[2])["reach"]
        # It answers for as long as a worker is there.
        eventually(lambda: server.json("/readyz")["why"] == "the run is ending", "it drains")
        assert server.status("/livez") == 200
        assert server.json("/api/state")["stages"][0]["running"] == 1
        gate.open()
    assert run.summary.reason == "stopped"
    assert run.summary["work"].done == 1


def test_another_host_is_refused_and_other_interfaces_see_metrics_and_health_alone(
    db: Path, gate: Gate, log: Log
) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    with Background(engine, only="work", http="127.0.0.1:0"):
        server = served()
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[::1]evil", ""):
            assert server.ask("/metrics", Host=host)[0] == 421, host
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:80", "[::1]"):
            assert server.ask("/metrics", Host=host)[0] == 200, host
        engine.stop()
    with Background(engine, only="work", http=":0"):
        server = served()
        for path in ("/metrics", "/livez", "/readyz"):
            assert server.ask(path, Host="somewhere.example")[0] in {200, 503}, path
        for path in ("/", "/page.js", "/api/state"):
            status, _, text = server.ask(path, Host="somewhere.example")
            assert (status, "SQSPIPES_HTTP_TOKEN" in text) == (403, True)
        assert server.ask("/api/order", "POST", b'{"do": "stop"}')[0] == 401
        engine.stop()


def test_every_metric_is_there_with_its_labels(db: Path, gate: Gate, log: Log) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log), priorities=2), sink])
    feed(engine, "work", ["a", "b", "c"])
    with Background(engine, only="work", until="drained", idle=0, http="127.0.0.1:0"):
        log.wait_for(1)
        server = served()
        where = {"stage": "work"}
        # What nobody has counted is absent, not 0. The first scrape has the keeper count the queues.
        assert server.metric("sqspipes_dead_letters", **where) is None
        eventually(lambda: server.metric("sqspipes_dead_letters", **where) == 0, "dead letters are counted")
        queued = {"priority": "0", **where}
        eventually(
            lambda: (
                (
                    server.metric("sqspipes_queue_messages", state="waiting", **queued),
                    server.metric("sqspipes_queue_messages", state="in_flight", **queued),
                )
                in {(2, 1), (1, 2), (0, 3)}
            ),
            "what waits is counted",
        )
        seen = server.metrics()
        assert server.metric("sqspipes_workers", state="busy", **where) == 1
        assert server.metric("sqspipes_running_calls", **where) == 1
        assert server.metric("sqspipes_workers_wanted", **where) == 1
        # SQLite has one way only.
        assert server.metric("sqspipes_engine_info", broker=engine.broker.describe(), transport="") == 1
        begun = present(server.metric("sqspipes_oldest_call_start_timestamp_seconds", **where))
        assert begun == pytest.approx(time.time(), abs=120)
        names = {name for name, _ in seen}
        for metric in METRICS:
            suffix = "_bucket" if metric.kind == "histogram" else ""
            found = [dict(labels) for name, labels in seen if name == metric.name + suffix]
            assert found, metric.name
            for labels in found:
                assert set(labels) - {"le"} == set(metric.labels), metric.name
        assert not any("created" in name for name in names)
        gate.open()
    assert engines() == []


def counted(value: int, log: Log) -> int:
    log.note(value)
    until = time.monotonic() + 0.002
    while time.monotonic() < until:
        pass
    return value


def test_counters_never_go_back_and_stay_below_the_ledger_while_everything_is_killed(
    db: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQSPIPES_HTTP_TOKEN", "a token")
    engine = engine_at(db, [source, Task(counted, name="work", args=(log,), workers=2), sink], on_error="retry")
    total, kills = 1200, 6
    feed(engine, "work", list(range(total)))
    back: list[str] = []
    last: dict[Any, float] = {}

    def look(server: Server) -> dict[Any, float]:
        now = server.metrics()
        gauges = {metric.name for metric in METRICS if metric.kind in {"gauge", "info"}}
        for key, value in last.items():
            if key[0] not in gauges and now.get(key, 0.0) < value:
                back.append(f"{key}: {value} -> {now.get(key)}")
        last.clear()
        last.update(now)
        return now

    with Background(engine, only="work", http="127.0.0.1:0"):
        server = served()
        for number in range(kills):
            log.wait_for(min(total, 100 * (number + 1)))
            look(server)
            state = json.loads(server.ask("/api/state", Authorization="Bearer a token")[2])
            ours = {each.pid for each in children() if not is_observer(each)}
            workers = {worker["pid"] for worker in state["workers"]} & ours
            others = ours - workers
            # A keeper that was killed five times before it was ready would end the run.
            victims = others if number % 3 == 1 else workers
            for pid in sorted(victims)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    kill(pid)
        # The HTTP process as well: what it tells is not its own.
        kill(observers()[0].pid)
        eventually(lambda: len(set(values(engine, "sink"))) == total, "everything is done")
        server = served()
        done = ("sqspipes_messages_total", (("domain", "t"), ("outcome", "done"), ("stage", "work")))
        eventually(lambda: (a := look(server)[done]) and a == look(server)[done], "it has settled")
        seen = look(server)
        restarts = sum(value for (name, _), value in seen.items() if name == "sqspipes_worker_restarts_total")
        assert restarts >= 1
        engine.stop()
    assert back == []
    # A kill between the deletes of a batch and their count loses that batch's count.
    assert total - kills * 200 <= seen[done] <= total
    # First deliveries alone have waited.
    waits = seen["sqspipes_queue_wait_seconds_count", (("domain", "t"), ("stage", "work"))]
    assert total - kills * 200 <= waits <= total
    assert sorted(values(engine, "sink")) == list(range(total))


def keeps_the_gil(value: int, log: Log) -> int:
    log.note(value)
    ctypes.PyDLL(None).usleep(4_000_000)
    return value


def test_workers_in_c_code_that_keep_the_gil_are_live_and_ready(db: Path, log: Log) -> None:
    engine = engine_at(db, [source, Task(keeps_the_gil, name="work", args=(log,), workers=2), sink])
    feed(engine, "work", [1, 2])
    with Background(engine, only="work", http="127.0.0.1:0") as run:
        log.wait_for(2)
        server = served()
        # The supervisor may not have heard yet that they are ready.
        eventually(lambda: server.status("/readyz") == 200, "it is ready")
        while (seen := server.json("/api/state"))["stages"][0]["running"] == 2:
            assert (server.status("/livez"), server.status("/readyz")) == (200, 200)
            assert seen["stages"][0]["oldest_call"] > 0
            threading.Event().wait(0.5)
        eventually(lambda: len(values(engine, "sink")) == 2, "both are done")
        engine.stop()
    assert run.summary["work"].done == 2


PROGRAM = """
import sys
from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.supervisor import http_process, vitals
from tests.gates import Gate, Log
from tests.process.test_http import held
vitals.BEAT_EVERY, http_process.SILENCE = 0.1, 2.0
task = Task(held, input=True, args=(Gate(sys.argv[2]), Log(sys.argv[3])))
engine = Engine([task], broker=SQLite(sys.argv[1]), domain="t")
engine.put("x")
engine.run(http="127.0.0.1:0")
"""


def test_a_supervisor_that_stands_still_is_not_live_and_one_that_is_killed_leaves_nothing(
    tmp_path: Path, db: Path, gate: Gate, log: Log
) -> None:
    with program(tmp_path, PROGRAM, db, gate.path, log.path) as process:
        log.wait_for(1)
        server = served()
        for number in (signal.SIGINT, signal.SIGTERM):
            (observer,) = [each for each in children(process.pid) if is_observer(each)]
            observer.send_signal(number)
        kill(process.pid, signal.SIGSTOP)
        eventually(lambda: server.status("/livez") == 503, "it is not live")
        assert "supervisor has not moved" in server.json("/livez")["why"]
        assert server.status("/readyz") == 503
        # Its state is there all the same.
        assert server.json("/api/state")["stages"][0]["running"] == 1
        kill(process.pid, signal.SIGCONT)
        eventually(lambda: server.status("/livez") == 200, "it is live again")
        # The process has ignored the signals above.
        assert observer.is_running()
        kill(process.pid)
        process.wait()

        def gone() -> bool:
            try:
                server.status("/livez")
            except OSError:
                return True
            return False

        # A worker that kept a copy of the socket would keep the port.
        eventually(gone, "nobody listens")
        eventually(lambda: not observer.is_running() or observer.status() == psutil.STATUS_ZOMBIE, "it has ended")
        gate.open()


def test_it_is_live_while_the_broker_is_away(server: StandIn, gate: Gate, log: Log) -> None:
    server.reset()
    engine = Engine(
        [source, Task(held, name="work", args=(gate, log)), sink],
        domain="t", broker=sqs_at(server.url), start_method="fork",
    )  # fmt: skip
    feed(engine, "work", ["x"])
    with Background(engine, only="work", http="127.0.0.1:0"):
        log.wait_for(1)
        observer = served()
        server.pause()
        try:
            gate.open()
            until = time.monotonic() + 3
            while time.monotonic() < until:
                assert observer.status("/livez") == 200, observer.ask("/livez")
                threading.Event().wait(0.3)
        finally:
            server.resume()
        eventually(lambda: observer.metric("sqspipes_messages_total", outcome="done", stage="work") == 1, "it is done")
        assert present(observer.metric("sqspipes_broker_requests_total", operation="receive")) > 0
        assert observer.metric("sqspipes_engine_info", broker=engine.broker.describe(), transport="fast") == 1
        engine.stop()


def test_a_taken_port_is_an_error_where_it_was_asked_for_and_a_warning_where_the_environment_says_so(
    db: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_at(db, [source, Task(sink, name="work")])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ConfigError, match=f"run.http. must be an address that is free.*'{address}'"):
            engine.run(only="work", until="drained", idle=0, http=address)
        with pytest.raises(ConfigError, match="an address that is free"):
            list(engine.run(only="work", until="drained", idle=0, http=address, iterate=True))
        assert time.monotonic() - began < 30
        monkeypatch.setenv("SQSPIPES_HTTP", address)
        with caplog.at_level(logging.WARNING, "sqspipes_mp.supervisor"):
            assert engine.run(only="work", until="drained", idle=0).reason == "drained"
        (told,) = [each for each in caplog.messages if "SQSPIPES_HTTP" in each]
        assert told.startswith(f"SQSPIPES_HTTP={address}: ")
    assert children() == []


def test_an_address_that_is_none_is_refused_before_anything_starts(db: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.http. must be HOST:PORT"):
        engine_at(db, [source, sink]).run(http="8090")
    assert not db.exists()


def test_what_is_missing_is_said_with_the_command_that_installs_it(
    db: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = engine_at(db, [source, sink])
    with monkeypatch.context() as without:
        without.setattr("sqspipes_mp.caller.http.find_spec", lambda name: None if name == "uvicorn" else name)
        with pytest.raises(ConfigError, match=r"uvicorn cannot be imported.*pip install 'sqspipes_mp\[http\]'"):
            engine.run(http="localhost:0")
    monkeypatch.setenv("SQSPIPES_HTTP_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="SQSPIPES_HTTP_TOKEN_FILE must be a file with a token"):
        engine.run(http="localhost:0")


def test_silence_garbage_and_floods_disturb_neither_probes_nor_the_run(db: Path, gate: Gate, log: Log) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    feed(engine, "work", list(range(20)))
    with contextlib.ExitStack() as opened, Background(engine, only="work", http="127.0.0.1:0") as run:
        log.wait_for(1)
        server = served()
        host, _, port = server.address.partition(":")
        random_ = random.Random(5)
        for number in range(300):
            sock = opened.enter_context(socket.create_connection((host, int(port)), timeout=60))
            with contextlib.suppress(OSError):
                if number % 3 == 1:
                    sock.send(random_.randbytes(300))
                elif number % 3 == 2:
                    sock.send(b"POST /api/order HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n{")
        # More than it takes at once: the oldest that send nothing have made room.
        assert server.status("/livez") == 200

        def flood() -> None:
            for _ in range(40):
                with contextlib.suppress(OSError):
                    server.ask(random_.choice(["/metrics", "/api/state", "/livez", "/x" * 3000]))

        threads = [threading.Thread(target=flood) for _ in range(8)]
        for thread in threads:
            thread.start()
        gate.open()
        for thread in threads:
            thread.join()
        eventually(lambda: len(values(engine, "sink")) == 20, "everything is done")
        engine.stop()
    assert run.summary["work"].done == 20
    assert sorted(map(str, values(engine, "sink"))) == sorted(map(str, range(20)))


def test_a_process_that_dies_is_started_again_and_its_last_words_are_logged(
    db: Path, gate: Gate, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    with (
        caplog.at_level(logging.WARNING, "sqspipes_mp.supervisor"),
        Background(engine, only="work", http="localhost:0"),
    ):
        server = served()
        (first,) = observers()
        kill(first.pid)
        # It may accept until the kernel has ended it.
        eventually(lambda: first.pid not in {each.pid for each in observers()}, "it is dead")
        # The socket is the supervisor's, so nobody is turned away meanwhile.
        assert server.status("/livez") == 200
        (second,) = observers()
        assert second.pid != first.pid
        engine.stop()
    (told,) = [each for each in caplog.messages if "the HTTP process" in each]
    assert "(pid" in told
    assert "restart in 0.5 s" in told
    assert children() == []


def test_a_process_that_cannot_be_started_is_a_warning_and_the_run_goes_on(
    db: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_at(db, [source, Task(sink, name="work"), sink])
    feed(engine, "work", [1])
    monkeypatch.setattr("sqspipes_mp.supervisor.http_process.spawn.get_executable", lambda: "/no/python")
    with caplog.at_level(logging.WARNING, "sqspipes_mp.supervisor"):
        assert engine.run("work", until="drained", idle=0, http="localhost:0")["work"].done == 1
    assert any("the HTTP process could not be started: " in each for each in caplog.messages)


#: Looks as a person does, and then keeps the statistics mapped until its standard input closes.
READER = """
import sys
from sqspipes_mp.cli.main import main
from sqspipes_mp.cli.top.watch import Watch
assert main(["top", "--once", "--json"]) == main(["top", "--once"]) == main(["ps"]) == 0
watch = Watch(None)
assert watch.look().state
print("looked", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a process's memory is in /proc on Linux alone")
def test_no_secret_is_in_the_memory_environment_or_output_of_who_looks(
    server: StandIn, gate: Gate, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.reset()
    secret = secrets.token_hex(20)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with contextlib.ExitStack() as stack:
        url, given = stack.enter_context(serving(3600, secret=secret))
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", f"{secret}-too")
        task = Task(held, name="work", args=(gate, log))
        engine = Engine([source, task, sink], domain="t", broker=SQS("us-east-1", endpoint_url=server.url))
        feed(engine, "work", ["x"])
        stack.enter_context(Background(engine, only="work", http="localhost:0"))
        log.wait_for(1)
        client = served()
        told = [client.ask(path)[2] for path in ("/metrics", "/livez", "/readyz", "/api/state", "/")]
        (observer,) = observers()
        with subprocess.Popen(
            [sys.executable, "-c", READER],
            env={name: text for name, text in os.environ.items() if not name.startswith("AWS_")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as reader:
            assert reader.stdin is not None
            assert reader.stdout is not None
            for line in iter(reader.stdout.readline, "looked\n"):
                assert line
                told.append(line)
            looking = psutil.Process(reader.pid)
            memories = [(each, mapped(each)) for each in (observer, looking)]
            for each, areas in memories:
                assert {area.name for area in areas if "memfd:" in area.name} == {"/memfd:sqspipes_mp-statistics"}
                assert {area.rights for area in areas if "memfd:" in area.name} == {"r--s"}
                assert [name for name in each.environ() if name.startswith("AWS_")] == []
            files = [str(path.readlink()) for path in Path(f"/proc/{observer.pid}/fd").iterdir()]
            kept = [name for name in files if not name.startswith(("socket:", "anon_inode:", "/dev/null"))]
            # The map's own copy, read-only as the map, and the file of its errors.
            assert len(kept) == 2, kept
            assert any(name.startswith("/memfd:sqspipes_mp-statistics") for name in kept), kept
            assert not any(secret in text for text in told)
            (engine_,) = engines()
            statistics = open_memory(engine_)
            assert secret.encode() not in bytes(statistics.view)
            statistics.close()
            (worker,) = json.loads(told[5])["workers"]
            try:
                # The worker has it of the wallet.
                assert secret.encode() in memory_of(psutil.Process(worker["pid"]))
                for each, _ in memories:
                    memory = memory_of(each)
                    assert b"sqspipes_messages_total" in memory or each is looking
                    assert secret.encode() not in memory
            except PermissionError:
                pytest.skip("this user may not read the memory of its own processes")
            finally:
                reader.stdin.close()
        gate.open()
        engine.stop()
    assert given


@dataclass(frozen=True)
class Area:
    """A part of a process's memory."""

    start: int
    end: int
    rights: str
    name: str


def mapped(process: psutil.Process) -> list[Area]:
    found = []
    for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
        where, rights, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(each, 16) for each in where.split("-"))
        found.append(Area(start, end, rights, "".join(name).removesuffix(" (deleted)")))
    return found


def memory_of(process: psutil.Process) -> bytes:
    found = bytearray()
    with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as memory:
        for area in mapped(process):
            if area.rights.startswith("r") and not area.name.startswith("[v"):
                with contextlib.suppress(OSError, ValueError):
                    memory.seek(area.start)
                    found += memory.read(area.end - area.start)
    return bytes(found)


SERVED = """
import sys
from sqspipes_mp import Engine, SQLite, Task
from tests.gates import Gate, Log
from tests.process.test_http import held
def engine(domain, path, gate, log):
    task = Task(held, name="work", input=True, args=(Gate(gate), Log(log)))
    return Engine([task], broker=SQLite(path), domain=domain)
if __name__ == "__main__":
    made = engine(*sys.argv[1:])
    made.put(sys.argv[1])
    made.run()
"""


def test_one_server_serves_all_engines_of_this_user_as_they_come_and_go(tmp_path: Path, gate: Gate, log: Log) -> None:
    with contextlib.ExitStack() as running:

        def start(domain: str) -> "subprocess.Popen[str]":
            where = tmp_path / domain
            where.mkdir()
            return running.enter_context(program(where, SERVED, domain, where / "q.db", gate.path, log.path))

        serving = running.enter_context(program(tmp_path, SERVE))
        assert serving.stderr is not None
        line = serving.stderr.readline()
        server = Server(line.partition("http://")[2].strip().rstrip("/"))
        assert server.json("/livez")["why"] == "no engine runs here"
        assert server.status("/livez") == 503
        first, _ = start("one"), start("two")
        log.wait_for(2)
        eventually(lambda: server.status("/readyz") == 200 and len(server.json("/readyz")["engines"]) == 2, "two live")
        assert server.status("/api/state") == 409
        assert server.json("/api/state?engine=two")["engine"]["domain"] == "two"
        assert server.ask("/api/state?engine=three")[0] == 404
        requests = {"domain": "one", "operation": "receive"}
        before = present(server.metric("sqspipes_broker_requests_total", **requests))
        first.terminate()
        gate.open()
        eventually(lambda: len(server.json("/livez")["engines"]) == 1, "one has ended")
        # A sum that fell would pass for a restart, and the whole of it for new.
        assert present(server.metric("sqspipes_broker_requests_total", **requests)) >= before
        # Answers are used again for half a second.
        wanted = {"domain": "one", "stage": "work"}
        eventually(lambda: server.metric("sqspipes_workers_wanted", **wanted) is None, "its gauges are gone")
        assert server.json("/api/state")["engine"]["domain"] == "two"
        serving.terminate()
        assert serving.wait(60) == 0


SERVE = """
import sys
from sqspipes_mp.cli.main import main
sys.exit(main(["serve", "--http", "127.0.0.1:0"]))
"""
