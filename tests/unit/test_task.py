import dataclasses
import functools
import inspect
import pickle
from fractions import Fraction
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp.engine import Engine
from sqspipes_mp.errors import ConfigError, Retry
from sqspipes_mp.pipeline.checks import parse_size
from sqspipes_mp.pipeline.task import EmptyTaskOutput, Task, TaskCallback, environment, interval_seconds


def resize(value):
    return value


def items(value):
    yield value


async def fetch(value):
    return value


async def stream(value):
    yield value


class Model:
    def __init__(self, path="m"):
        self.path = path

    def __call__(self, value):
        return value


class Splitter:
    def __call__(self, value):
        yield value


class AsyncCall:
    async def __call__(self, value):
        return value


class InheritedAsync(AsyncCall):
    pass


class NoCall:
    def __init__(self, value):
        pass


def named(value):
    # The same in every run: where a function stands in memory is not.
    return getattr(value, "__name__", str(value)[:20])


def policy(error, attempt):
    return Retry(1)


def test_defaults_are_the_documented_ones():
    signature = inspect.signature(Task)
    defaults = {name: p.default for name, p in signature.parameters.items() if name != "method"}
    assert defaults == {
        "name": None,
        "workers": 1,
        "threads": 1,
        "priorities": 1,
        "interval": 0.0,
        "args": (),
        "kwargs": None,
        "env": None,
        "input": None,
        "decode": None,
        "init": None,
        "exit": None,
        "timeout": None,
        "max_attempts": 5,
        "on_error": None,
        "max_tasks_per_worker": None,
        "max_memory": None,
        "prefetch": None,
        "max_waiting": None,
        "group": None,
        "tenant": None,
        "batch": None,
        "batch_wait": 0.5,
        "init_args": (),
    }
    assert all(p.kind is p.KEYWORD_ONLY for name, p in signature.parameters.items() if name != "method")
    assert [field.name for field in dataclasses.fields(Task)] == list(signature.parameters)
    task = Task(resize)
    assert task.name == "resize"
    assert {name: getattr(task, name) for name in defaults if name != "name"} == {
        name: value for name, value in defaults.items() if name != "name"
    }


def test_a_task_is_a_frozen_value():
    task = Task(resize, args=[1, 2], max_memory="1GiB")
    assert (task.args, task.max_memory) == ((1, 2), 1 << 30)
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.workers = 3  # type: ignore[misc]
    assert task == Task(resize, args=(1, 2), max_memory=1 << 30)
    assert dataclasses.replace(task, workers=3).workers == 3
    with pytest.raises(ConfigError):
        dataclasses.replace(task, workers=0)
    assert pickle.loads(pickle.dumps(task)) == task


GOOD: dict[str, list[Any]] = {
    "workers": [1, 64, "auto"],
    "threads": [1, 128],
    "priorities": [1, 16],
    "interval": [0, 0.1, 3, Fraction(1, 2), float, lambda: 1],
    "args": [(), [], ("x",), [1, None]],
    "input": [
        None,
        True,
        "uploads",
        "up_loads-1.fifo",
        "https://sqs.eu-west-1.amazonaws.com/123/up",
        "arn:aws:sqs:us-west-2:123:up",
    ],
    "init": [None, print],
    "exit": [None, print],
    "timeout": [None, 1, 0.5],
    "max_attempts": [1, 1000],
    "on_error": [None, "raise", "retry", "reject", policy],
    "max_tasks_per_worker": [None, 1],
    "max_memory": [None, 1, "512MB", "2GiB", "1.5 GB", "100 b"],
    "prefetch": [None, 0, 10],
    "group": [None, str],
    "batch": [None, 1, 128],
    "batch_wait": [0, 0.5, 20],
}
NAN, INF = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "workers": [0, -1, 1.5, "4", "Auto", None, True, b"auto", NAN],
    "threads": [0, 129, -1, 2.0, "auto", None, True],
    "priorities": [0, 17, True, 1.0, "3", None],
    "interval": [-0.1, NAN, INF, "1", None, True, 10**400, fetch],
    "args": ["x", "abc", None, 5, {"a": 1}, {1}, b"x"],
    "kwargs": ["x", 3, [("size", 1)], {1: 2}, {"no": 1}],
    "env": ["x", 3, fetch, {"A": 1}, {1: "a"}, {"": "a"}, {"A=B": "a"}, {"A": "a\0"}],
    "input": [False, "", 1, 0, b"q", "has space", "a" * 81, "q.txt", ["q"], "ftp://x/y", "arn:aws:s3:::b"],
    "decode": ["json", 3, fetch],
    "init": ["load", 3, fetch],
    "exit": [(), fetch],
    "timeout": [0, -1, INF, NAN, True, "60"],
    "max_attempts": [0, -1, None, True, 2.5, INF],
    "on_error": ["ignore", "", "RETRY", 3, True, fetch],
    "max_tasks_per_worker": [0, -1, True, 1.5],
    "max_memory": [0, -1, True, 1.5, "", "lots", "2G", "1e9", "-1GB", "0 MB", "0.1B", "NaN GB", "٣GB"],
    "prefetch": [-1, True, 1.5, "10"],
    "max_waiting": [-1, True, 1.5, "10"],
    "group": ["key", 3, fetch],
    "batch": [0, 129, True, 1.5, "10"],
    "batch_wait": [-1, NAN, INF, None, "1", True],
    "init_args": ["x", None, 3],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in GOOD.items() for v in vs], ids=named)
def test_good_values_are_taken(field, value):
    taken = getattr(Task(resize, **{field: value}), field)
    if isinstance(value, list):
        value = tuple(value)
    if field != "max_memory":
        assert taken == value


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in BAD.items() for v in vs], ids=named)
def test_bad_values_name_field_value_and_what_is_allowed(field, value):
    extra: dict[str, Any] = {"input": "queue"} if field == "decode" else {}
    with pytest.raises(ConfigError) as caught:
        Task(resize, **{field: value}, **extra)
    error = caught.value
    assert error.field == f"Task('resize').{field}"
    assert error.value == repr(value)[:200]
    assert error.allowed
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("args", "x", "args=('x',)"),
        ("args", 5, "args=(5,)"),
        ("workers", "4", '"auto"'),
        ("max_memory", "2G", "MiB"),
        ("timeout", "1m", "Write 60"),
        ("timeout", "1.5 h", "Write 5400"),
        ("batch_wait", "0.5", "Write 0.5"),
        ("on_error", "skip", '"reject"'),
        ("input", False, "Leave it out"),
        ("init", fetch, "asyncio.run"),
        ("init_args", ("x",), "args="),
    ],
)
def test_cures_say_what_to_write(field, value, cure):
    with pytest.raises(ConfigError) as caught:
        Task(resize, **{field: value})
    assert cure in caught.value.cure


@pytest.mark.parametrize("method", [fetch, stream, AsyncCall, AsyncCall(), InheritedAsync, functools.partial(fetch, 1)])
def test_coroutine_functions_are_refused_with_a_cure(method):
    with pytest.raises(ConfigError, match=r"asyncio\.run") as caught:
        Task(method, name="fetch")
    assert caught.value.field == "Task('fetch').method"


@pytest.mark.parametrize("method", [None, "resize", 3, resize(1), [resize]])
def test_what_cannot_be_called_is_refused(method):
    for name in (None, "resize"):
        with pytest.raises(ConfigError, match="without calling it"):
            Task(method, name=name)


@pytest.mark.parametrize("method", [lambda v: v, functools.partial(resize, 1), Model()])
def test_nameless_callables_need_a_name(method):
    with pytest.raises(ConfigError, match="name='resize'"):
        Task(method)
    assert Task(method, name="resize").name == "resize"


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (resize, "resize"),
        (Model, "Model"),
        (Model().__call__, "__call__"),
        (len, "len"),
        (functools.cache(resize), "resize"),
    ],
)
def test_names_come_from_the_method(method, name):
    assert Task(method).name == name


@pytest.mark.parametrize("name", ["", "a b", "-a", "-", "größe", "a.fifo", "a/b", "a\n", 3, True, b"a"])
def test_bad_names_are_refused(name):
    with pytest.raises(ConfigError) as caught:
        Task(resize, name=name)
    assert caught.value.field == "Task(name)"


def test_function_names_that_queues_cannot_have_need_a_name():
    def größe(value):  # noqa: PLC2401  (such a name is the test)
        return value

    with pytest.raises(ConfigError, match="Give it another"):
        Task(größe)


def test_classes_without_a_call_are_refused():
    for cls in (NoCall, int, str):
        with pytest.raises(ConfigError, match="__call__") as caught:
            Task(cls)
        assert f"{cls.__name__}(value)" in caught.value.cure


@pytest.mark.parametrize(
    ("method", "is_class", "is_generator"),
    [
        (resize, False, False),
        (items, False, True),
        (functools.partial(items, 1), False, True),
        (functools.partial(functools.partial(items)), False, True),
        (Splitter, True, True),
        (Splitter(), False, True),
        (Splitter().__call__, False, True),
        (functools.partial(Splitter()), False, True),
        (Model, True, False),
        (Model(), False, False),
        (len, False, False),
    ],
)
def test_kinds_of_methods(method, is_class, is_generator):
    task = Task(method, name="t")
    assert (task.is_class, task.is_generator) == (is_class, is_generator)


def sized(value, *, size=1):
    return value * size


def test_the_environment_of_each_worker():
    assert environment(Task(resize), 0) == {}
    assert environment(Task(resize, env={"A": "b"}), 3) == {"A": "b"}
    assert environment(Task(resize, env=lambda index: {"A": str(index)}), 3) == {"A": "3"}
    with pytest.raises(ConfigError, match=r"env\(\) must be a dict"):
        environment(Task(resize, env=lambda index: {"A": index}), 3)


def test_keywords_are_the_functions():
    task = Task(sized, kwargs={"size": 2})
    assert task.kwargs == {"size": 2}
    assert hash(task) == hash(Task(sized))
    assert Engine([Task(sized, kwargs={"size": 2}, input=True)], domain="t").call(4) == [8]
    with pytest.raises(ConfigError, match=r"what the function takes \(.*'sise'\)"):
        Task(sized, kwargs={"sise": 2})


def test_init_args_are_for_classes():
    assert Task(Model, init_args=["m"]).init_args == ("m",)
    with pytest.raises(ConfigError, match="init_args"):
        Task(resize, init_args=("m",))


def test_decode_needs_a_queue_of_others():
    assert Task(resize, input="uploads", decode=str.upper).decode is str.upper
    for given_ in (None, True):
        with pytest.raises(ConfigError, match="decode"):
            Task(resize, input=given_, decode=str.upper)


def test_from_any_takes_tasks_dicts_and_callables():
    task = Task(resize, workers=2)
    assert Task.from_any(task, 0) is task
    assert Task.from_any(resize, 0) == Task(resize)
    keys = {"method": resize, "name": "small", "workers": 32, "priorities": 3, "interval": 0.1, "timeout": 5}
    assert Task.from_any(keys, 0) == Task(resize, name="small", workers=32, priorities=3, interval=0.1, timeout=5)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"method": resize, "worker": 3}, ["tasks[2]", "'worker'", "Did you mean 'workers'?"]),
        ({"method": resize, "priority": 3}, ["'priority'", "Did you mean 'priorities'?"]),
        ({"metod": resize}, ["'metod'", "Did you mean 'method'?"]),
        ({"method": resize, 3: 3}, ["tasks[2]", "got 3"]),
        ({"method": resize, "zzz": 3}, ["one of method, name, workers"]),
        ({"workers": 3}, ["tasks[2]", "'method'"]),
        ({}, ["tasks[2]", "'method'"]),
        ((resize, 4), ["tasks[2]", "Task(function, workers=...)"]),
        ("resize", ["tasks[2]", "'resize'"]),
        (None, ["tasks[2]", "got None"]),
    ],
    ids=range(10),
)
def test_from_any_names_the_entry_and_the_nearest_key(item, words):
    with pytest.raises(ConfigError) as caught:
        Task.from_any(item, 2)
    for word in words:
        assert word in str(caught.value)


def test_intervals_may_be_called():
    assert interval_seconds(Task(resize, interval=2)) == 2.0
    assert interval_seconds(Task(resize, interval=lambda: 0.25)) == 0.25
    for bad in (-1, NAN, INF, None, "1", True):
        with pytest.raises(ConfigError, match=r"Task\('resize'\)\.interval\(\)"):
            interval_seconds(Task(resize, interval=lambda bad=bad: bad))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MB", 512_000_000),
        ("2GiB", 2 << 30),
        ("1.5 GB", 1_500_000_000),
        (" 1kib ", 1024),
        ("7", 7),
        ("1TB", 10**12),
        ("0.5kB", 500),
    ],
)
def test_sizes(text, size):
    assert parse_size("f", text) == size


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans())
def test_sizes_are_positive_ints_or_refused(value):
    try:
        size = parse_size("f", value)
    except ConfigError:
        return
    assert type(size) is int
    assert size > 0


def test_callbacks_are_checked():
    made = TaskCallback(3, print, ["a", 1])  # type: ignore[arg-type]
    assert (made.result, made.callback, made.callback_args) == (3, print, ("a", 1))
    assert TaskCallback(None, print).callback_args == ()
    bad: list[tuple[Any, Any, str]] = [
        (None, (), "callback"),
        (fetch, (), "asyncio.run"),
        (print, "x", "callback_args=('x',)"),
    ]
    for callback, args, word in bad:
        with pytest.raises(ConfigError, match="TaskCallback") as caught:
            TaskCallback(3, callback, args)
        assert word in str(caught.value)


def test_empty_output_is_a_class_and_its_instances():
    assert isinstance(EmptyTaskOutput(), EmptyTaskOutput)
    assert isinstance(pickle.loads(pickle.dumps(EmptyTaskOutput())), EmptyTaskOutput)


QUEUE = "https://sqs.us-west-2.amazonaws.com/123456789012/uploads.fifo"
CONSOLE = "https://us-west-2.console.aws.amazon.com/sqs/v3/home?region=us-west-2#/queues/"


@pytest.mark.parametrize(
    "given", [QUEUE, f"{QUEUE}/", f"{CONSOLE}{quote(QUEUE, '')}", f"{CONSOLE}{quote(QUEUE, '')}/x"]
)
def test_a_queue_of_others_as_the_console_shows_it_is_that_queue(given: str) -> None:
    assert Task(resize, input=given).input == QUEUE


def test_an_unknown_keyword_names_the_nearest_one():
    engine = Engine([Task(resize, input=True)], domain="t", broker="sqlite://")
    calls = [
        (lambda: Task(resize, worker=2), "workers"),  # type: ignore[call-arg]
        (lambda: Task(resize, inputs=True), "input"),  # type: ignore[call-arg]
        (lambda: Engine([resize], on_eror="retry"), "on_error"),  # type: ignore[call-arg]
        (lambda: engine.map([1], keys=str), "key"),  # type: ignore[call-overload]
        (lambda: engine.map([1], keep_result=True), "keep_results"),  # type: ignore[call-overload]
        (lambda: engine.run(worker=2), "workers"),  # type: ignore[call-overload]
    ]
    for call, name in calls:
        with pytest.raises(TypeError, match=rf"unexpected keyword argument .* Did you mean '{name}'\?"):
            call()
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'$"):
        Task(resize, zzz=1)  # type: ignore[call-arg]
