"""Exceptions of every kind, packed and rebuilt: as themselves where that is possible, else as ``RemoteError``."""

import io
import json
import os
import socket
import subprocess
import threading
import traceback
from typing import Any

import pytest

from sqspipes_mp.errors import ConfigError, QueueMissing, RemoteError, TaskTimeout
from tests.unit.report_cases import (
    CustomNew,
    Data,
    ForgetsArgs,
    ForgetsDetail,
    Frozen,
    FrozenSlots,
    GetattrAnything,
    GetattributeRaises,
    GetattrRaises,
    KeywordOnly,
    MyOSError,
    NoSuper,
    Plain,
    ReduceExits,
    ReduceRaises,
    ReduceRecurses,
    ReducesToDict,
    ReducesToException,
    ReducesToOther,
    ReprRaises,
    SetattrRaises,
    Several,
    Slotted,
    StrExits,
    StrRaises,
    StrRecurses,
    Thing,
    TwoBases,
    catch,
    thrower,
)

# --- comes back as itself ---


def test_type_args_attributes_survive(carry):
    exc: Any = Plain("a", 2, None)
    exc.code = {"k": [1]}
    back = carry(thrower(exc))
    assert type(back) is Plain
    assert back.args == ("a", 2, None)
    assert back.code == {"k": [1]}


def test_traceback_has_worker_frames(carry):
    def deep():
        raise Plain("here")

    names = [f.name for f in traceback.extract_tb(carry(deep).__traceback__)]
    assert names[-1] == "deep"


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: KeywordOnly(code=7), ["code", "detail"]),
        (lambda: Several(1, 2), ["first", "second", "third"]),
        (lambda: NoSuper(1, b="x"), ["a", "b"]),
        (lambda: MyOSError("/nope"), ["errno", "strerror", "filename", "path"]),
        (lambda: TwoBases(2, "gone", "f"), ["errno", "filename"]),
        (lambda: CustomNew(1, 2), ["sum"]),
        (lambda: Data(5), ["code", "why"]),
        (lambda: Frozen(5), ["code"]),
        (lambda: OSError("just text"), ["errno", "strerror", "filename"]),
        (lambda: FileNotFoundError(2, "No such file", "a.txt", None, "b.txt"), ["errno", "filename", "filename2"]),
        (lambda: OSError(2, "x", b"bytes-name"), ["errno", "filename"]),
        (lambda: BlockingIOError(11, "again", 5), ["errno", "characters_written"]),
        (
            lambda: UnicodeDecodeError("utf-8", b"\xff\xfe", 0, 1, "bad"),
            ["encoding", "object", "start", "end", "reason"],
        ),
        (lambda: UnicodeEncodeError("ascii", "é\ud800", 0, 1, "bad"), ["encoding", "object", "start", "end", "reason"]),
        (lambda: UnicodeTranslateError("éa", 0, 1, "bad"), ["object", "start", "end", "reason"]),
        (lambda: ImportError("no", name="n", path="p"), ["msg", "name", "path"]),
        (lambda: KeyError("missing"), []),
        (lambda: KeyError(("a", 1)), []),
        (lambda: ValueError(None), []),
        (ValueError, []),
        (lambda: ValueError(b"\x00\xff", float("nan"), (1, 2)), []),
        (lambda: ValueError("lone \ud800 surrogate \x00"), []),
        (MemoryError, []),
        (lambda: StopIteration("v"), ["value"]),
        (
            lambda: subprocess.CalledProcessError(3, ["cmd", "x"], b"out", b"err"),
            ["returncode", "cmd", "output", "stderr"],
        ),
        (lambda: subprocess.TimeoutExpired("cmd", 1.5), ["cmd", "timeout"]),
        (lambda: json.JSONDecodeError("Expecting", "{x", 1), ["msg", "doc", "pos", "lineno", "colno"]),
        (lambda: io.UnsupportedOperation("read"), []),
        (lambda: ConfigError("field", 3, "a string", "do"), ["field", "value", "allowed", "cure"]),
        (lambda: QueueMissing("q", "create it"), ["queue"]),
        (lambda: TaskTimeout("resize", 12, "late"), ["stage", "pid", "cause"]),
        (lambda: RemoteError("a.B", "m", "text"), ["type_name", "message", "text"]),
    ],
)  # fmt: skip
def test_comes_back_as_itself(make, names, carry):
    exc = make()
    back = carry(thrower(exc) if not isinstance(exc, StopIteration) else lambda: next(raising(exc)))
    assert type(back) is type(exc)
    assert str(back) == str(exc)
    assert repr(back.args) == repr(exc.args)
    assert [getattr(back, n) for n in names] == [getattr(exc, n) for n in names]


def raising(exc):
    class Iterator:
        def __next__(self):
            raise exc

    return Iterator()


def test_slots_survive_private_and_unset_ones_too(carry):
    back = carry(thrower(Slotted([1])))
    assert (back.seen, back.hidden()) == ([1], "h")
    assert not hasattr(back, "unset")


@pytest.mark.parametrize(
    ("code", "kind"), [("x = (", SyntaxError), ("if 1:\nx", IndentationError), ("if 1:\n\tx\n        y", TabError)]
)
def test_syntax_errors_keep_all_attributes(code, kind, carry):
    exc = catch(lambda: compile(code, "mine.py", "exec"))
    back = carry(lambda: compile(code, "mine.py", "exec"))
    assert type(back) is type(exc) is kind
    assert str(back) == str(exc)
    for name in ("msg", "filename", "lineno", "offset", "text", "end_lineno", "end_offset"):
        assert getattr(back, name) == getattr(exc, name)


def test_attribute_error_comes_back_without_the_object(carry):
    back = carry(lambda: threading.Lock().nothing)  # type: ignore[attr-defined]
    assert type(back) is AttributeError
    assert back.name == "nothing"
    assert len(back.__notes__) == 1


def test_name_error_keeps_its_name(carry):
    assert carry(lambda: undefined_thing).name == "undefined_thing"  # type: ignore[name-defined]  # noqa: F821


def test_client_error_keeps_response(carry):
    botocore = pytest.importorskip("botocore.exceptions")
    exc = botocore.ClientError({"Error": {"Code": "Throttled", "Message": "slow"}}, "SendMessage")
    back = carry(thrower(exc))
    assert type(back) is botocore.ClientError
    assert back.response == exc.response
    assert str(back) == str(exc)
    missing = carry(thrower(botocore.NoRegionError()))
    assert type(missing) is botocore.NoRegionError
    assert str(missing) == str(botocore.NoRegionError())


def test_modeled_client_error_comes_back_as_client_error(carry):
    botocore = pytest.importorskip("botocore.exceptions")
    modeled = type("QueueDoesNotExist", (botocore.ClientError,), {})
    back = carry(thrower(modeled({"Error": {"Code": "Q", "Message": "m"}}, "ReceiveMessage")))
    assert type(back) is botocore.ClientError
    assert back.response["Error"]["Code"] == "Q"
    assert "QueueDoesNotExist" in back.__notes__[0]


def test_frozen_dataclass_with_slots_gets_its_note(carry):
    back = carry(thrower(FrozenSlots(9)))
    assert type(back) is FrozenSlots
    assert back.code == 9
    assert back.__notes__


# --- cannot be itself ---


def test_local_class_is_remote_error(carry):
    class Local(Exception):
        pass

    back = carry(thrower(Local("bad")))
    assert type(back) is RemoteError
    assert "Local" in back.type_name
    assert back.message == "bad"
    assert "in throw" in back.text
    # A line for those who print it; a traceback shows the worker's.
    assert str(back) == f"{back.type_name}: bad"
    assert back.__notes__ == [f"In the worker:\n{back.text}", "in stage 'resize', worker 4711, message abc"]


@pytest.mark.parametrize(
    "thing",
    [threading.Lock, lambda: open(os.devnull), socket.socket, lambda: (i for i in ())],  # type: ignore[var-annotated]  # noqa: PTH123, SIM115
)
def test_unpicklable_attribute_stays_behind(thing, carry):
    exc: Any = Plain("kept", 1)
    exc.thing, exc.code = thing(), 5
    back = carry(thrower(exc))
    if hasattr(exc.thing, "close"):
        exc.thing.close()
    assert type(back) is Plain
    assert back.args == ("kept", 1)
    assert back.code == 5
    assert not hasattr(back, "thing")
    assert "'thing'" in back.__notes__[0]


def test_unpicklable_argument_is_remote_error(carry):
    back = carry(thrower(ValueError("with", threading.Lock())))
    assert type(back) is RemoteError
    assert back.type_name == "ValueError"
    assert "lock" in back.message


def test_text_that_needs_the_lost_attribute_is_remote_error(carry):
    class Lock:
        def __str__(self):
            return "local"

    back = carry(thrower(NoSuper(Lock(), 1)))
    assert type(back) is RemoteError
    assert back.message == "local/1"


@pytest.mark.parametrize(
    "kind", [StrRaises, StrExits, StrRecurses, GetattrRaises, GetattrAnything, ReprRaises, SetattrRaises]
)
def test_odd_class_comes_back_as_itself(kind, carry):
    back = carry(thrower(kind("odd")))
    assert type(back) is kind
    assert object.__getattribute__(back, "args") == ("odd",)


def test_getattribute_that_raises(carry):
    assert type(carry(thrower(GetattributeRaises("odd")))) is GetattributeRaises


@pytest.mark.parametrize(
    "kind",
    [ReduceRaises, ReduceRecurses, ReduceExits, ReducesToDict, ReducesToOther, ReducesToException, ForgetsArgs],
)
def test_broken_reduce_is_remote_error(kind, carry):
    back = carry(thrower(kind("odd")))
    assert type(back) is RemoteError
    assert kind.__name__ in back.type_name
    assert back.message == "odd"


def test_copy_that_reads_differently_is_remote_error(carry):
    exc = ForgetsDetail("odd")
    exc.detail = "with detail"
    back = carry(thrower(exc))
    assert type(back) is RemoteError
    assert back.message == "odd detail"


def test_addresses_and_the_order_of_sets_may_differ(carry):
    back = carry(thrower(ValueError(Thing(), {f"key{i}" for i in range(50)})))
    assert type(back) is ValueError
    assert type(back.args[0]) is Thing
    assert len(back.args[1]) == 50


@pytest.mark.parametrize("notes", [["ok", 3, None, b"x"], [threading.Lock()], "just text", 7, ("t",), [ReprRaises()]])
def test_notes_that_are_not_strings(notes, carry):
    exc = Plain("x")
    exc.__notes__ = notes
    back = carry(thrower(exc))
    assert type(back) is Plain
    assert all(isinstance(n, str) for n in back.__notes__)
    assert "in stage 'resize'" in back.__notes__[-1]
    assert not any("stayed" in n for n in back.__notes__)
    traceback.format_exception(back)
