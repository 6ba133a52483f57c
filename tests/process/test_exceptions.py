"""What a function raises comes out of ``run`` as itself, and its message goes back to its queue."""

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import Engine, RemoteError, SQLite, Task
from tests.gates import charges, engine_at, feed, values, waiting


class NeedsKeyword(Exception):
    def __init__(self, *, code):
        super().__init__(f"code {code}")
        self.code = code


class HoldsALock(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()
        self.detail = [1, 2]


class Odd(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def fail_keyword():
    raise NeedsKeyword(code=7)


def fail_lock():
    raise HoldsALock("held")


def fail_local():
    class Local(Exception):
        pass

    raise Local("of a function")


def fail_unicode():
    b"\xff\xfe".decode("utf-8")


def fail_syntax():
    compile("x = = 1", "given.txt", "exec")


def fail_group():
    raise ExceptionGroup("several", [ValueError("one"), KeyError("two")])


def fail_chain():
    error: Exception = ValueError("number 0")
    for number in range(1, 50):
        try:
            raise ValueError(f"number {number}") from error
        except ValueError as raised:
            error = raised
    raise error


def fail_recursion(n=0):
    return fail_recursion(n + 1)


def fail_interrupt():
    raise KeyboardInterrupt("from the function")


def fail_exit():
    raise SystemExit(3)


def fail_long():
    raise ValueError("x" * 50_000_000)


def fail_odd():
    raise Odd


def fail_noted():
    error = ValueError("noted")
    error.add_note("a note of the user's")
    raise error


def source():
    yield from ()


def sink(value):
    return value


def raise_at_two(value, fail: Callable[[], None]):
    if value == 2:
        fail()
    return value * 10


def one_stage(db: Path, fail: Callable[[], object], **settings: Any) -> Engine:
    engine = engine_at(db, [source, Task(raise_at_two, name="work", args=(fail,)), sink], **settings)
    feed(engine, "work", [1, 2, 3, 4])
    return engine


def assert_nothing_half_done(engine: Engine) -> None:
    """Every message is either done, with its output, or visible again, and only the failed one was charged."""
    left, done = values(engine, "work"), values(engine, "sink")
    assert sorted([*left, *(value // 10 for value in done)]) == [1, 2, 3, 4]
    assert 2 in left
    assert waiting(engine, "work") == (len(left), 0, 0)
    assert sum(charges(engine)) == 1


def run_through(engine: Engine) -> None:
    engine.run(only="work")


def iterate_through(engine: Engine) -> None:
    for value in engine.run(only="work", iterate=True):
        assert value in {10, 30, 40}


def raised(engine: Engine, through: Callable[[Engine], object], kind: type[BaseException]) -> Any:
    with pytest.raises(kind) as caught:
        through(engine)
    return caught.value


def functions_of(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


WAYS = pytest.mark.parametrize("through", [run_through, iterate_through], ids=["run", "iterate"])


@WAYS
@pytest.mark.parametrize(
    ("fail", "kind", "text"),
    [
        (fail_keyword, NeedsKeyword, "code 7"),
        (fail_lock, HoldsALock, "held"),
        (fail_local, RemoteError, "of a function"),
        (fail_unicode, UnicodeDecodeError, "invalid start byte"),
        (fail_syntax, SyntaxError, "invalid syntax"),
        (fail_group, ExceptionGroup, "several"),
        (fail_chain, ValueError, "number 49"),
        (fail_recursion, RecursionError, "maximum recursion depth"),
        (fail_interrupt, RemoteError, "KeyboardInterrupt: from the function"),
        (fail_exit, RemoteError, "SystemExit: 3"),
        (fail_odd, Odd, ""),
        (fail_noted, ValueError, "noted"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)
def test_the_exception_comes_out_as_itself(
    db: Path, fail: Callable[[], object], kind: type[BaseException], text: str, through: Callable[[Engine], object]
) -> None:
    engine = one_stage(db, fail)
    error = raised(engine, through, kind)
    assert type(error) is kind
    if kind is not Odd:
        assert text in str(error)
    whole = "".join(functions_of(error)) if kind is not RemoteError else error.text  # type: ignore[attr-defined]
    assert fail.__name__ in whole
    notes = error.__notes__
    assert "in stage 'work', worker " in notes[-1]
    assert ", message " in notes[-1]
    assert_nothing_half_done(engine)


def test_its_attributes_come_along_but_for_what_cannot_travel(db: Path) -> None:
    error = raised(one_stage(db, fail_lock), run_through, HoldsALock)
    assert error.detail == [1, 2]
    assert not hasattr(error, "lock")
    assert "'lock'" in "".join(error.__notes__)


def test_its_keyword_only_argument_comes_along(db: Path) -> None:
    assert raised(one_stage(db, fail_keyword), run_through, NeedsKeyword).code == 7


def test_its_cause_chain_comes_along(db: Path) -> None:
    error: BaseException | None = raised(one_stage(db, fail_chain), run_through, ValueError)
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    assert texts == [f"number {number}" for number in reversed(range(50))]


def test_its_members_come_along(db: Path) -> None:
    error = raised(one_stage(db, fail_group), run_through, ExceptionGroup)
    assert [(type(member), member.args) for member in error.exceptions] == [
        (ValueError, ("one",)),
        (KeyError, ("two",)),
    ]


def test_its_own_notes_stay_before_ours(db: Path) -> None:
    notes = raised(one_stage(db, fail_noted), run_through, ValueError).__notes__
    assert notes[0] == "a note of the user's"
    assert len(notes) == 2


def test_a_recursion_error_shows_where_it_began(db: Path) -> None:
    names = functions_of(raised(one_stage(db, fail_recursion), run_through, RecursionError))
    assert "raise_at_two" in names
    assert names.count("fail_recursion") > 10


@WAYS
def test_a_message_of_50_megabytes_is_cut_and_does_not_hang(db: Path, through: Callable[[Engine], object]) -> None:
    engine = one_stage(db, fail_long)
    error = raised(engine, through, RemoteError)
    assert "ValueError" in str(error)
    assert len(str(error)) < 200_000
    assert_nothing_half_done(engine)


@WAYS
def test_the_last_allowed_attempt_dead_letters_the_message_and_still_raises(
    db: Path, through: Callable[[Engine], object]
) -> None:
    engine = engine_at(db, [source, Task(raise_at_two, name="work", args=(fail_noted,), max_attempts=2), sink])
    feed(engine, "work", [2])
    for _ in range(2):
        raised(engine, through, ValueError)
    assert engine.stats()["work"].dead == 1
    assert waiting(engine, "work") == (0, 0, 0)


def test_the_callers_own_frames_come_first(db: Path) -> None:
    names = functions_of(raised(one_stage(db, fail_noted), run_through, ValueError))
    assert names.index("run_through") < names.index("raise_at_two") < names.index("fail_noted")


def test_the_engine_runs_again_after_an_exception(db: Path) -> None:
    engine = one_stage(db, fail_noted)
    raised(engine, run_through, ValueError)
    healthy = engine_at(db, [source, Task(raise_at_two, name="work", args=(int,)), sink])
    healthy.run(only="work", until="drained", idle=0.0)
    assert sorted(values(healthy, "sink")) == [10, 20, 30, 40]


def generator_that_fails():
    yield 1
    yield 2
    raise NeedsKeyword(code=1)


def test_a_generator_source_ends_the_run_in_every_mode(db: Path) -> None:
    for policy in ("raise", "retry", "reject"):
        engine = engine_at(db, [generator_that_fails, sink], on_error=policy)
        error = raised(engine, lambda engine: engine.run(only=0), NeedsKeyword)
        assert "generator_that_fails" in functions_of(error)
    assert sorted(values(engine, "sink")) == [1, 1, 1, 2, 2, 2]


def test_what_a_generator_source_gave_before_it_failed_is_iterated_first(db: Path) -> None:
    seen = []
    with pytest.raises(NeedsKeyword):
        for value in engine_at(db, [generator_that_fails]).run(iterate=True):
            seen.append(value)
    assert seen == [1, 2]


def source_that_fails():
    raise NeedsKeyword(code=2)


def test_a_function_source_that_fails_ends_the_run(db: Path) -> None:
    raised(engine_at(db, [source_that_fails, sink]), lambda engine: engine.run(), NeedsKeyword)


def exits_at_two(value: int) -> int:
    if value == 2:
        raise SystemExit(3)
    return value


def test_an_exit_ends_neither_a_map_that_returns_exceptions_nor_a_call(db: Path) -> None:
    engine = Engine([Task(exits_at_two, input=True, max_attempts=1)], domain="t", broker=SQLite(db), on_error="reject")
    found = list(engine.map([1, 2, 3], return_exceptions=True))
    assert sorted(value for value in found if isinstance(value, int)) == [1, 3]
    [error] = [value for value in found if not isinstance(value, int)]
    assert type(error) is RemoteError
    assert (error.type_name, error.message) == ("SystemExit", "3")
    with pytest.raises(RemoteError, match="SystemExit: 3"):
        engine.call(2)
