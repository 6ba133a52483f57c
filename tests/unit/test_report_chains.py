"""Chains and groups of exceptions, deep and large ones, packed and rebuilt."""

import traceback
from typing import Any

import pytest

from sqspipes_mp.errors import RemoteError
from sqspipes_mp.ipc.report.exception_text import MAX_MESSAGE, MAX_TEXT
from sqspipes_mp.ipc.report.packing import MAX_PICKLED
from sqspipes_mp.ipc.report.report import rebuild
from tests.unit.report_cases import (
    KeywordOnly,
    MyGroup,
    Plain,
    Several,
    catch,
    chain,
    inline,
    thrower,
    walk,
)

# --- chains and groups ---


def test_fifty_causes(carry):
    back = walk(carry(chain(50, explicit=True)), "__cause__")
    assert [e.args for e in back] == [(i,) for i in reversed(range(50))]
    assert all(type(e) is Plain and e.__traceback__ for e in back)
    assert back[0].__suppress_context__


def test_three_hundred_contexts(carry):
    back = walk(carry(chain(300, explicit=False)), "__context__")
    assert [e.args for e in back] == [(i,) for i in reversed(range(300))]
    assert all(type(e) is Plain and e.__cause__ is None and not e.__suppress_context__ for e in back)


def test_chain_that_does_not_fit_is_cut_and_says_so():
    current = None
    for i in range(1500):
        new = Plain(i)
        new.__context__ = current
        current = new
    report = inline(thrower(current))
    assert len(report.pickled) <= MAX_PICKLED + 64
    back = rebuild(report)
    assert type(back) is Plain
    assert 100 < len(walk(back, "__context__")) < 1500
    assert "did not fit" in back.__notes__[0]


def test_from_none_stays_suppressed(carry):
    def from_none():
        try:
            raise KeyError("inner")
        except KeyError:
            raise Plain("outer") from None

    back = carry(from_none)
    assert back.__cause__ is None
    assert back.__suppress_context__
    assert type(back.__context__) is KeyError


def test_cyclic_chain(carry):
    a, b = Plain("a"), Plain("b")
    a.__context__, b.__context__ = b, a
    back = carry(thrower(a))
    assert back.__context__.args == ("b",)
    assert back.__context__.__context__ is back


def test_same_exception_twice_is_one_again(carry):
    inner = Plain("inner")

    def both():
        try:
            raise inner
        except Plain as exc:
            raise Several(1, 2) from exc

    back = carry(both)
    assert back.__cause__ is back.__context__
    assert back.__cause__.args == ("inner",)


def test_exception_raised_twice_reports_twice():
    exc = Plain("again")
    first, second = inline(thrower(exc)), inline(thrower(exc))
    assert rebuild(first).__notes__ == rebuild(second).__notes__
    assert len(rebuild(second).__notes__) == 1
    assert exc.__dict__ == {}


def test_only_the_culprit_of_a_chain_is_replaced(carry):
    class Local(Exception):
        pass

    def both():
        try:
            try:
                raise KeyError("first")
            except KeyError as exc:
                raise Local("bad") from exc
        except Local as exc:
            raise Plain("root") from exc

    back = carry(both)
    assert type(back) is Plain
    assert type(back.__cause__) is RemoteError
    assert "Local" in back.__cause__.type_name
    assert back.__cause__.message == "bad"
    assert "in both" in back.__cause__.text
    assert type(back.__cause__.__cause__) is KeyError


def test_group_nested_with_notes(carry):
    inner = ExceptionGroup("inner", [KeyError("k"), OSError(2, "gone", "f")])
    inner.add_note("inner note")
    outer = MyGroup("outer", [inner, KeywordOnly(code=1)])
    back = carry(thrower(outer))
    assert type(back) is MyGroup
    assert back.message == "outer"
    assert str(back) == str(outer)
    assert back.exceptions[0].__notes__ == ["inner note"]
    assert back.exceptions[0].exceptions[1].filename == "f"
    assert back.exceptions[1].code == 1


def test_only_the_culprit_of_a_group_is_replaced(carry):
    class Local(Exception):
        pass

    back = carry(thrower(ExceptionGroup("g", [ValueError("fine"), Local("bad")])))
    assert type(back) is ExceptionGroup
    assert [type(e) for e in back.exceptions] == [ValueError, RemoteError]


@pytest.mark.parametrize(
    "make",
    [
        lambda: BaseExceptionGroup("g", [KeyboardInterrupt(), SystemExit(2)]),
        lambda: SystemExit(2),
        KeyboardInterrupt,
        lambda: GeneratorExit("g"),
    ],
)
def test_exceptions_that_would_end_the_caller_are_told_by_one_that_does_not(carry, make):
    back = carry(thrower(make()))
    assert type(back) is RemoteError
    assert back.type_name == type(make()).__name__
    assert back.type_name in str(back)
    assert "throw" in [frame.name for frame in traceback.extract_tb(back.__traceback__)]
    assert "line" in back.text


def test_such_a_cause_stays_itself(carry):
    def both():
        raise ValueError("root") from SystemExit(2)

    assert carry(both).__cause__.code == 2


def test_deeply_nested_group_never_kills(carry):
    group: Exception = ValueError("core")
    for i in range(60):
        group = ExceptionGroup(str(i), [group])
    back = carry(thrower(group))
    for _ in range(60):
        assert type(back) is ExceptionGroup
        back = back.exceptions[0]
    assert type(back) is ValueError


def test_group_too_deep_to_load_still_reports(carry):
    group: Exception = ValueError("core")
    for i in range(600):
        group = ExceptionGroup(str(i), [group])
    back = carry(thrower(group))
    assert isinstance(back, (ExceptionGroup, RemoteError))
    assert back.__notes__


def test_exceptions_in_attributes_and_args(carry):
    inner = catch(thrower(KeywordOnly(code=4)))
    exc: Any = Plain("outer", inner)
    exc.inner = inner
    back = carry(thrower(exc))
    assert back.inner is back.args[1]
    assert back.inner.code == 4
    assert back.inner.__traceback__


def test_attributes_may_refer_back(carry):
    exc: Any = Plain("self")
    exc.me = exc
    child: Any = Plain("child")
    exc.members = [child]
    child.parent = exc
    back = carry(thrower(exc))
    assert type(back) is Plain
    assert back.me is back
    assert type(back.members[0]) is Plain
    assert type(back.members[0].parent) is RemoteError
    assert back.members[0].parent.message == "left out of the report"


# --- deep, large ---


def test_recursion_error_is_itself_with_both_ends(carry):
    def forever(n):
        return forever(n + 1)

    back = carry(lambda: forever(0))
    assert type(back) is RecursionError
    names = [f.name for f in traceback.extract_tb(back.__traceback__)]
    assert names[-1] == "forever"
    assert names.count("forever") > 500


def test_long_irregular_traceback_is_shortened_and_says_so(carry):
    branches = "".join(f"    if n == {i}: return f(n + 1)\n" for i in range(600))
    scope: dict[str, Any] = {}
    exec(compile(f"def f(n):\n{branches}    raise ValueError('end')", "gen.py", "exec"), scope)  # noqa: S102  (600 lines)
    back = carry(lambda: scope["f"](0))
    lines = [f.lineno for f in traceback.extract_tb(back.__traceback__) if f.filename == "gen.py"]
    assert type(back) is ValueError
    assert lines[-1] == 602
    assert 150 < len(lines) <= 200
    assert "left out" in back.__notes__[0]


def test_frames_without_line_numbers(carry):
    code = compile("def f(n):\n    return f(n - 1) if n else {}['k']", "gen.py", "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)  # noqa: S102  (its line table is taken away)
    scope["f"].__code__ = scope["f"].__code__.replace(co_linetable=b"")
    exc = catch(lambda: scope["f"](60))
    assert exc.__traceback__.tb_next.tb_next.tb_lineno is None
    back = carry(lambda: scope["f"](60))
    assert type(back) is KeyError
    assert traceback.extract_tb(back.__traceback__)[-1].name == "f"


def test_huge_message_becomes_a_cut_remote_error(carry):
    text = "x" * 50_000_000
    back = carry(thrower(ValueError(text)))
    assert type(back) is RemoteError
    assert "50000000 characters" in back.message
    assert len(back.message) <= MAX_MESSAGE
    assert len(back.text) <= MAX_TEXT + 200


def test_huge_attribute_is_left_behind(carry):
    exc: Any = Plain("small")
    exc.frame, exc.rows = b"x" * 10_000_000, 17
    back = carry(thrower(exc))
    assert type(back) is Plain
    assert back.rows == 17
    assert not hasattr(back, "frame")
    assert "'frame'" in back.__notes__[0]


def test_huge_cause_only_loses_the_cause(carry):
    def both():
        try:
            raise ValueError("y" * 1_000_000)
        except ValueError as exc:
            raise Plain("root") from exc

    back = carry(both)
    assert type(back) is Plain
    assert type(back.__cause__) is RemoteError
    assert "1000000 char" in back.__cause__.message


def test_text_keeps_both_ends_of_a_long_chain():
    report = inline(chain(900, explicit=True))
    assert len(report.text) <= MAX_TEXT + 200
    assert "characters left out" in report.text
    assert "Plain: 0\n" in report.text
    assert report.text.rstrip().endswith("Plain: 899")


def test_text_of_a_recursion_shows_both_ends():
    def forever(n):
        return forever(n + 1)

    def start_here():
        forever(0)

    text = inline(start_here).text
    assert "in start_here" in text
    assert "frames in the middle" in text
    assert "RecursionError" in text


def test_text_has_causes_and_notes():
    def both():
        try:
            raise KeyError("first")
        except KeyError as exc:
            error = Plain("second")
            error.add_note("remember")
            raise error from exc

    text = inline(both).text
    assert "KeyError: 'first'" in text
    assert "direct cause" in text
    assert "second\nremember" in text
