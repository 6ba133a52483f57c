"""What the tests of reports raise, and ways to carry it here: in this process, and out of a real forked child."""

import dataclasses
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from sqspipes_mp.ipc.report.report import Report, pack_exception


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


def thrower(exc):
    def throw():
        raise exc

    return throw


def chain(length, explicit):
    def raise_it():
        current = None
        for i in range(length):
            try:
                if explicit and current is not None:
                    raise Plain(i) from current
                if current is not None:
                    try:
                        raise current
                    except Plain:
                        raise Plain(i)  # noqa: B904  (the context is what is looked for)
                else:
                    raise Plain(i)
            except Plain as exc:
                current = exc
        assert current is not None
        raise current

    return raise_it


def walk(exc, link):
    seen = []
    while exc is not None:
        seen.append(exc)
        exc = getattr(exc, link)
    return seen


# --- exception classes: module level, so that they can be found by name ---


class Plain(Exception):
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Whatever a test has put there."""


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
    def __str__(self):  # noqa: PLE0307  (it never returns)
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
        return ValueError, self.args


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


class InterruptedHere(Exception):
    """Packs and loads in the worker; where it is loaded elsewhere, somebody presses Ctrl-C just then."""

    def __init__(self, pid):
        if pid != os.getpid():
            signal.raise_signal(signal.SIGINT)
        super().__init__(pid)

    def __reduce__(self):
        return InterruptedHere, (self.args[0],)


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
