"""Odd exceptions, found by packing many: each comes back as itself, or as ``RemoteError`` with its name and text."""

import os
import threading
import traceback
from typing import Any

import pytest

from sqspipes_mp.errors import RemoteError
from sqspipes_mp.ipc.report.report import Report, rebuild
from tests.unit.report_cases import Plain, catch, inline, thrower


class Text(str):
    """A string that does nothing as it should."""

    __slots__ = ()

    def __len__(self):
        raise RuntimeError("len")

    def __getitem__(self, index):
        raise RuntimeError("item")

    def __format__(self, spec):
        raise RuntimeError("format")


class OddText(Exception):
    def __str__(self):
        return Text("odd text")


class LocalText(Exception):
    def __str__(self):
        return type("Local", (str,), {})("local text")


class GetstateRaises(Exception):
    def __getstate__(self):
        raise RuntimeError("no state")


class SetstateRaises(Exception):
    def __setstate__(self, state):
        raise RuntimeError("no state")


class Falsy(Exception):
    def __bool__(self):
        return False


class EqualsAnything(Exception):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other):
        return True


class SlottedLock(Exception):
    __slots__ = ("code", "lock")

    def __init__(self):
        super().__init__("slots")
        self.code, self.lock = 7, threading.Lock()


class ArgsRaise(Exception):
    @property
    def args(self):
        raise RuntimeError("no args")

    @args.setter
    def args(self, value):
        raise RuntimeError("no args")


class KeywordGroup(ExceptionGroup):
    def __new__(cls, *, members):
        return super().__new__(cls, "several", members)

    def __init__(self, *, members):
        self.count = len(members)


class ReducesToOtherArgs(Exception):
    def __reduce__(self):
        return ReducesToOtherArgs, ("others",)


class ReducesWithLock(Exception):
    def __reduce__(self):
        return ReducesWithLock, self.args, {"lock": threading.Lock()}


class RaisesOnLoad:
    def __reduce__(self):
        return os.stat, ("/no such file",)


class Named:
    """Refers to nothing that a module has."""

    def __reduce__(self):
        return "nothing_of_this_name"


@pytest.mark.parametrize(
    "kind",
    [OddText, LocalText, GetstateRaises, SetstateRaises, Falsy, EqualsAnything, ArgsRaise],
    ids=lambda k: k.__name__,
)
def test_as_itself(kind, carry):
    back = carry(thrower(kind("odd")))
    assert type(back) is kind
    assert traceback.extract_tb(back.__traceback__)[-1].name == "throw"


@pytest.mark.parametrize("kind", [ReducesToOtherArgs, ReducesWithLock], ids=lambda k: k.__name__)
def test_a_reduction_that_lies_or_fails_is_remote_error(kind, carry):
    back = carry(thrower(kind("mine")))
    assert type(back) is RemoteError
    assert (back.type_name, back.message) == (f"{kind.__module__}.{kind.__name__}", "mine")
    assert "in throw" in back.text


@pytest.mark.parametrize("kind", [OddText, LocalText])
def test_text_of_a_subclass_of_str_is_plain(kind):
    report = inline(thrower(kind()))
    assert type(report.message) is str
    assert report.message in {"odd text", "local text"}
    assert report.message in report.text


def test_notes_of_a_subclass_of_str_are_plain(carry):
    exc = Plain("x")
    exc.__notes__ = [Text("mine")]
    back = carry(thrower(exc))
    assert type(back) is Plain
    assert [type(back.__notes__[0]), back.__notes__[0]] == [str, "mine"]


def test_many_large_notes_leave_room_for_nothing_else(carry):
    exc = Plain("x")
    exc.__notes__ = ["\U0001f600" * 5000] * 40
    back = carry(thrower(exc))
    assert type(back) is RemoteError
    assert back.message == "x"
    assert len(back.__notes__) == 34


def test_a_falsy_cause_is_a_cause(carry):
    def both():
        raise Plain("root") from Falsy("no")

    back = carry(both)
    assert type(back.__cause__) is Falsy


def test_a_cause_of_itself_and_a_member_that_refers_to_its_group(carry):
    own: Any = Plain("own")
    own.__cause__ = own
    back = carry(thrower(own))
    assert back.__cause__ is back
    member: Any = Plain("member")
    member.__cause__ = ExceptionGroup("group", [member])
    back = carry(thrower(member.__cause__))
    assert back.exceptions[0].__cause__ is back


def test_a_group_with_a_keyword_and_members_that_equal_each_other(carry):
    back = carry(thrower(KeywordGroup(members=[EqualsAnything(1), EqualsAnything(2), Falsy(3)])))
    assert (type(back), back.count, back.message) == (KeywordGroup, 3, "several")
    assert [member.args for member in back.exceptions] == [(1,), (2,), (3,)]


def test_a_recursion_in_a_cause(carry):
    def forever(n):
        return forever(n + 1)

    def both():
        try:
            forever(0)
        except RecursionError as error:
            raise Plain("after") from error

    back = carry(both)
    assert type(back.__cause__) is RecursionError
    assert len(traceback.extract_tb(back.__cause__.__traceback__)) > 500


def test_a_lock_in_a_slot_stays_behind(carry):
    back = carry(thrower(SlottedLock()))
    assert (type(back), back.code) == (SlottedLock, 7)
    assert not hasattr(back, "lock")
    assert "'lock'" in back.__notes__[0]


@pytest.mark.parametrize("value", [RaisesOnLoad(), Named(), lambda: 1])
def test_an_attribute_that_cannot_be_loaded_stays_behind(value, carry):
    exc: Any = Plain("kept")
    exc.value, exc.code = value, 5
    back = carry(thrower(exc))
    assert (type(back), back.code, hasattr(back, "value")) == (Plain, 5, False)
    assert "'value'" in back.__notes__[0]


def test_an_attribute_nested_too_deep_stays_behind(carry):
    exc: Any = Plain("kept")
    exc.value, exc.code = [], 5
    for _ in range(100_000):
        exc.value = [exc.value]
    back = carry(thrower(exc))
    assert (type(back), back.code, hasattr(back, "value")) == (Plain, 5, False)


def test_an_exit_with_a_lock_is_remote_error(carry):
    back = carry(thrower(SystemExit(threading.Lock())))
    assert type(back) is RemoteError
    assert (back.type_name, "lock" in back.message) == ("SystemExit", True)


@pytest.mark.parametrize("make", [lambda: 7, list])
def test_frames_of_odd_names(make, carry):
    scope: dict[str, Any] = {"__name__": make()}
    exec(compile("def f():\n    raise ValueError('odd')", "odd-\udcff\n.py", "exec"), scope)  # noqa: S102  (a file of that name)
    last = traceback.extract_tb(carry(scope["f"]).__traceback__)[-1]
    assert (last.filename, last.name, last.lineno) == ("odd-\udcff\n.py", "f", 2)


def test_damaged_bytes_never_raise():
    report = inline(thrower(catch(thrower(ExceptionGroup("g", [KeyError(1), OSError(2, "gone", "f")])))))
    data = report.to_bytes()
    for at in range(0, len(data), 3):
        for damaged in (data[:at], data[:at] + b"\xff" + data[at + 1 :], data[:at] + data[at + 2 :]):
            assert isinstance(rebuild(Report.from_bytes(damaged)), BaseException)
