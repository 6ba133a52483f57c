"""Code of users that type checkers accept: read by mypy and pyright, run by nobody."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

from sqspipes_mp import (
    SQS,
    Engine,
    OnError,
    Reject,
    Results,
    Retry,
    SQLite,
    StageSummary,
    Summary,
    Task,
    TaskClient,
    TaskLike,
)


def numbers(limit: int) -> Iterator[int]:
    yield from range(limit)


def double(value: int) -> int:
    return 2 * value


def policy(error: Exception, attempt: int) -> Retry | Reject:
    return Retry(attempt * 2.0) if isinstance(error, TimeoutError) else Reject(str(error))


chosen: OnError = policy
tasks: list[TaskLike] = [Task(numbers, args=(10,)), {"method": double, "workers": 2}, double]
engine = Engine(tasks, domain="typed", broker=SQLite(Path("typed.db")), on_error=chosen, start_method="fork")
Engine([double], broker=SQS("us-east-1"), on_error="retry")
Engine([Task(double, workers="auto", input=True, on_error="reject")], broker="sqlite:///typed.db")

assert_type(engine.run(), Summary)
assert_type(engine.run("double", workers=3, until="drained", idle=1), Summary)
assert_type(engine.run([0, "double"], workers={"double": "auto"}, iterate=True), Results[Any])
assert_type(engine.run(iterate=False)["double"], StageSummary)


def either(iterate: bool) -> Summary | Results[Any]:
    return engine.run(iterate=iterate)


with engine.map([1, 2, 3], ordered=True, key=str) as results:
    assert_type(results, Results[Any])
    for result in results:
        print(result)
print(results.summary.reason, results.summary["double"].done)

for value, result in engine.map(["a", "b"], with_input=True, return_exceptions=True):
    assert_type(value, str)
    print(value.upper(), result)


def with_inputs(wanted: bool) -> None:
    for pair in engine.map([1], with_input=wanted):
        print(pair)


assert_type(engine.call(3), list[Any])
assert_type(Engine([numbers]).call(), list[Any])
assert_type(engine.put(1, key=lambda value: f"key-{value}", priority=2), str)
assert_type(engine.put_many([1, 2], key=str, priority=lambda value: value % 2), int)

client = TaskClient("typed", broker="sqlite:///typed.db")
client.register_tasks([{"method": numbers, "priorities": 2}, double])
assert_type(client.run("double"), Summary)
assert_type(client.run("double", (1,), priority=len, workers=2), Summary)
assert_type(client.run("double", iterate=True), Results[Any])
