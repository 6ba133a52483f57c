"""Bad input gets a ConfigError before anything starts: it names field, value, what is allowed and the cure."""

import functools
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

import sqspipes_mp
from sqspipes_mp import SQS, ConfigError, Engine, SQLite, Task, errors
from sqspipes_mp.host.cpus import cpus
from sqspipes_mp.ipc.summary import Summary
from sqspipes_mp.pipeline.plan import make_plan


def source():
    return 1


def numbers():
    yield 1


def step(value):
    return value


def adds(value, one, two):
    return value + one + two


def last(value):
    return value


async def coroutine(value):
    return value


def engine(tasks=None, **changes):
    return Engine(tasks or [source, step, last], **{"domain": "app", "broker": "sqlite:///never.db", **changes})


def plan(tasks=None, **run):
    built = engine(tasks)
    return make_plan(built._parts.pipeline, built._parts.settings, **run)


_BAD_ENGINES = {
    "no tasks": (lambda: Engine([], domain="app"), ["tasks", "[]", "at least one"]),
    "tasks is a function": (lambda: Engine(step, domain="app"), ["tasks", "[step]"]),  # type: ignore[arg-type]
    "tasks is text": (lambda: Engine("step", domain="app"), ["tasks", "'step'"]),  # type: ignore[arg-type]
    "a task that is not callable": (lambda: engine([source, 7]), ["7"]),
    "a lambda without a name": (lambda: engine([source, lambda v: v]), ["name="]),
    "a partial without a name": (lambda: engine([source, functools.partial(step)]), ["name="]),
    "duplicate names": (lambda: engine([source, step, step]), ["step", "name"]),
    "an empty name": (lambda: engine([source, Task(step, name="")]), ["name", "''"]),
    "a name no queue can have": (lambda: engine([source, Task(step, name="a.b")]), ["name", "'a.b'", "letters"]),
    "a queue name that is too long": (lambda: engine([Task(source, name="x" * 78), step]), ["80"]),
    "a domain no queue can have": (lambda: engine(domain="my app"), ["domain", "'my app'", "letters"]),
    "an empty domain": (lambda: engine(domain=""), ["domain"]),
    "workers 0": (lambda: engine([source, Task(step, workers=0)]), ["workers", "0"]),
    "workers True": (lambda: engine([source, Task(step, workers=True)]), ["workers", "True"]),
    "workers 1.5": (lambda: engine([source, Task(step, workers=1.5)]), ["workers", "1.5", "auto"]),  # type: ignore[arg-type]
    "workers text": (lambda: engine([source, Task(step, workers="many")]), ["workers", "'many'", "auto"]),  # type: ignore[arg-type]
    "a coroutine function": (lambda: engine([source, coroutine]), ["coroutine", "asyncio.run"]),
    "a generator source with two workers": (lambda: engine([Task(numbers, workers=2), step]), ["workers", "2", "1"]),
    "priorities 0": (lambda: engine([Task(source, priorities=0), step]), ["priorities", "0", "16"]),
    "priorities 17": (lambda: engine([Task(source, priorities=17), step]), ["priorities", "17", "16"]),
    "a negative interval": (lambda: engine([Task(source, interval=-1), step]), ["interval", "-1"]),
    "an interval that is text": (lambda: engine([Task(source, interval="1"), step]), ["interval", "'1'"]),  # type: ignore[arg-type]
    "args that are text": (lambda: engine([Task(source, args="ab"), step]), ["args", "'ab'", "('ab',)"]),
    "an unknown key of a dict": (lambda: engine([{"method": source, "worker": 2}, step]), ["worker", "workers"]),
    "a dict without a method": (lambda: engine([{"name": "x"}, step]), ["method"]),
    "timeout 0": (lambda: engine([source, Task(step, timeout=0)]), ["timeout", "0"]),
    "a negative timeout": (lambda: engine([source, Task(step, timeout=-3)]), ["timeout", "-3"]),
    "visibility timeout 0": (lambda: engine(visibility_timeout=0), ["visibility_timeout", "0", "43200"]),
    "a negative grace": (lambda: engine(shutdown_grace=-1), ["shutdown_grace", "-1"]),
    "an unknown start method": (lambda: engine(start_method="frok"), ["start_method", "'frok'", "fork"]),
    "an unknown on_error": (lambda: engine(on_error="explode"), ["on_error", "'explode'", "retry"]),
    "setup that is no function": (lambda: engine(setup=3), ["setup", "3"]),
    "fifo that is no flag": (lambda: engine(fifo="yes"), ["fifo", "'yes'", "True"]),
    "group without fifo": (lambda: engine([source, Task(step, group=str)]), ["group", "fifo"]),
    "an unknown broker scheme": (lambda: engine(broker="redis://x"), ["redis://x", "sqs://", "sqlite://"]),
    "a broker that is none": (lambda: engine(broker=42), ["broker", "42"]),
    "too many threads": (lambda: engine([source, Task(step, threads=129)]), ["threads", "129", "128", "workers="]),
    "a source with threads": (lambda: engine([Task(source, threads=2), step]), ["threads", "2", "workers="]),
    "a batch and threads": (lambda: engine([source, Task(step, batch=2, threads=2)]), ["batch", "2", "threads"]),
    "a batch for a generator": (lambda: engine([source, Task(numbers, batch=2)]), ["batch", "2", "generator"]),
    "a batch that waits for long": (
        lambda: engine([source, Task(step, batch=2, batch_wait=30)]),
        ["batch_wait", "30", "60 s", "visibility_timeout"],
    ),
}


@pytest.mark.parametrize("case", _BAD_ENGINES)
def test_a_bad_engine_says_what_is_wrong(case):
    build, words = _BAD_ENGINES[case]
    with pytest.raises(ConfigError) as caught:
        build()
    assert [word for word in words if word not in str(caught.value)] == []


_BAD_RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bare args for several tasks": ({"args": (1,)}, ["args", "dict"]),
    "bare workers for several tasks": ({"workers": 2}, ["workers", "dict"]),
    "args that are no tuple": ({"only": "step", "args": "ab"}, ["args", "'ab'"]),
    "args for a task elsewhere": ({"only": "step", "args": {"last": (1,)}}, ["args", "last"]),
    "workers 0": ({"workers": {"step": 0}}, ["workers", "step", "0"]),
    "an unknown task in workers": ({"workers": {"stpe": 1}}, ["stpe", "step"]),
    "drained with a source that never ends": ({"until": "drained"}, ["until", "source", "generator"]),
    "an unknown until": ({"until": "empty"}, ["until", "'empty'", "drained"]),
    "an unknown task in only": ({"only": "nope"}, ["'nope'", "step"]),
    "an index that is none": ({"only": 3}, ["3", "step"]),
    "an empty only": ({"only": []}, ["only", "[]"]),
    "a priority outside the levels": ({"priority": 1}, ["priority", "1", "levels"]),
    "a priority that is text": ({"priority": "high"}, ["priority", "'high'"]),
    "a band upside down": ({"min_priority": 3, "max_priority": 1}, ["min_priority", "3", "1"]),
    "a band beyond 15": ({"max_priority": 16}, ["max_priority", "16", "15"]),
    "a band below 0": ({"min_priority": -1}, ["min_priority", "-1"]),
    "a band from a flag": ({"min_priority": True}, ["min_priority", "True"]),
    "a band to a text": ({"max_priority": "1"}, ["max_priority", "'1'"]),
    "a band from a fraction": ({"min_priority": 1.0}, ["min_priority", "1.0"]),
    "a negative idle": ({"idle": -1}, ["idle", "-1"]),
    "an idle without an end": ({"idle": 5}, ["idle", "5", "until"]),
    "iterate that is no flag": ({"iterate": 1}, ["iterate", "1"]),
    "too many arguments of a later task": ({"args": {"step": (1,)}}, ["step", "too many", "(1,)"]),
    "a later task's missing argument": ({"tasks": [source, adds], "args": {"adds": (1,)}}, ["adds", "'two'"]),
}


@pytest.mark.parametrize("case", _BAD_RUNS)
def test_bad_arguments_of_run_say_what_is_wrong(case):
    arguments, words = _BAD_RUNS[case]
    with pytest.raises(ConfigError) as caught:
        plan(**arguments)
    assert [word for word in words if word not in str(caught.value)] == []


def test_bad_arguments_of_run_start_nothing_and_touch_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        engine().run(only="nope")
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_said_in_several_ways():
    assert plan(only=["last", 1]).selected == (1, 2)
    assert plan([source, adds, last], only="adds", args=[1, 2]).args == {1: (1, 2)}
    assert plan(workers={"step": "auto"}).workers[1] == cpus()
    assert plan([{"method": source, "interval": lambda: 0.1}, step]).pipeline.stages[0].task.name == "source"
    assert plan([source, Task(step, interval=0.5)]).pipeline.stages[1].task.interval == 0.5
    assert plan([numbers, step], until="drained").until == "drained"
    assert plan([source, step, last], only=["step", "last"], until="drained", idle=1).idle == 1.0


def test_workers_of_a_generator_source_stay_one():
    with pytest.raises(ConfigError, match="generator"):
        plan([numbers, step], workers={"numbers": 2})


@pytest.mark.parametrize("bad", ["folder", "missing/file.db"])
def test_an_sqlite_path_that_cannot_be_is_found_before_any_process(tmp_path, bad):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="SQLite"):
        engine(broker=SQLite(tmp_path / bad)).run()


def test_relative_and_absolute_sqlite_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert engine([numbers], broker="sqlite:///here.db").run(until="drained").reason == "drained"
    assert engine([numbers], broker=f"sqlite:///{tmp_path}/there.db").run(until="drained").reason == "drained"
    assert {"here.db", "there.db"} <= {path.name for path in tmp_path.iterdir()}


@pytest.fixture
def no_aws(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


def test_sqs_without_a_region_says_how_to_set_one(no_aws):
    with pytest.raises(ConfigError, match=r"AWS_DEFAULT_REGION|AWS_REGION"):
        engine(broker="sqs://").run()


def test_sqs_without_credentials_says_how_to_set_them(no_aws):
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID"):
        engine(broker=SQS("us-east-1", endpoint_url="http://127.0.0.1:1")).run()


def test_a_domain_that_cannot_be_derived_says_how_to_give_one():
    program = "from sqspipes_mp import Engine\nEngine([print])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "SQSPIPES_DOMAIN" in done.stderr
    assert "domain=" in done.stderr


@pytest.mark.parametrize(
    ("path", "domain"), [("words.py", "words"), ("words/__main__.py", "words"), ("words/__init__.py", "words")]
)
def test_the_domain_is_taken_from_the_file_that_builds_the_engine(tmp_path, path, domain):
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text("from sqspipes_mp import Engine\nprint(Engine([print]).domain)\n")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False, env=environ)
    assert (done.stdout.strip(), done.stderr) == (domain, "")


def test_the_domain_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SQSPIPES_DOMAIN", "ambient")
    assert Engine([print]).domain == "ambient"
    assert Engine([print], domain="mine").domain == "mine"


def test_without_a_broker_one_warning_names_the_file_and_the_way_to_sqs(caplog, monkeypatch, tmp_path):
    monkeypatch.delenv("SQSPIPES_BROKER", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.chdir(tmp_path)
    built = Engine([numbers, step], domain="app")
    with caplog.at_level(logging.WARNING):
        built.run(until="drained")
        built.stats()
    texts = [record.getMessage() for record in caplog.records if "broker" in record.getMessage()]
    assert len(texts) == 1
    assert "app.db" in texts[0]
    assert "SQS" in texts[0]
    assert (tmp_path / "app.db").exists()


def test_the_environment_names_the_broker_and_the_argument_wins(monkeypatch):
    monkeypatch.setenv("SQSPIPES_BROKER", "sqlite:///ambient.db")
    assert "ambient.db" in Engine([print], domain="app").broker.describe()
    assert "mine.db" in Engine([print], domain="app", broker=SQLite("mine.db")).broker.describe()


class Counter:
    def __init__(self, start):
        self.n = start

    def __call__(self, stop):
        return min(self.n, stop)


class Static:
    @staticmethod
    def __call__():
        return 1


def injected(function):
    @functools.wraps(function)
    def inner():
        return function(1)

    return inner


@pytest.mark.parametrize("first", [step, Task(step, args=(1, 2)), Task(Counter, init_args=(0,))])
def test_a_source_that_cannot_be_called_as_it_will_be_is_refused_with_the_cure(first):
    with pytest.raises(ConfigError, match=r"it is a source.*args=.*input=True.*map"):
        plan([first, last])


@pytest.mark.parametrize(
    "first",
    [
        source,
        Task(step, args=(1,)),
        Task(Counter, args=(3,), init_args=(0,)),
        Static,
        injected(step),
        Task(functools.partial(step, 1), name="part"),
        Task(iter([1]).__next__, name="next"),
        Task(step, input=True),
    ],
)
def test_a_source_that_can_be_called_is_not(first):
    assert plan([first, last])


def test_what_is_given_to_run_counts_as_its_arguments():
    assert plan([step, last], args={"step": (1,)})
    assert plan([step, last], only="last")


def test_every_error_that_a_caller_can_meet_is_the_packages_own_name():
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SqsPipesError)]
    inner = {errors.BrokerBusy, errors.MessageError, errors.Verdict}
    assert [kind for kind in tree if kind not in inner and getattr(sqspipes_mp, kind.__name__, None) is not kind] == []
    assert {kind.__name__ for kind in tree if kind not in inner} <= set(sqspipes_mp.__all__)


def test_the_loop_over_a_run_names_iterate():
    summary: Any = Summary(reason="ended", seconds=1.0, stages=())
    with pytest.raises(TypeError, match=r"run\(iterate=True\)"):
        list(summary)


def test_on_windows_the_import_says_what_to_do():
    text = "import sys; sys.platform = 'win32'; import sqspipes_mp"
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=60)
    assert "ImportError: sqspipes_mp runs on Linux and macOS: on Windows run" in result.stderr
