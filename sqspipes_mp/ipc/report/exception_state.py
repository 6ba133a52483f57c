"""The contents of an exception, read and written past the code of its class (worker, keeper and parent).

The class is the user's: its ``__init__`` may want arguments, its ``__getattr__`` may raise, a frozen dataclass refuses
to be written to. ``tblib.pickling_support`` 3.2.2 goes through the class, and of 53 kinds of exceptions in the tests
of reports it brings back 32: no ``UnicodeDecodeError``, ``SyntaxError``, ``SystemExit`` or ``__slots__``, for example.
This module brings back all of them.
"""

from collections.abc import Callable
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any

#: ``args``; ``__dict__`` without notes; fields kept by C code and by ``__slots__``.
State = tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]

_UNSET = object()


def get(exc: BaseException, name: str) -> Any:
    """Return an attribute that every exception, or every exception group, has."""
    descriptor = vars(BaseException).get(name) or vars(BaseExceptionGroup)[name]
    return descriptor.__get__(exc)


def put(exc: BaseException, name: str, value: Any) -> None:
    """Set an attribute that every exception has."""
    vars(BaseException)[name].__set__(exc, value)


def put_notes(exc: BaseException, notes: list[str]) -> None:
    """Replace the notes, if there are any new ones."""
    if notes:
        get(exc, "__dict__")["__notes__"] = notes


def take(exc: BaseException) -> State:
    """Return copies of everything in an exception but its traceback, links and notes."""
    attributes = {key: value for key, value in get(exc, "__dict__").items() if key != "__notes__"}
    fields = {name: _read(descriptor, exc) for name, descriptor in _descriptors(type(exc)).items()}
    return get(exc, "args"), attributes, {name: value for name, value in fields.items() if value is not _UNSET}


def blank(cls: type[BaseException], *group: Any) -> BaseException:
    """Make an instance without running its ``__init__``; ``group``: message and members of an exception group."""
    base: type = cls
    while base.__module__ != "builtins":
        base = base.__base__ or BaseException
    make: Callable[..., BaseException] = base.__new__
    return make(cls, *group)


def fill(exc: BaseException, state: State) -> None:
    """Give a blank instance the contents that ``take`` returned."""
    args, attributes, fields = state
    put(exc, "args", args)
    get(exc, "__dict__").update(attributes)
    descriptors = _descriptors(type(exc))
    for name, value in fields.items():
        # Setting None where C code has nothing changes the text of an OSError.
        if _read(descriptors[name], exc) is not value:
            descriptors[name].__set__(exc, value)


def _descriptors(cls: type) -> dict[str, Any]:
    """Find the fields that instances keep outside ``__dict__``."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base in (BaseExceptionGroup, BaseException, object):
            continue
        for name, value in vars(base).items():
            in_c = base.__module__ == "builtins" and isinstance(value, GetSetDescriptorType)
            if in_c or isinstance(value, MemberDescriptorType):
                found.setdefault(name, value)
    if issubclass(cls, AttributeError):
        # The object without the attribute is of any type and size; Python's own pickling leaves it out, too.
        found.pop("obj", None)
    return found


def _read(descriptor: Any, exc: BaseException) -> Any:
    try:
        return descriptor.__get__(exc)
    except Exception:
        # AttributeError, and TypeError in Unicode errors.
        return _UNSET
