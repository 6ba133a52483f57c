"""What an exception holds, read and written past the code of its class (worker, keeper and parent).

The class is the user's: its ``__init__`` may want arguments, its ``__getattr__`` may raise, a frozen dataclass refuses
to be written to.
"""

from collections.abc import Callable, Iterable
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any

_RAW = vars(BaseException)

#: ``args``; ``__dict__`` without notes; what C code and ``__slots__`` keep elsewhere.
State = tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]


def get(exc: BaseException, name: str) -> Any:
    """Return an attribute that every exception, or every exception group, has."""
    raw = _RAW.get(name) or vars(BaseExceptionGroup)[name]
    return raw.__get__(exc)


def put(exc: BaseException, name: str, value: Any) -> None:
    """Set an attribute that every exception has."""
    _RAW[name].__set__(exc, value)


def put_notes(exc: BaseException, notes: Iterable[str]) -> None:
    """Replace the notes, if there are any new ones."""
    if listed := list(notes):
        get(exc, "__dict__")["__notes__"] = listed


def take(exc: BaseException) -> State:
    """Return copies of all an exception holds but its traceback, links and notes."""
    attributes = {key: value for key, value in get(exc, "__dict__").items() if key != "__notes__"}
    fields: dict[str, Any] = {}
    for name, descriptor in _descriptors(type(exc)).items():
        try:
            fields[name] = descriptor.__get__(exc)
        except Exception:  # noqa: S112  (unset: AttributeError; TypeError in Unicode errors)
            continue
    return get(exc, "args"), attributes, fields


def blank(cls: type[BaseException], *group: Any) -> BaseException:
    """Make an instance without running its ``__init__``; ``group``: message and members of an exception group."""
    base: type = cls
    while base.__module__ != "builtins":
        base = base.__base__ or BaseException
    make: Callable[..., BaseException] = base.__new__
    return make(cls, *group)


def fill(exc: BaseException, state: State) -> None:
    """Give a blank instance what ``take`` took."""
    args, attributes, fields = state
    put(exc, "args", args)
    get(exc, "__dict__").update(attributes)
    for name, descriptor in _descriptors(type(exc)).items():
        # Setting None where C code has nothing changes the text of an OSError.
        if name in fields and not _holds(descriptor, exc, fields[name]):
            descriptor.__set__(exc, fields[name])


def _descriptors(cls: type) -> dict[str, Any]:
    """Find what instances keep outside ``__dict__``."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base in (BaseExceptionGroup, BaseException, object):
            continue
        for name, value in vars(base).items():
            in_c = base.__module__ == "builtins" and isinstance(value, GetSetDescriptorType)
            if in_c or isinstance(value, MemberDescriptorType):
                found.setdefault(name, value)
    if issubclass(cls, AttributeError):
        # Whatever the attribute was missing on: of any type and size, and Python's own pickling drops it, too.
        found.pop("obj", None)
    return found


def _holds(descriptor: Any, exc: BaseException, value: Any) -> bool:
    try:
        return descriptor.__get__(exc) is value
    except Exception:
        # Unset: AttributeError; TypeError in Unicode errors.
        return False
