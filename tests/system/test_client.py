"""``TaskClient``: sqspipes's interface, on SQLite and on SQS's wire, and the script of sqspipes's own README."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import sqspipes_mp
from sqspipes_mp import SQS, ConfigError, EmptyTaskOutput, OutputError, SQLite, Task, TaskCallback, TaskClient
from sqspipes_mp.client import TaskClientError
from tests.gates import ROOT, Log, bodies, eventually, values

SCRIPT = """
import os
import sys
import random
import string

from sqspipes_mp.client import TaskClient

client = TaskClient(domain='my-app', aws_key='testing', aws_secret='testing', aws_region='us-west-2'BROKER)


def _generate(max_size):
    return ''.join(random.choice(string.ascii_lowercase) for _ in range(random.randint(1, max_size)))


def _reduce(value, keep='vowels'):
    vowels = ['a', 'e', 'i', 'o', 'u', ]

    result = [v for v in value if (v in vowels) == (keep == 'vowels')]

    return value, ''.join(result)


def _count(data):
    value, vowels = data

    return value, len(vowels)


client.register_tasks([
    {'method': _generate, 'workers': 32, 'interval': 0.1},
    {'method': _reduce, 'workers': 2},
    {'method': _count, 'workers': 16}
])


def generate(workers):
    for res in client.run('_generate', args=(10, ), iterate=True, workers=workers):
        print(res)


def reduce(workers):
    for res in client.run('_reduce', iterate=True, workers=workers):
        print('%s -> %s' % res)


def count(workers):
    for result in client.run('_count', iterate=True, workers=workers):
        print('%s -> %d' % result)


try:
    n_workers = int(sys.argv[2])
except ValueError:
    n_workers = None

try:
    if sys.argv[1] == 'generate':
        generate(n_workers)
    elif sys.argv[1] == 'reduce':
        reduce(n_workers)
    elif sys.argv[1] == 'count':
        count(n_workers)
    else:
        raise ValueError('Invalid argument: must be one of generate, reduce or count')
except IndexError:
    raise ValueError('Script argument is required')
"""


def ended(process: "subprocess.Popen[str]") -> list[str]:
    """Wait for an interrupted part of the script; return the lines it still printed."""
    output, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    return output.splitlines()


@pytest.mark.parametrize("broker", ["", ", broker='sqlite:///queues.db'"], ids=["sqs", "sqlite"])
def test_the_readmes_script_runs_as_three_processes(tmp_path: Path, moto_url: str, broker: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("BROKER", broker))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "AWS_ENDPOINT_URL": moto_url}
    parts = {
        name: subprocess.Popen(
            [sys.executable, "script.py", name, workers],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, workers in (("generate", "2"), ("reduce", "16"), ("count", "2"))
    }
    try:
        lines = {name: [parts[name].stdout.readline().strip() for _ in range(8)] for name in ("count", "reduce")}
        for process in parts.values():
            process.send_signal(signal.SIGINT)
        printed = {name: lines.get(name, []) + ended(process) for name, process in parts.items()}
    finally:
        for process in parts.values():
            process.kill()
            process.communicate()
    counted = [line.split(" -> ") for line in printed["count"]]
    assert [(word, sum(letter in "aeiou" for letter in word)) for word, _ in counted] == [
        (word, int(number)) for word, number in counted
    ]
    assert Counter(word for word, _ in counted) <= Counter(printed["generate"])
    for line in printed["reduce"]:
        word, _, kept = line.partition(" -> ")
        assert kept.strip() == "".join(letter for letter in word if letter in "aeiou")


# --- the interface, on SQLite ---


def gen(*numbers):
    return list(numbers) or None


def one(number, times=1):
    return number * times


def seen(value, log: Log):
    log.note(value)


def client_at(path: Path, tasks: list[Any], **settings: Any) -> TaskClient:
    client = TaskClient("t", broker=SQLite(path), **settings)
    client.register_tasks(tasks)
    return client


def ready(client: TaskClient, name: str, *numbers: int) -> None:
    """Wait until a stage's levels, lowest first, have so many messages."""
    queues = client.engine.pipeline.stage(name).outputs
    eventually(lambda: [len(bodies(client.engine, queue)) for queue in queues] == list(numbers), f"{numbers}")


def test_it_is_exported_and_its_errors_are_value_errors_as_sqspipess() -> None:
    assert sqspipes_mp.TaskClient is TaskClient
    assert issubclass(TaskClientError, ValueError)


def test_a_client_is_at_sqs_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, db: Path) -> None:
    monkeypatch.setenv("SQSPIPES_BROKER", f"sqlite:///{db}")
    client = TaskClient("app", "key", "secret", "eu-central-1")
    client.register_tasks([one])
    broker = client.engine.broker
    assert isinstance(broker, SQS)
    assert (broker.region, broker.access_key, broker.secret_key) == ("eu-central-1", "key", "secret")
    assert client.engine.pipeline.fifo
    assert TaskClient("app", "key", "secret").aws_region == "us-west-2"


def test_sqspipess_keys_and_a_bare_function_declare_tasks(db: Path) -> None:
    def pause() -> float:
        return 0.5

    first = {"method": gen, "name": "", "workers": 3, "priorities": 40, "interval": pause}
    client = client_at(db, [first, one, Task(seen, name="last")], fifo=False)
    task = client.get_task_by_name("gen")
    assert (task.name, task.workers, task.priorities, task.interval) == ("gen", 3, 16, pause)
    assert [each.name for each in client.tasks] == ["gen", "one", "last"]
    assert (client.get_task_by_name(1).name, client.get_task_by_name(-1).name) == ("one", "last")
    assert first == {"method": gen, "name": "", "workers": 3, "priorities": 40, "interval": pause}


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        ([{"method": one, "worker": 2}], "Did you mean 'workers'"),
        ([{"method": one, "intervall": 2}], "Did you mean 'interval'"),
        ([{"method": one, "priorities": 0}], "priorities"),
        ([{"name": "one"}], "'method'"),
        ([], "a list of one or more tasks"),
        ((number for number in ()), "a list of one or more tasks"),  # type: ignore[var-annotated]
    ],
)
def test_what_cannot_be_registered_is_refused_with_the_cure(db: Path, tasks: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        client_at(db, tasks)


def test_bad_arguments_are_refused_before_anything_starts(db: Path) -> None:
    with pytest.raises(ConfigError, match="domain"):
        TaskClient("")
    with pytest.raises(ConfigError, match="secret"):
        TaskClient("app", "key")
    with pytest.raises(ConfigError, match="register_tasks"):
        TaskClient("app", broker=SQLite(db)).run("gen")
    client = client_at(db, [Task(gen, priorities=2), one])
    for call, text in (
        (lambda: client.get_task_by_name("two"), r"'gen' \(0\), 'one' \(1\)"),
        (lambda: client.get_task_by_name(-3), "'gen'"),
        (lambda: client.run("two"), "'gen'"),
        (lambda: client.run("gen", args=1), r"\(1,\)"),  # type: ignore[call-overload]
        (lambda: client.run("gen", priority=2), "from 0 to 1"),
        (lambda: client.run("one", min_priority=2), "at most 1"),
        (lambda: client.submit((1,), priority=2), "from 0 to 1"),
        (lambda: client.submit(1), r"\(1,\)"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=text):
            call()
    assert not db.exists()


def test_submit_sends_what_one_call_gives_before_it_returns(db: Path, log: Log) -> None:
    client = client_at(db, [Task(submitted, priorities=3), one])
    client.submit((log, 1))
    client.submit((log, 1), priority=2)
    client.submit((log, 2), priority=lambda value: value)
    client.submit((log, 0))
    assert log.lines() == [1, 1, 2, 0]
    assert sorted(values(client.engine, "one")) == [1, 1, 2]
    ready(client, "submitted", 1, 0, 2)


def submitted(log: Log, number: int):
    return TaskCallback(number or None, log.note, (number,))


def test_submit_of_a_generator_sends_all_or_after_an_exception_nothing(db: Path) -> None:
    client = client_at(db, [several, one])
    client.submit((1, EmptyTaskOutput, 2))
    with pytest.raises(KeyError):
        client.submit((3, KeyError))
    with pytest.raises(OutputError):
        client.submit((4, object()))
    assert values(client.engine, "one") == [1, 2]


def several(*items):
    for item in items:
        if item is KeyError:
            raise item
        yield item


def bad_callback() -> None:
    raise ValueError("callback")


def test_a_failed_callback_is_no_failed_submit(db: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = client_at(db, [gen_callback, one])
    client.submit(())
    assert values(client.engine, "one") == [7]
    assert "ValueError: callback" in caplog.text
    # The logged traceback keeps the engine, and so its connection.
    client.engine.close()


def gen_callback():
    return TaskCallback(7, bad_callback, None)  # type: ignore[arg-type]


def test_run_iterates_over_what_is_also_sent_on(db: Path) -> None:
    client = client_at(db, [Task(several, name="gen"), one, one_more])
    client.submit(tuple(range(5)))
    with client.run("one", args=(2,), iterate=True, workers=2) as results:
        assert sorted(next(results) for _ in range(5)) == [0, 2, 4, 6, 8]
        client.engine.stop()
        assert list(results) == []
    # Those whose acknowledgement was not heard before the stop go back.
    left = [2 * value for value in values(client.engine, "one")]
    assert sorted([*values(client.engine, "one_more"), *left]) == [0, 2, 4, 6, 8]


def one_more(value):
    return value + 1


@pytest.fixture(params=["sqlite", "sqs"])
def broker(request: pytest.FixtureRequest, db: Path) -> SQS | SQLite:
    return SQLite(db) if request.param == "sqlite" else request.getfixturevalue("moto")


def test_queues_purge_and_delete_before_during_and_after(broker: SQS | SQLite) -> None:
    client = TaskClient("client-queues", broker=broker)
    client.register_tasks([{"method": several, "name": "gen", "priorities": 2}, one])
    assert client.queues == []
    client.purge()
    client.submit((1, 2))
    names = {url.rpartition("/")[2] for url in client.queues}
    assert names == {f"client-queues-{name}.fifo" for name in ("gen", "gen--p1", "one--dead")}
    assert all(url.startswith("http") is isinstance(broker, SQS) for url in client.queues)
    assert client.engine.stats()["one"].visible == 2
    client.purge()
    assert client.engine.stats()["one"].visible == 0
    client.delete()
    assert client.queues == []
