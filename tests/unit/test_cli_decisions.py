"""The command line's decisions: which value wins, and which exit code an exception means."""

import inspect
import json
import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest

from sqspipes_mp import (
    AccessDenied,
    BootError,
    ConfigError,
    Engine,
    QueueMissing,
    RestartLimit,
    SQLite,
    Task,
    TaskLike,
)
from sqspipes_mp.caller.importing import importing
from sqspipes_mp.cli.console import JsonLines, table
from sqspipes_mp.cli.exits import Exit, Refused, Stopped, ending_of
from sqspipes_mp.cli.run import Given, run_options, task_names, worker_counts
from sqspipes_mp.engine import override, plan_run
from sqspipes_mp.errors import ChildNote

NOTE = ChildNote("in stage 'reduce', worker 12, message abc", held=True)
STAGE = "in stage 'reduce', worker 12"
KEEPER = "in the keeper, process 12"


def noted(error: BaseException, *notes: str) -> BaseException:
    for note in notes:
        error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), Exit.DONE),
        (Stopped(), Exit.DONE),
        (noted(ValueError("x"), NOTE), Exit.FAILED),
        (noted(KeyboardInterrupt(), NOTE), Exit.FAILED),
        (noted(SystemExit(0), NOTE), Exit.FAILED),
        (noted(ConfigError("Retry(delay)", -1, "more"), NOTE), Exit.FAILED),
        (noted(RestartLimit("a", 1, 2.0, "x"), NOTE), Exit.FAILED),
        (noted(QueueMissing("q", "Create it"), NOTE), Exit.FAILED),
        (ConfigError("a", 1, "2"), Exit.USAGE),
        (Refused("no"), Exit.USAGE),
        (Refused("no", Exit.BOOT), Exit.BOOT),
        (BootError("the keeper", 1, "killed"), Exit.BOOT),
        (AccessDenied("no"), Exit.BOOT),
        (noted(ValueError("x"), ChildNote(STAGE, booting=True)), Exit.BOOT),
        (noted(QueueMissing("q", "Create it"), ChildNote(KEEPER, booting=True)), Exit.BOOT),
        (noted(QueueMissing("q", "Create it"), ChildNote(KEEPER)), Exit.FAILED),
        (noted(ValueError("x"), ChildNote(KEEPER)), Exit.FAILED),
        (RestartLimit("a", 1, 2.0, "x"), Exit.RESTARTS),
        (RuntimeError("ours"), Exit.FAILED),
    ],
    ids=repr,
)
def test_an_exception_means_an_exit_code(error: BaseException, code: Exit) -> None:
    ending = ending_of(error)
    assert ending is not None
    assert ending.code is code


def test_the_exit_of_argparse_is_none_of_ours() -> None:
    assert ending_of(SystemExit(2)) is None


def test_a_tasks_traceback_is_shown_and_a_wrong_value_s_is_not() -> None:
    failure = noted(ValueError("x"), NOTE)
    ending, refused = ending_of(failure), ending_of(ConfigError("a", 1, "2"))
    assert ending is not None
    assert ending.traceback is failure
    assert refused is not None
    assert refused.traceback is None
    assert refused.message == "a must be 2, got 1"


# --- options ---


def test_words_of_options_may_be_in_capitals() -> None:
    found = options({"SQSPIPES_ON_ERROR": "Retry"}, log_level="DEBUG", until="DRAINED")
    assert (found.log_level, found.until, found.on_error.value) == (logging.DEBUG, "drained", "retry")


def options(environ: dict[str, str] | None = None, **flags: Any) -> Any:
    names = ["only", "workers", "broker", "until", "idle", "wait_for_broker"]
    names += ["on_error", "log_level", "log_format", "progress", "summary_json"]
    return run_options(Namespace(**{**dict.fromkeys(names), **flags}), environ or {})


def source():
    yield 1


def pipeline(**workers: int) -> Any:
    def first(value):
        return value

    def last(value):
        return value

    tasks: list[TaskLike] = [source, *(Task(each, workers=workers.get(each.__name__, 1)) for each in (first, last))]
    return Engine(tasks, domain="t").pipeline


def counts(given: Any, only: list[str] | None = None, **workers: int) -> dict[str, Any]:
    return worker_counts(given.workers, pipeline(**workers), only)


def test_nothing_asked_for_is_the_default() -> None:
    given = options()
    assert (given.only, given.workers, given.until, given.on_error, given.broker) == ([], [], None, None, None)
    assert (given.log_level, given.log_format) == (logging.INFO, "text")


def test_the_environment_is_read() -> None:
    environ = {"SQSPIPES_ONLY": "first, last", "SQSPIPES_UNTIL": "drained", "SQSPIPES_LOG_LEVEL": "error"}
    given = options({**environ, "SQSPIPES_LOG_FORMAT": "json", "SQSPIPES_ON_ERROR": "retry"})
    assert task_names(given.only, pipeline()) == ["first", "last"]
    assert (given.until, given.log_level, given.log_format) == ("drained", logging.ERROR, "json")
    assert given.on_error == Given("SQSPIPES_ON_ERROR", "retry")


def test_idle_goes_with_until_and_the_flag_wins() -> None:
    environ = {"SQSPIPES_IDLE": "5"}
    assert options(environ, until="drained").idle == 5
    assert options(environ, until="drained", idle="0.5").idle == 0.5
    # It may be set for all runs, those without an end included.
    assert options(environ).idle is None
    for flags, said in (
        ({"idle": "5"}, "--until drained"),
        ({"idle": "-1", "until": "drained"}, "--idle must be"),
        ({"idle": "nan", "until": "drained"}, "--idle must be"),
    ):
        with pytest.raises(Refused, match=said):
            options(None, **flags)


def test_a_users_own_note_is_no_note_of_a_childs() -> None:
    ending = ending_of(noted(RestartLimit("a", 1, 2.0, "x"), "in stage 'reduce', I said"))
    assert ending is not None
    assert ending.code is Exit.RESTARTS


def test_only_what_had_a_message_is_told_of_one() -> None:
    told = [ending_of(noted(ValueError("x"), note)) for note in (NOTE, ChildNote(STAGE))]
    assert [ending and "its message is back" in ending.message for ending in told] == [True, False]


def test_an_empty_variable_is_none() -> None:
    given = options({"SQSPIPES_ONLY": "", "SQSPIPES_UNTIL": "", "SQSPIPES_ON_ERROR": ""})
    assert (given.only, given.until, given.on_error) == ([], None, None)


def test_flags_win_over_the_environment() -> None:
    environ = {"SQSPIPES_ONLY": "first", "SQSPIPES_ON_ERROR": "retry", "SQSPIPES_WORKERS": "last=2,first=3"}
    given = options(environ, only=["last"], on_error="reject", workers=["last=5"])
    assert task_names(given.only, pipeline()) == ["last"]
    assert given.on_error == Given("--on-error", "reject")
    assert counts(given) == {"last": 5, "first": 3}


@pytest.mark.parametrize(
    ("environ", "flags", "named"),
    [
        ({"SQSPIPES_UNTIL": "dry"}, {}, "SQSPIPES_UNTIL"),
        ({}, {"until": "dry"}, "--until"),
        ({"SQSPIPES_ON_ERROR": "ignore"}, {}, "raise, retry or reject"),
        ({}, {"log_level": "loud"}, "--log-level"),
        ({"SQSPIPES_LOG_FORMAT": "xml"}, {}, "text or json"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(environ: dict[str, str], flags: dict[str, str], named: str) -> None:
    with pytest.raises(Refused, match=named):
        options(environ, **flags)


def test_a_bare_number_is_for_the_one_task_that_runs() -> None:
    assert counts(options(workers=["4"]), ["first"]) == {"first": 4}
    assert counts(options(workers=["auto"]), ["first"]) == {"first": "auto"}
    with pytest.raises(Refused, match="--workers last=4"):
        counts(options(workers=["4"]))


@pytest.mark.parametrize("text", ["0", "-1", "many", "first=", "first=x", "first=0", "=", "=3x", "²"])
def test_workers_must_be_a_number(text: str) -> None:
    with pytest.raises(Refused, match="--workers must be"):
        counts(options(workers=[text]), ["first"])


def test_the_code_wins_over_the_environment_and_flags_over_the_code() -> None:
    assert counts(options({"SQSPIPES_WORKERS": "first=5,last=6"}), first=2) == {"last": 6}
    assert counts(options(workers=["first=5"]), first=2) == {"first": 5}


def test_the_environment_may_name_tasks_that_run_elsewhere() -> None:
    assert counts(options({"SQSPIPES_WORKERS": "first=5,last=6"}), ["last"]) == {"last": 6}


def test_unknown_tasks_are_refused_by_the_option_s_name() -> None:
    with pytest.raises(Refused, match=r"SQSPIPES_WORKERS must .*'nobody'"):
        counts(options({"SQSPIPES_WORKERS": "nobody=5"}))
    with pytest.raises(Refused, match=r"--only must .*'nobody'"):
        task_names(options(only=["nobody"]).only, pipeline())


@pytest.mark.parametrize(
    ("given", "weakly", "kept"),
    [
        ({}, True, "retry"),
        ({}, False, "retry"),
        ({"on_error": "raise"}, True, "raise"),
        ({"on_error": "raise"}, False, "retry"),
    ],
)
def test_the_environment_yields_to_an_on_error_of_the_code_even_to_the_default_one(
    given: dict[str, Any], weakly: bool, kept: str
) -> None:
    engine = Engine([source], domain="t", **given)
    override(engine, on_error="retry", weakly=weakly)
    assert plan_run(engine).settings.on_error == kept


def test_an_editor_sees_the_constructor_s_defaults() -> None:
    assert str(inspect.signature(Engine).parameters["on_error"]) == "on_error: 'OnError' = 'raise'"


def test_a_table_is_aligned() -> None:
    assert table(("name", "n"), [("a", 1), ("bcdef", 12345)]) == "name        n\na           1\nbcdef  12,345"


def test_a_json_line_has_the_facts_of_its_record() -> None:
    record = logging.makeLogRecord({"msg": "dead", "stage": "work", "attempt": 3, "untold": True, "odd": {1, 2}})
    line = json.loads(JsonLines().format(record))
    assert {name: line[name] for name in ("message", "stage", "attempt", "odd")} == {
        "message": "dead",
        "stage": "work",
        "attempt": 3,
        "odd": "{1, 2}",
    }
    assert not {"untold", "args", "msg", "lineno"} & line.keys()


def test_a_mistyped_task_gets_a_suggestion() -> None:
    with pytest.raises(Refused, match=r"--only must be .* got 'fisrt'. Did you mean 'first'\?"):
        task_names(options(only=["fisrt"]).only, pipeline())


def test_nothing_begins_while_the_users_module_is_imported(tmp_path: Any) -> None:
    db = tmp_path / "t.db"
    engine = Engine([Task(abs, input=True)], domain="t", broker=SQLite(db))
    calls: dict[str, list[Callable[[], object]]] = {
        "run": [engine.run, lambda: engine.run(iterate=True), lambda: plan_run(engine)],
        "map": [lambda: engine.map([1])],
        "put": [lambda: engine.put(1)],
        "put_many": [lambda: engine.put_many([1])],
    }
    with importing("words"):
        for name, begun in calls.items():
            for call in begun:
                with pytest.raises(ConfigError, match=rf"{name}\(\) in words must be under `if __name__ == "):
                    call()
    assert not db.exists()
    assert engine.put(1)
    engine.close()
