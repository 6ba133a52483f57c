"""report.py: exceptions raised in a real forked child (and in this process) and rebuilt here."""

import dataclasses
import importlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import traceback
import types

import pytest

from sqspipes_mp.errors import ConfigError, QueueMissing, RemoteError, TaskTimeout
from sqspipes_mp.report import MAX_MESSAGE, MAX_PICKLED, MAX_TEXT, Report, pack_exception, rebuild


def catch(raiser):
    try:
        raiser()
    except BaseException as exc:
        return exc
    raise AssertionError("nothing was raised")


def pack(exc, **over):
    return pack_exception(exc, **{"stage": "resize", "pid": 4711, "message_id": "abc", **over})


def inline(raiser):
    return Report.from_bytes(pack(catch(raiser)).to_bytes())


def forked(raiser):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            os.close(read)
            with os.fdopen(write, "wb") as pipe:
                pipe.write(pack(catch(raiser)).to_bytes())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return Report.from_bytes(data)


@pytest.fixture(params=[inline, forked], ids=["inline", "forked"])
def carry(request):
    return lambda raiser: rebuild(request.param(raiser))


def thrower(exc):
    def throw():
        raise exc

    return throw


# --- exception classes: module level, so that they can be found by name ---


class Plain(Exception):
    pass


class KeywordOnly(Exception):
    def __init__(self, *, code, detail="none"):
        self.code, self.detail = code, detail
        super().__init__(f"code {code}")


class Several(Exception):
    def __init__(self, first, second, third=3):
        super().__init__(f"{first}-{second}")
        self.first, self.second, self.third = first, second, third


class NoSuper(Exception):
    def __init__(self, a, b):
        self.a, self.b = a, b

    def __str__(self):
        return f"{self.a}/{self.b}"


class Slotted(Exception):
    __slots__ = ("__hidden", "seen", "unset")

    def __init__(self, seen):
        super().__init__("slots")
        self.seen, self.__hidden = seen, "h"

    def hidden(self):
        return self.__hidden


class MyOSError(OSError):
    def __init__(self, path):
        super().__init__(13, "denied", path)
        self.path = path


class TwoBases(ValueError, OSError):
    pass


class CustomNew(Exception):
    def __new__(cls, a, b):
        return super().__new__(cls, a, b)

    def __init__(self, a, b):
        super().__init__(a, b)
        self.sum = a + b


class CountsInits(Exception):
    inits = 0

    def __init__(self, *args):
        super().__init__(*args)
        type(self).inits += 1


@dataclasses.dataclass
class Data(Exception):
    code: int
    why: str = "w"


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots(Exception):
    code: int


class StrRaises(Exception):
    def __str__(self):
        raise ValueError("no str")


class StrExits(Exception):
    def __str__(self):
        sys.exit(3)


class StrRecurses(Exception):
    def __str__(self):
        return str(self)


class ReprRaises(Exception):
    def __repr__(self):
        raise ValueError("no repr")


class ReduceRaises(Exception):
    def __reduce__(self):
        raise ValueError("no reduce")


class ReduceRecurses(Exception):
    def __reduce__(self):
        return self.__reduce__()


class ReduceExits(Exception):
    def __reduce__(self):
        sys.exit(0)


def not_an_exception(*_):
    return {"no": "exception"}


class ReducesToDict(Exception):
    def __reduce__(self):
        return not_an_exception, ()


class ReducesToOther(Exception):
    def __reduce__(self):
        return KeyError, self.args


class ReducesToException(Exception):
    def __reduce__(self):
        return Exception, self.args


class ForgetsDetail(Exception):
    detail = "none"

    def __str__(self):
        return f"odd{self.detail[4:]}"

    def __reduce__(self):
        return ForgetsDetail, self.args


class ForgetsArgs(Exception):
    def __str__(self):
        return "odd"

    def __reduce__(self):
        return ForgetsArgs, ()


class Thing:
    """Prints its address."""


class BreaksHere(Exception):
    """Packs and loads in the worker, exits the process that loads it elsewhere."""

    def __init__(self, pid):
        if pid != os.getpid():
            sys.exit("loaded in the parent")
        super().__init__(pid)

    def __reduce__(self):
        return BreaksHere, (self.args[0],)


class GetattrRaises(Exception):
    def __getattr__(self, name):
        raise RuntimeError(name)


class GetattrAnything(Exception):
    def __getattr__(self, name):
        return self


class GetattributeRaises(Exception):
    def __getattribute__(self, name):
        raise RuntimeError(name)


class SetattrRaises(Exception):
    def __setattr__(self, name, value):
        raise RuntimeError(name)


class MyGroup(ExceptionGroup):
    def derive(self, excs):
        return MyGroup(self.message, excs)


# --- comes back as itself ---


def test_type_args_attributes_survive(carry):
    exc = Plain("a", 2, None)
    exc.code = {"k": [1]}
    back = carry(thrower(exc))
    assert type(back) is Plain and back.args == ("a", 2, None) and back.code == {"k": [1]}


def test_traceback_has_worker_frames(carry):
    def deep():
        raise Plain("here")

    names = [f.name for f in traceback.extract_tb(carry(lambda: deep()).__traceback__)]
    assert names[-1] == "deep"


def test_printed_frames_show_source_without_stray_carets():
    def deep():
        raise Plain("here")

    shown = "".join(traceback.format_exception(rebuild(forked(deep))))
    assert 'raise Plain("here")' in shown and "^" not in shown


def test_raised_again_it_keeps_the_worker_frames():
    def worker_side():
        raise Plain("x")

    back = rebuild(forked(worker_side))
    again = catch(thrower(back))
    assert again is back
    assert "worker_side" in [f.name for f in traceback.extract_tb(again.__traceback__)]


def test_stage_note_comes_last(carry):
    exc = Plain("x")
    exc.add_note("mine")
    assert carry(thrower(exc)).__notes__ == ["mine", "in stage 'resize', worker 4711, message abc"]


def test_extra_note_and_no_message_id():
    back = rebuild(pack(Plain("x"), message_id=None, note="while booting"))
    assert back.__notes__ == ["while booting", "in stage 'resize', worker 4711"]


def test_the_original_is_left_as_it_was():
    exc = catch(thrower(Plain("x")))
    before = (exc.__traceback__, dict(exc.__dict__))
    pack(exc)
    assert (exc.__traceback__, exc.__dict__) == before


@pytest.mark.parametrize(
    "make, names",
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
        (lambda: UnicodeDecodeError("utf-8", b"\xff\xfe", 0, 1, "bad"), ["encoding", "object", "start", "end", "reason"]),
        (lambda: UnicodeEncodeError("ascii", "é\ud800", 0, 1, "bad"), ["encoding", "object", "start", "end", "reason"]),
        (lambda: UnicodeTranslateError("éa", 0, 1, "bad"), ["object", "start", "end", "reason"]),
        (lambda: ImportError("no", name="n", path="p"), ["msg", "name", "path"]),
        (lambda: KeyError("missing"), []),
        (lambda: KeyError(("a", 1)), []),
        (lambda: ValueError(None), []),
        (lambda: ValueError(), []),
        (lambda: ValueError(b"\x00\xff", float("nan"), (1, 2)), []),
        (lambda: ValueError("lone \ud800 surrogate \x00"), []),
        (lambda: MemoryError(), []),
        (lambda: KeyboardInterrupt(), []),
        (lambda: SystemExit(3), ["code"]),
        (lambda: SystemExit(), ["code"]),
        (lambda: GeneratorExit("g"), []),
        (lambda: StopIteration("v"), ["value"]),
        (lambda: subprocess.CalledProcessError(3, ["cmd", "x"], b"out", b"err"), ["returncode", "cmd", "output", "stderr"]),
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
    assert (back.seen, back.hidden()) == ([1], "h") and not hasattr(back, "unset")


@pytest.mark.parametrize(
    "code, kind", [("x = (", SyntaxError), ("if 1:\nx", IndentationError), ("if 1:\n\tx\n        y", TabError)]
)
def test_syntax_errors_keep_all_attributes(code, kind, carry):
    exc = catch(lambda: compile(code, "mine.py", "exec"))
    back = carry(lambda: compile(code, "mine.py", "exec"))
    assert type(back) is type(exc) is kind and str(back) == str(exc)
    for name in ("msg", "filename", "lineno", "offset", "text", "end_lineno", "end_offset"):
        assert getattr(back, name) == getattr(exc, name)


def test_attribute_error_comes_back_without_the_object(carry):
    back = carry(lambda: threading.Lock().nothing)
    assert type(back) is AttributeError and back.name == "nothing"
    assert len(back.__notes__) == 1


def test_name_error_keeps_its_name(carry):
    assert carry(lambda: undefined_thing).name == "undefined_thing"  # noqa: F821


def test_no_init_runs_while_rebuilding():
    report = inline(thrower(CountsInits("x")))
    before = CountsInits.inits
    assert type(rebuild(report)) is CountsInits and CountsInits.inits == before


def test_client_error_keeps_response(carry):
    botocore = pytest.importorskip("botocore.exceptions")
    exc = botocore.ClientError({"Error": {"Code": "Throttled", "Message": "slow"}}, "SendMessage")
    back = carry(thrower(exc))
    assert type(back) is botocore.ClientError and back.response == exc.response and str(back) == str(exc)
    missing = carry(thrower(botocore.NoRegionError()))
    assert type(missing) is botocore.NoRegionError and str(missing) == str(botocore.NoRegionError())


def test_modeled_client_error_comes_back_as_client_error(carry):
    botocore = pytest.importorskip("botocore.exceptions")
    modeled = type("QueueDoesNotExist", (botocore.ClientError,), {})
    back = carry(thrower(modeled({"Error": {"Code": "Q", "Message": "m"}}, "ReceiveMessage")))
    assert type(back) is botocore.ClientError and back.response["Error"]["Code"] == "Q"
    assert "QueueDoesNotExist" in back.__notes__[0]


def test_frozen_dataclass_with_slots_gets_its_note(carry):
    back = carry(thrower(FrozenSlots(9)))
    assert type(back) is FrozenSlots and back.code == 9 and back.__notes__


# --- chains and groups ---


def chain(length, explicit):
    def raise_it():
        current = None
        for i in range(length):
            try:
                if explicit and current is not None:
                    raise Plain(i) from current
                elif current is not None:
                    try:
                        raise current
                    except Plain:
                        raise Plain(i)
                else:
                    raise Plain(i)
            except Plain as exc:
                current = exc
        raise current

    return raise_it


def walk(exc, link):
    seen = []
    while exc is not None:
        seen.append(exc)
        exc = getattr(exc, link)
    return seen


def test_fifty_causes(carry):
    back = walk(carry(chain(50, explicit=True)), "__cause__")
    assert [e.args for e in back] == [(i,) for i in reversed(range(50))]
    assert all(type(e) is Plain and e.__traceback__ for e in back) and back[0].__suppress_context__


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
    assert type(back) is Plain and 100 < len(walk(back, "__context__")) < 1500
    assert "did not fit" in back.__notes__[0]


def test_from_none_stays_suppressed(carry):
    def from_none():
        try:
            raise KeyError("inner")
        except KeyError:
            raise Plain("outer") from None

    back = carry(from_none)
    assert back.__cause__ is None and back.__suppress_context__ and type(back.__context__) is KeyError


def test_cyclic_chain(carry):
    a, b = Plain("a"), Plain("b")
    a.__context__, b.__context__ = b, a
    back = carry(thrower(a))
    assert back.__context__.args == ("b",) and back.__context__.__context__ is back


def test_same_exception_twice_is_one_again(carry):
    inner = Plain("inner")

    def both():
        try:
            raise inner
        except Plain as exc:
            raise Several(1, 2) from exc

    back = carry(both)
    assert back.__cause__ is back.__context__ and back.__cause__.args == ("inner",)


def test_exception_raised_twice_reports_twice():
    exc = Plain("again")
    first, second = inline(thrower(exc)), inline(thrower(exc))
    assert rebuild(first).__notes__ == rebuild(second).__notes__ and len(rebuild(second).__notes__) == 1
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
    assert type(back) is Plain and type(back.__cause__) is RemoteError
    assert "Local" in back.__cause__.type_name and back.__cause__.message == "bad"
    assert "in both" in back.__cause__.text and type(back.__cause__.__cause__) is KeyError


def test_group_nested_with_notes(carry):
    inner = ExceptionGroup("inner", [KeyError("k"), OSError(2, "gone", "f")])
    inner.add_note("inner note")
    outer = MyGroup("outer", [inner, KeywordOnly(code=1)])
    back = carry(thrower(outer))
    assert type(back) is MyGroup and back.message == "outer" and str(back) == str(outer)
    assert back.exceptions[0].__notes__ == ["inner note"]
    assert back.exceptions[0].exceptions[1].filename == "f" and back.exceptions[1].code == 1


def test_only_the_culprit_of_a_group_is_replaced(carry):
    class Local(Exception):
        pass

    back = carry(thrower(ExceptionGroup("g", [ValueError("fine"), Local("bad")])))
    assert type(back) is ExceptionGroup
    assert [type(e) for e in back.exceptions] == [ValueError, RemoteError]


def test_base_group_keeps_keyboard_interrupt(carry):
    back = carry(thrower(BaseExceptionGroup("g", [KeyboardInterrupt(), SystemExit(2)])))
    assert type(back) is BaseExceptionGroup and back.exceptions[1].code == 2


def test_deeply_nested_group_never_kills(carry):
    group = ValueError("core")
    for i in range(60):
        group = ExceptionGroup(str(i), [group])
    back = carry(thrower(group))
    for _ in range(60):
        assert type(back) is ExceptionGroup
        back = back.exceptions[0]
    assert type(back) is ValueError


def test_group_too_deep_to_load_still_reports(carry):
    group = ValueError("core")
    for i in range(600):
        group = ExceptionGroup(str(i), [group])
    back = carry(thrower(group))
    assert isinstance(back, (ExceptionGroup, RemoteError)) and back.__notes__


def test_exceptions_in_attributes_and_args(carry):
    inner = catch(thrower(KeywordOnly(code=4)))
    exc = Plain("outer", inner)
    exc.inner = inner
    back = carry(thrower(exc))
    assert back.inner is back.args[1] and back.inner.code == 4 and back.inner.__traceback__


def test_attributes_may_refer_back(carry):
    exc = Plain("self")
    exc.me = exc
    exc.members = [child := Plain("child")]
    child.parent = exc
    back = carry(thrower(exc))
    assert type(back) is Plain and back.me is back and type(back.members[0]) is Plain
    assert type(back.members[0].parent) is RemoteError and back.members[0].parent.message == "left out of the report"


# --- deep, large ---


def test_recursion_error_is_itself_with_both_ends(carry):
    def forever(n):
        return forever(n + 1)

    back = carry(lambda: forever(0))
    assert type(back) is RecursionError
    names = [f.name for f in traceback.extract_tb(back.__traceback__)]
    assert names[-1] == "forever" and names.count("forever") > 500


def test_long_irregular_traceback_is_shortened_and_says_so(carry):
    lines = "".join(f"    if n == {i}: return f(n + 1)\n" for i in range(600))
    scope = {}
    exec(compile(f"def f(n):\n{lines}    raise ValueError('end')", "gen.py", "exec"), scope)
    back = carry(lambda: scope["f"](0))
    lines = [f.lineno for f in traceback.extract_tb(back.__traceback__) if f.filename == "gen.py"]
    assert type(back) is ValueError and lines[-1] == 602 and 150 < len(lines) <= 200
    assert "left out" in back.__notes__[0]


def test_frames_without_line_numbers(carry):
    code = compile("def f(n):\n    return f(n - 1) if n else {}['k']", "gen.py", "exec")
    scope = {}
    exec(code, scope)
    scope["f"].__code__ = scope["f"].__code__.replace(co_linetable=b"")
    exc = catch(lambda: scope["f"](60))
    assert exc.__traceback__.tb_next.tb_next.tb_lineno is None
    back = carry(lambda: scope["f"](60))
    assert type(back) is KeyError and traceback.extract_tb(back.__traceback__)[-1].name == "f"


def test_huge_message_becomes_a_cut_remote_error(carry):
    text = "x" * 50_000_000
    back = carry(thrower(ValueError(text)))
    assert type(back) is RemoteError and "50000000 characters" in back.message
    assert len(back.message) <= MAX_MESSAGE and len(back.text) <= MAX_TEXT + 200


def test_huge_attribute_is_left_behind(carry):
    exc = Plain("small")
    exc.frame, exc.rows = b"x" * 10_000_000, 17
    back = carry(thrower(exc))
    assert type(back) is Plain and back.rows == 17 and not hasattr(back, "frame")
    assert "'frame'" in back.__notes__[0]


def test_huge_cause_only_loses_the_cause(carry):
    def both():
        try:
            raise ValueError("y" * 1_000_000)
        except ValueError as exc:
            raise Plain("root") from exc

    back = carry(both)
    assert type(back) is Plain and type(back.__cause__) is RemoteError and "1000000 char" in back.__cause__.message


def test_text_keeps_both_ends_of_a_long_chain():
    report = inline(chain(900, explicit=True))
    assert len(report.text) <= MAX_TEXT + 200 and "characters left out" in report.text
    assert "Plain: 0\n" in report.text and report.text.rstrip().endswith("Plain: 899")


def test_text_of_a_recursion_shows_both_ends():
    def forever(n):
        return forever(n + 1)

    def start_here():
        forever(0)

    text = inline(start_here).text
    assert "in start_here" in text and "frames in the middle" in text and "RecursionError" in text


def test_text_has_causes_and_notes():
    def both():
        try:
            raise KeyError("first")
        except KeyError as exc:
            error = Plain("second")
            error.add_note("remember")
            raise error from exc

    text = inline(both).text
    assert "KeyError: 'first'" in text and "direct cause" in text and "second\nremember" in text


# --- cannot be itself ---


def test_local_class_is_remote_error(carry):
    class Local(Exception):
        pass

    back = carry(thrower(Local("bad")))
    assert type(back) is RemoteError and "Local" in back.type_name and back.message == "bad"
    assert "in throw" in back.text and back.__notes__ == ["in stage 'resize', worker 4711, message abc"]


@pytest.mark.parametrize(
    "thing", [threading.Lock, lambda: open(os.devnull), lambda: socket.socket(), lambda: (i for i in ())]
)
def test_unpicklable_attribute_stays_behind(thing, carry):
    exc = Plain("kept", 1)
    exc.thing, exc.code = thing(), 5
    back = carry(thrower(exc))
    if hasattr(exc.thing, "close"):
        exc.thing.close()
    assert type(back) is Plain and back.args == ("kept", 1) and back.code == 5 and not hasattr(back, "thing")
    assert "'thing'" in back.__notes__[0]


def test_unpicklable_argument_is_remote_error(carry):
    back = carry(thrower(ValueError("with", threading.Lock())))
    assert type(back) is RemoteError and back.type_name == "ValueError" and "lock" in back.message


def test_text_that_needs_the_lost_attribute_is_remote_error(carry):
    class Lock:
        def __str__(self):
            return "local"

    back = carry(thrower(NoSuper(Lock(), 1)))
    assert type(back) is RemoteError and back.message == "local/1"


@pytest.mark.parametrize(
    "kind", [StrRaises, StrExits, StrRecurses, GetattrRaises, GetattrAnything, ReprRaises, SetattrRaises]
)
def test_odd_class_comes_back_as_itself(kind, carry):
    back = carry(thrower(kind("odd")))
    assert type(back) is kind and object.__getattribute__(back, "args") == ("odd",)


def test_getattribute_that_raises(carry):
    assert type(carry(thrower(GetattributeRaises("odd")))) is GetattributeRaises


@pytest.mark.parametrize(
    "kind",
    [ReduceRaises, ReduceRecurses, ReduceExits, ReducesToDict, ReducesToOther, ReducesToException, ForgetsArgs],
)
def test_broken_reduce_is_remote_error(kind, carry):
    back = carry(thrower(kind("odd")))
    assert type(back) is RemoteError and kind.__name__ in back.type_name and back.message == "odd"


def test_copy_that_reads_differently_is_remote_error(carry):
    exc = ForgetsDetail("odd")
    exc.detail = "with detail"
    back = carry(thrower(exc))
    assert type(back) is RemoteError and back.message == "odd detail"


def test_addresses_and_the_order_of_sets_may_differ(carry):
    back = carry(thrower(ValueError(Thing(), {f"key{i}" for i in range(50)})))
    assert type(back) is ValueError and type(back.args[0]) is Thing and len(back.args[1]) == 50


def test_loading_that_exits_only_here_is_remote_error():
    report = forked(lambda: thrower(BreaksHere(os.getpid()))())
    assert report.pickled is not None and type(rebuild(report)) is RemoteError


@pytest.mark.parametrize("notes", [["ok", 3, None, b"x"], [threading.Lock()], "just text", 7, ("t",), [ReprRaises()]])
def test_notes_that_are_not_strings(notes, carry):
    exc = Plain("x")
    exc.__notes__ = notes
    back = carry(thrower(exc))
    assert type(back) is Plain and all(isinstance(n, str) for n in back.__notes__)
    assert "in stage 'resize'" in back.__notes__[-1] and not any("stayed" in n for n in back.__notes__)
    traceback.format_exception(back)


def test_module_unknown_here_is_not_imported(tmp_path):
    (tmp_path / "only_in_worker.py").write_text("class Far(Exception): pass\n")

    def far():
        sys.path.insert(0, str(tmp_path))
        raise importlib.import_module("only_in_worker").Far("away")

    report = forked(far)
    sys.path.insert(0, str(tmp_path))
    try:
        back = rebuild(report)
    finally:
        sys.path.remove(str(tmp_path))
    assert type(back) is RemoteError and back.type_name == "only_in_worker.Far" and back.message == "away"
    assert "only_in_worker" not in sys.modules


def test_lazy_module_is_not_made_to_load(monkeypatch):
    asked = []
    module = types.ModuleType("lazy_here")
    module.__getattr__ = lambda name: asked.append(name) or ValueError
    monkeypatch.setitem(sys.modules, "lazy_here", module)

    def far():
        kind = type("Far", (Exception,), {"__module__": "lazy_here"})
        module.Far = kind
        raise kind("away")

    report = forked(far)
    asked.clear()
    assert type(rebuild(report)) is RemoteError and not asked


def test_unknown_module_in_a_cause_only_loses_the_cause(tmp_path):
    (tmp_path / "far_cause.py").write_text("class Far(Exception): pass\n")

    def far():
        sys.path.insert(0, str(tmp_path))
        try:
            raise importlib.import_module("far_cause").Far("away")
        except Exception as exc:
            raise Plain("near") from exc

    back = rebuild(forked(far))
    assert type(back) is Plain and back.__cause__.type_name == "far_cause.Far" and "far_cause" not in sys.modules


# --- reports ---


def test_report_round_trip():
    report = Report("a.B", "mé\ud800", "text\n", b"\x00\x01", ("n",))
    assert Report.from_bytes(report.to_bytes()) == report
    empty = Report("a.B", "", "", None)
    assert Report.from_bytes(empty.to_bytes()) == empty


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xff" * 50, b"\x00\x00\x00\x02{}", b"\x00\x00\x00\x02[]", pickle.dumps(1)]
)
def test_garbage_is_a_report_that_says_so(data):
    report = Report.from_bytes(data)
    assert report.type_name == "unreadable report" and type(rebuild(report)) is RemoteError


@pytest.mark.parametrize("pickled", [b"", b"\x00\x00\x00\x02{}", b"garbage" * 9, pickle.dumps(ValueError("x"))])
def test_garbage_pickle_is_remote_error(pickled):
    back = rebuild(Report("a.B", "m", "t", pickled, ("n",)))
    assert type(back) is RemoteError and back.__notes__ == ["n"]


@pytest.mark.parametrize("cut", range(0, 400, 37))
def test_damaged_pickle_never_raises(cut):
    report = inline(thrower(KeywordOnly(code=3)))
    damaged = report.pickled[:cut] + b"\xff" + report.pickled[cut + 1 :]
    assert isinstance(rebuild(dataclasses.replace(report, pickled=damaged)), BaseException)
    assert isinstance(rebuild(dataclasses.replace(report, pickled=report.pickled[:cut])), BaseException)


def test_engine_frames_are_hidden_only_around_the_user():
    scope = {"__name__": "sqspipes_mp.worker.runner"}
    exec("def engine(fn):\n    fn()\ndef own():\n    raise ValueError('ours')", scope)

    def task():
        raise Plain("theirs")

    def through_engine():
        try:
            scope["engine"](task)
        except Plain as exc:
            return exc.with_traceback(exc.__traceback__.tb_next)
        raise AssertionError

    report = pack(through_engine())
    assert [f.name for f in traceback.extract_tb(rebuild(report).__traceback__)] == ["task"]
    assert "engine" not in report.text
    exc = catch(scope["own"])
    exc = exc.with_traceback(exc.__traceback__.tb_next)
    assert [f.name for f in traceback.extract_tb(rebuild(pack(exc)).__traceback__)] == ["own"]


def test_nothing_is_registered_in_this_process():
    import copyreg

    before = dict(copyreg.dispatch_table)
    rebuild(inline(chain(3, explicit=True)))
    assert copyreg.dispatch_table == before


def test_works_where_tblib_is_installed_by_others(carry):
    script = """
        import tblib.pickling_support; tblib.pickling_support.install()
        from sqspipes_mp.report import pack_exception, rebuild
        try: b"\\xff".decode()
        except UnicodeDecodeError as e:
            back = rebuild(pack_exception(e, stage="s", pid=1, message_id=None))
            assert type(back) is UnicodeDecodeError and str(back) == str(e), back
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_classes_of_main_come_back_in_every_start_method(method, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        from sqspipes_mp.report import Report, pack_exception, rebuild

        class Mine(Exception):
            def __init__(self, *, code):
                super().__init__(code)
                self.code = code

        def child(sock):
            try:
                raise Mine(code=5)
            except Mine as exc:
                sock.sendall(pack_exception(exc, stage="s", pid=1, message_id="m").to_bytes())
            sock.close()

        if __name__ == "__main__":
            import socket
            ours, theirs = socket.socketpair()
            process = multiprocessing.get_context(sys.argv[1]).Process(target=child, args=(theirs,))
            process.start()
            theirs.close()
            data = b"".join(iter(lambda: ours.recv(65536), b""))
            process.join()
            back = rebuild(Report.from_bytes(data))
            assert type(back) is Mine and back.code == 5, (type(back), back)
        """)
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}
    subprocess.run([sys.executable, str(script), method], check=True, timeout=60, env=env)
