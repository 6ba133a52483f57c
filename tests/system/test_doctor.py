"""doctor: each check tells of a trouble that is really there, changes nothing, and is silent where all is well."""

import io
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import Engine, Reject, SQLite, Task
from sqspipes_mp.brokers.examined import Examined, ExaminedQueue
from sqspipes_mp.cli.doctor import cost
from sqspipes_mp.cli.doctor.command import diagnose
from sqspipes_mp.cli.doctor.facts import Facts, Machine, Place
from sqspipes_mp.cli.doctor.findings import Level
from sqspipes_mp.cli.doctor.gather import gather, machine, place_of, running
from sqspipes_mp.cli.main import main
from sqspipes_mp.engine import plan_run
from standin import StandIn
from standin.asking import connect
from standin.brokers import sqs_at
from tests.gates import ROOT, Background, engine_at, eventually

UNSHARE = shutil.which("unshare") or ""
GIB = 1 << 30
#: A machine without trouble.
SOUND = Machine(
    python="3.11.7", system="linux", threads=(), unloadable=None, cpus=8, quota=None, memory=16 * GIB, contained=False,
    own_memory=40 << 20, files=(10, 1024), processes=None,
)  # fmt: skip


def work(value: object) -> object:
    return value


def later(value: object) -> object:
    return value


def waits(value: object) -> object:
    select.select((), (), (), 0.1)
    return value


def refuses(value: object) -> object:
    raise Reject(f"not {value}")


def finish(engine: Engine) -> None:
    engine.run(until="drained", idle=0.0)
    engine.close()


def plan_of(engine: Engine, **options: Any) -> Any:
    return plan_run(engine, **options)


def facts_of(engine: Engine, **changes: Any) -> Facts:
    """Return facts of a sound machine; the rest as it is found."""
    found = gather("words:engine", plan_of(engine), engine.broker)
    place = None if found.place is None else replace(found.place, kind="ext4", free=10 * GIB, free_files=None)
    return replace(found, **{"machine": SOUND, "place": place, **changes})


def troubles(facts: Facts) -> dict[str, Level]:
    """Return the checks that do not find all well."""
    return {one.check: one.level for one in diagnose(facts) if one.level is not Level.OK}


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(tmp_path / "registry"))


@dataclass
class Cli:
    """The command line in this process, on a module of its own."""

    folder: Path

    def write(self, text: str) -> str:
        """Write a module and return its target."""
        name = f"doctored_{len(list(self.folder.glob('*.py')))}_{self.folder.name.replace('-', '_')}"
        (self.folder / f"{name}.py").write_text(f"from sqspipes_mp import *\n{text}\n")
        return f"{self.folder / name}.py:engine"

    def ask(self, *words: str) -> tuple[int, str]:
        out = io.StringIO()
        with redirect_stdout(out):
            code = main(["doctor", *words])
        return code, out.getvalue()

    def found(self, *words: str) -> dict[str, str]:
        """Return the levels by check; the exit code is that of the worst."""
        code, text = self.ask(*words, "--json")
        levels = {one["check"]: one["level"] for one in json.loads(text)["findings"]}
        assert code == int("fail" in levels.values())
        return levels


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    import logging  # noqa: PLC0415

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield Cli(tmp_path)
    root.handlers[:] = handlers
    root.setLevel(level)


# -- all is well ------------------------------------------------------------------------------------------------------


def test_it_is_silent_where_all_is_well(db: Path) -> None:
    engine = engine_at(db, [Task(work, input=True), later])
    assert troubles(facts_of(engine)) == {}
    assert not db.exists()
    engine.put(1)
    finish(engine)
    assert troubles(facts_of(engine)) == {}


def test_it_changes_no_file(cli: Cli) -> None:
    target = cli.write('engine = Engine([Task(len, name="work", input=True)], domain="d", broker="sqlite:///d.db")')
    engine = Engine([Task(len, name="work", input=True)], domain="d", broker=SQLite("d.db"))

    def seen() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in cli.folder.iterdir() if path.is_file()}

    before = seen()
    code, text = cli.ask(target)
    assert seen() == before
    assert "the first run creates 2" in text
    engine.put([1])
    engine.close()
    before = seen()
    assert cli.ask(target)[0] == code
    assert seen() == before


# -- the machine ------------------------------------------------------------------------------------------------------


def test_a_full_disk_in_memory(cli: Cli) -> None:
    """In a mount namespace of its own, where the file is on a tmpfs of one MiB."""
    (cli.folder / "full").mkdir()
    mount = f"mount -t tmpfs -o size=1m none {cli.folder}/full"
    target = cli.write('engine = Engine([Task(len, name="w", input=True)], domain="d", broker="sqlite:///full/d.db")')

    def inside(command: str) -> "subprocess.CompletedProcess[str]":
        words = [UNSHARE, "-rm", "sh", "-c", command]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(words, capture_output=True, text=True, check=False, env=environ)

    if not UNSHARE or inside(mount).returncode:
        pytest.skip("no file system can be mounted here")
    done = inside(f"{mount} && exec {sys.executable} -m sqspipes_mp doctor --json {target}")
    levels = {one["check"]: one["level"] for one in json.loads(done.stdout)["findings"]}
    assert (done.returncode, levels["disk"], levels["file"]) == (1, "fail", "warn")


def test_a_disk_without_room_for_files(db: Path) -> None:
    place = Place(folder="/q", kind="ext4", free=10 * GIB, free_files=0)
    assert troubles(facts_of(engine_at(db, [Task(work, input=True)]), place=place)) == {"disk": "fail"}


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_network_file_system(db: Path, kind: str) -> None:
    folder = str(db.parent).replace("a", r"\141")
    mounts = f"1 0 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {folder} rw - {kind} host:/export rw\n"
    found = place_of(str(db.parent), {"/proc/self/mountinfo": mounts}.get)
    assert found.kind == kind
    assert (
        troubles(facts_of(engine_at(db, [Task(work, input=True)]), place=replace(found, free=10 * GIB)))["file"]
        == "fail"
    )


def test_a_temporary_file() -> None:
    assert troubles(facts_of(Engine([Task(work, input=True)], domain="t", broker=SQLite()))) == {"file": "warn"}


def test_a_lambda_under_forkserver(cli: Cli) -> None:
    tasks = 'Engine([Task(lambda value: value, name="work", input=True)], domain="d", broker="sqlite:///d.db"'
    assert cli.found(cli.write(f'engine = {tasks}, start_method="forkserver")'))["start method"] == "fail"
    assert cli.found(cli.write(f"engine = {tasks})"))["start method"] == "ok"


def test_threads_that_the_import_starts(cli: Cli) -> None:
    target = cli.write(
        "import threading\nend = threading.Event()\nthread = threading.Thread(target=end.wait)\nthread.start()\n"
        'engine = Engine([Task(lambda value: value, name="work", input=True)], domain="d", broker="sqlite:///d.db")'
    )
    try:
        assert cli.found(target)["start method"] == "warn"
    finally:
        sys.modules[Path(target.rpartition(":")[0]).stem].end.set()
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join()


def test_a_system_without_fork(db: Path) -> None:
    other = replace(SOUND, system="darwin", unloadable="PicklingError: a lambda")
    assert troubles(facts_of(engine_at(db, [Task(work, input=True)]), machine=other)) == {
        "python": "warn",
        "start method": "fail",
    }


def cgroups(**files: str) -> Callable[[str], str | None]:
    """Return a reader of a machine with cgroup v2."""
    base = "/sys/fs/cgroup/box/"
    return {
        "/proc/self/cgroup": "0::/box\n",
        "/proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
        **{f"{base}{name.replace('_', '.')}": text for name, text in files.items()},
    }.get


@pytest.mark.parametrize(
    ("files", "check", "level"),
    [
        ({"memory_max": f"{256 << 20}\n", "memory_current": "1\n"}, "memory", "fail"),
        ({"cpu_max": "5000 100000\n"}, "cpus", "warn"),
        ({"pids_max": "40\n", "pids_current": "9\n"}, "processes", "fail"),
    ],
)
def test_workers_that_do_not_fit_into_the_control_group(
    db: Path, files: dict[str, str], check: str, level: str
) -> None:
    engine = engine_at(db, [Task(work, input=True, workers=16)])
    plan = plan_of(engine)
    limited = machine(plan, engine.broker, cgroups(**files))
    wide = cgroups(memory_max=f"{64 * GIB}\n", memory_current="1\n", cpu_max="max 100000\n", pids_max="max\n")
    free = machine(plan, engine.broker, wide)
    # Of this process, the rest is the test machine's.
    known: dict[str, Any] = {"threads": (), "unloadable": None, "own_memory": 30 << 20, "files": (10, 1024)}
    assert troubles(facts_of(engine, machine=replace(free, cpus=16, **known))) == {}
    assert troubles(facts_of(engine, machine=replace(limited, cpus=16, **known))) == {check: level}


def test_memory_as_measured_counts_more_than_the_declaration(db: Path) -> None:
    engine = engine_at(db, [Task(work, input=True, workers=4, max_memory="8GiB")])
    assert troubles(facts_of(engine)) == {"memory": "warn"}
    workers = [worker(memory=1 << 30), worker(memory=None)]
    assert troubles(facts_of(engine, state={**figures(), "workers": workers})) == {}
    workers = [worker(memory=5 << 30)]
    assert troubles(facts_of(engine, state={**figures(), "workers": workers})) == {"memory": "fail"}


def test_more_workers_than_cpus(db: Path) -> None:
    engine = engine_at(db, [Task(work, input=True, workers=40)])
    assert troubles(facts_of(engine)) == {"cpus": "warn"}


def test_too_few_open_files(cli: Cli) -> None:
    target = cli.write(
        'engine = Engine([Task(len, name="work", input=True, workers=99)], domain="d", broker="sqlite:///d.db")'
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    try:
        assert cli.found(target)["open files"] == "fail"
        assert cli.found(target, "--workers", "2")["open files"] == "ok"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- the queues -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sqs(server: StandIn) -> StandIn:
    server.reset()
    server.keys(key="")
    return server


def pipeline(sqs: StandIn, *tasks: Any, **settings: Any) -> Engine:
    return Engine(list(tasks) or [Task(work, input=True), later], domain="t", broker=sqs_at(sqs.url), **settings)


def test_sqs_is_only_asked(sqs: StandIn) -> None:
    engine = pipeline(sqs)
    assert troubles(facts_of(engine)) == {}
    assert set(sqs.ledger()["requests"]) == {"GetQueueUrl"}
    engine.put(1)
    finish(engine)
    sqs._ask("reset", {})
    found = facts_of(engine)
    assert troubles(found) == {}
    assert "testing" not in repr(found.examined)
    assert found.examined.credentials == "explicit"
    assert set(sqs.ledger()["requests"]) <= {"GetQueueUrl", "GetQueueAttributes"}


def test_fewer_requests_than_the_distance_may_ask_for(sqs: StandIn) -> None:
    engine = pipeline(sqs)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        found = facts_of(engine)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert troubles(found) == {"open files": "warn"}


def test_a_clock_that_is_off(sqs: StandIn) -> None:
    engine = pipeline(sqs)
    sqs.advance(3600)
    try:
        found = facts_of(engine)
    finally:
        sqs.advance(-3600)
    assert found.examined.clock_ahead == pytest.approx(3600, abs=60)
    assert troubles(found) == {"clock": "fail"}
    behind = replace(found, examined=replace(found.examined, clock_ahead=-40.0))
    assert troubles(behind) == {"clock": "warn"}


def test_queues_with_other_attributes(sqs: StandIn) -> None:
    client = connect(sqs.url)
    client.create_queue(QueueName="t-later--dead", Attributes={"MessageRetentionPeriod": "86400"})
    client.create_queue(QueueName="t-work", Attributes={"MessageRetentionPeriod": "345600", "VisibilityTimeout": "60"})
    client.create_queue(QueueName="theirs", Attributes={"MaximumMessageSize": "2048"})
    client.close()
    found = diagnose(facts_of(pipeline(sqs)))
    seen = {one.check: one.seen for one in found if one.level is not Level.OK}
    assert set(seen) == {"attributes", "retention"}
    assert "keeps messages 4 days, not 14" in seen["attributes"]
    assert "ReceiveMessageWaitTimeSeconds is 0, not 20" in seen["attributes"]
    assert seen["retention"].startswith("t-later--dead keeps messages 1 days, t-work 4")


def test_a_queue_of_others(sqs: StandIn) -> None:
    engine = pipeline(sqs, Task(work, input="theirs"))
    assert troubles(facts_of(engine)) == {"queues": "fail"}
    client = connect(sqs.url)
    made = client.create_queue(QueueName="their-dead")["QueueUrl"]
    arn = client.get_queue_attributes(QueueUrl=made, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 3})
    client.create_queue(QueueName="theirs", Attributes={"RedrivePolicy": policy})
    client.close()
    assert troubles(facts_of(engine)) == {"redrive": "warn"}
    assert troubles(facts_of(pipeline(sqs, Task(work, input="theirs", prefetch=0)))) == {}


def test_missing_queues_that_are_not_to_be_created(sqs: StandIn) -> None:
    assert troubles(facts_of(pipeline(sqs, create_queues=False))) == {"queues": "fail"}


def test_refused_credentials_and_none(sqs: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    sqs.keys(key="another")
    try:
        refused = facts_of(pipeline(sqs))
    finally:
        sqs.keys(key="")
    assert Level.FAIL in troubles(refused).values()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    none = Engine([Task(work, input=True)], domain="t", broker=f"sqs://us-east-1?endpoint_url={sqs.url}")
    assert troubles(facts_of(none)) == {"queue service": "fail"}
    nowhere = Engine([Task(work, input=True)], domain="t", broker="sqs://")
    assert troubles(facts_of(nowhere)) == {"queue service": "fail"}


def test_a_queue_without_rights(db: Path) -> None:
    facts = facts_of(engine_at(db, [Task(work, input=True)]))
    spec = facts.plan.pipeline.queues[0]
    refused = Examined(service="sqs", queues=(ExaminedQueue(spec=spec, exists=None, trouble="access denied"),))
    assert troubles(replace(facts, examined=refused)) == {"queues": "fail"}


def test_dead_letters_that_wait(cli: Cli) -> None:
    target = cli.write('engine = Engine([Task(len, name="refuses", input=True)], domain="t", broker="sqlite:///t.db")')
    engine = engine_at(cli.folder / "t.db", [Task(refuses, input=True)])
    engine.put(1)
    finish(engine)
    assert cli.found(target)["dead letters"] == "warn"


# -- the engine that runs here ----------------------------------------------------------------------------------------


def test_a_stage_whose_calls_wait_would_gain_from_threads(db: Path) -> None:
    engine = engine_at(db, [Task(waits, input=True)])
    engine.put_many(list(range(25)))
    with Background(engine):
        eventually(lambda: _done() >= 25, "all calls are done")
        found = facts_of(engine)
        engine.stop()
    told = {one.check: one for one in diagnose(found) if one.level is not Level.OK}
    assert set(told) == {"threads"}
    assert "threads=" in told["threads"].cure


def _done() -> int:
    state = running("t")
    return 0 if state is None else int(state["stages"][0]["done"])


def figures(**changes: Any) -> dict[str, Any]:
    """Return the state of an engine that computes and has enough workers."""
    stage = {
        "name": "work", "done": 5000, "busy_seconds": 100.0, "cpu_seconds": 95.0, "wanted": 2, "threads": 1,
        "waiting": 9, **changes,
    }  # fmt: skip
    return {
        "engine": {"domain": "t", "up": 100.0},
        "stages": [stage],
        "workers": [],
        "broker": {"requests": {"receive": 1000, "send": 500, "delete": 500}, "empty_receives": 100},
    }


def worker(**changes: Any) -> dict[str, Any]:
    return {"stage": "work", "memory": None, "process_cpu_seconds": None, **changes}


def test_cpu_that_the_supervisor_has_not_noted_yet_counts(db: Path) -> None:
    engine = engine_at(db, [Task(work, input=True, workers=2)])
    state = {**figures(cpu_seconds=0.0), "workers": [worker(process_cpu_seconds=40.0), worker()]}
    assert troubles(facts_of(engine, state=state)) == {}
    state["workers"] = [worker(process_cpu_seconds=4.0), worker()]
    assert troubles(facts_of(engine, state=state)) == {"threads": "warn"}


def test_many_workers_whose_calls_wait(db: Path) -> None:
    engine = engine_at(db, [Task(work, input=True, workers=40, threads=2)])
    state = {**figures(cpu_seconds=20.0), "workers": [worker(process_cpu_seconds=30.0)]}
    assert troubles(facts_of(engine, state=state)) == {}


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({}, None),
        ({"cpu_seconds": 5.0}, "threads"),
        ({"done": 1_000_000}, "batch"),
        ({"busy_seconds": 199.0, "cpu_seconds": 199.0}, "workers"),
        ({"busy_seconds": 199.0, "cpu_seconds": 199.0, "waiting": 0}, None),
        ({"done": 5, "cpu_seconds": 5.0}, None),
    ],
)
def test_gains_by_the_figures(db: Path, changes: dict[str, Any], check: str | None) -> None:
    engine = engine_at(db, [Task(work, input=True, workers=2)])
    expected = {} if check is None else {check: "warn"}
    assert troubles(facts_of(engine, state=figures(**changes))) == expected


def test_levels_that_are_mostly_empty(db: Path) -> None:
    engine = engine_at(db, [Task(work, input=True, priorities=4), later])
    state = figures()
    billed = Examined(service="sqs")
    assert troubles(facts_of(engine, state=state, examined=billed)) == {}
    state["broker"]["empty_receives"] = 900
    assert troubles(facts_of(engine, state=state, examined=billed)) == {"priorities": "warn"}
    assert troubles(facts_of(engine, state=state)) == {}


# -- rights and cost --------------------------------------------------------------------------------------------------


def granted(text: str) -> dict[str, set[str]]:
    """Return the queues that each action is granted on."""
    found: dict[str, set[str]] = {}
    for statement in json.loads(text)["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            names = {arn.removeprefix("arn:aws:sqs:us-east-1:*:") for arn in statement["Resource"]}
            found.setdefault(action, set()).update(names)
    return found


def test_the_policy_is_exactly_what_a_run_asks_for(cli: Cli, sqs: StandIn) -> None:
    broker = f'SQS("us-east-1", endpoint_url="{sqs.url}", access_key="testing", secret_key="testing")'
    target = cli.write(
        "def first(value):\n    return value\ndef second(value):\n    raise Reject('no')\n"
        f'engine = Engine([Task(first, input=True), second], domain="t", broker={broker})'
    )
    code, text = cli.ask(target, "--iam")
    assert code == 0
    assert not sqs.ledger()["requests"]
    every = {"t--input", "t-first", "t-first--dead", "t-second--dead"}
    rights = granted(text)
    assert rights["sqs:GetQueueUrl"] == rights["sqs:GetQueueAttributes"] == every
    # Both stages may send a Continue to their own inputs.
    assert rights["sqs:SendMessage"] == every
    assert rights["sqs:ReceiveMessage"] == rights["sqs:DeleteMessage"] == {"t--input", "t-first"}
    assert "sqs:CreateQueue" not in rights
    made = granted(cli.ask(target, "--iam", "--create")[1])
    assert made["sqs:CreateQueue"] == every

    engine = pipeline(sqs, Task(work, input=True), Task(refuses))
    engine.put(1)
    finish(engine)
    used = {f"sqs:{name.removesuffix('Batch')}" for name in sqs.ledger()["requests"]}
    assert used <= set(made)


def test_the_policy_of_one_task_and_of_queues_of_others(cli: Cli) -> None:
    theirs = "https://sqs.us-east-1.amazonaws.com/111122223333/theirs"
    target = cli.write(
        f'engine = Engine([Task(len, name="first", input="{theirs}"), Task(len, name="second")], domain="t",\n'
        '    broker=SQS("us-east-1", kms_key="alias/ours", tags={"a": "b"}))'
    )
    _, text = cli.ask(target, "--iam", "--create", "--only", "first")
    rights = granted(text)
    foreign = "arn:aws:sqs:us-east-1:111122223333:theirs"
    assert rights["sqs:ReceiveMessage"] == {foreign}
    assert rights["sqs:SendMessage"] == {"t-first", "t-first--dead"}
    assert foreign not in rights["sqs:CreateQueue"]
    assert rights["sqs:TagQueue"] == rights["sqs:CreateQueue"]
    key = json.loads(text)["Statement"][-1]
    assert key["Action"] == ["kms:Decrypt", "kms:GenerateDataKey"]
    assert key["Condition"] == {"ForAnyValue:StringEquals": {"kms:ResourceAliases": "alias/ours"}}
    _, text = cli.ask(target, "--iam", "--only", "second")
    assert granted(text)["sqs:SendMessage"] == {"t-first", "t-second--dead"}


def test_cost_as_assumed_and_as_measured(cli: Cli) -> None:
    target = cli.write('engine = Engine([Task(len, name="work", input=True)], domain="t", broker="sqs://us-east-1")')
    code, text = cli.ask(target, "--cost", "--per-day", "1000000", "--json")
    told = json.loads(text)
    assert (code, told["measured"], told["per_hop"]) == (0, False, 0.31)
    assert told["usd_per_month"] == pytest.approx(0.31 * 30.4 * 0.40)
    assert "2026" in told["price_source"]
    assert "assumed" in cli.ask(target, "--cost")[1]
    plan = plan_of(Engine([Task(work, input=True, workers=2)], domain="t", broker="sqs://us-east-1"))
    measured = cost.cost_of(plan, figures(), None)
    assert (measured.measured, measured.per_hop, measured.empty) == (True, 0.4, 0.1)
    assert measured.per_day == 5000 / 100 * 86_400
    assert measured.usd_idle_month == pytest.approx(2 * 4320 * 30.4 * 0.4e-6)


def test_cost_is_measured_from_an_engine_on_the_same_service(
    cli: Cli, sqs: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_LEAST_DONE", 20)
    broker = f'SQS("us-east-1", endpoint_url="{sqs.url}", access_key="testing", secret_key="testing")'
    target = cli.write(f'engine = Engine([Task(len, name="work", input=True)], domain="t", broker={broker})')
    engine = pipeline(sqs, Task(work, input=True))
    engine.put_many(list(range(25)))
    engine.close()
    with Background(engine):
        eventually(lambda: _done() >= 25, "all calls are done")
        here = json.loads(cli.ask(target, "--cost", "--json")[1])
        elsewhere = json.loads(cli.ask(target, "--cost", "--json", "--broker", "sqs://us-east-1")[1])
        engine.stop()
    assert (here["measured"], elsewhere["measured"]) == (True, False)
    assert 0 < here["per_hop"] < 10
    assert here["per_day"] > 0


@pytest.mark.parametrize("words", [["--create"], ["--per-day", "5"], ["--iam"], ["--cost"]])
def test_usage(cli: Cli, words: list[str]) -> None:
    target = cli.write('engine = Engine([Task(len, name="work", input=True)], domain="t", broker="sqlite:///t.db")')
    assert cli.ask(target, *words)[0] == 2
