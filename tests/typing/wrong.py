"""Code of users that type checkers refuse, for the reason beside each line; a mark that is not needed is an error."""

from sqspipes_mp import Engine, Results, Task, TaskClient


def double(value: int) -> int:
    return 2 * value


Engine(double)  # type: ignore[arg-type]  # not a list of tasks
Engine([double], on_error="rety")  # type: ignore[arg-type]  # a policy that is none
Engine([double], start_method="froth")  # type: ignore[arg-type]  # a start method that is none
Task(double, workers="all")  # type: ignore[arg-type]  # neither a number nor "auto"
Task(double, input=False)  # type: ignore[arg-type]  # a source is None

engine = Engine([Task(double, input=True)], domain="typed")
engine.run(until="drain")  # type: ignore[call-overload]  # an end that is none
engine.run(worker=2)  # type: ignore[call-overload]  # an argument that is none
engine.run().staegs  # type: ignore[attr-defined]  # noqa: B018  # a field that is none
for _ in engine.run():  # type: ignore[attr-defined]  # iterate=True was forgotten
    pass
engine.map([1], key=lambda value: value.upper())  # type: ignore[attr-defined]  # a key of a text, of a number
engine.put(1, key=2.5)  # type: ignore[arg-type]  # neither a text nor a whole number
pairs: Results[tuple[str, int]] = engine.map([1], with_input=True)  # type: ignore[list-item]  # pairs begin with a number
engine.map([1]).summary.staegs  # type: ignore[attr-defined]  # noqa: B018  # a field that is none
TaskClient("typed").run("double").staegs  # type: ignore[attr-defined]  # noqa: B018  # a field that is none
