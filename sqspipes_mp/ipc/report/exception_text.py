"""An exception's type, message, notes and traceback as text, even where its class's code fails (children)."""

import traceback
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from sqspipes_mp.errors import MessageError
from sqspipes_mp.ipc.report.exception_state import get
from sqspipes_mp.messages.plain import one_line
from sqspipes_mp.messages.shorten import cut_middle

#: Characters of the formatted traceback; more is cut from its middle.
MAX_TEXT = 65_536
#: Characters of the message, of one note; notes.
MAX_MESSAGE, MAX_NOTE, MAX_NOTES = 16_384, 4_096, 32
#: Entries of a formatted traceback.
_MAX_ENTRIES = 50
#: Characters of one line in it.
_MAX_LINE = MAX_TEXT // 4
_OWN_FRAMES = "sqspipes_mp."

# BaseException throughout: code of the user runs here (__str__, __repr__, __getattr__), and may call sys.exit().


def type_name(cls: type) -> str:
    """Return the name to show: without its module where that is ``builtins``."""
    module, name = cls.__module__, cls.__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def message_of(exc: BaseException) -> str:
    """Return ``str(exc)``, a plain ``str`` whatever ``__str__`` returns, or the name of the exception it raised."""
    try:
        return str.__str__(str(exc))
    except BaseException as error:
        return f"<str() raised {type(error).__name__}>"


def line_of(exc: BaseException, most: int = 200) -> str:
    """Return the beginning of ``str(exc)`` for a log line; it may quote a message."""
    return one_line(message_of(exc), most)


def notes_of(exc: BaseException) -> list[str]:
    """Return the notes, at most MAX_NOTES of MAX_NOTE characters; a note that is no string as its repr."""
    notes = get(exc, "__dict__").get("__notes__", ())
    entries = notes if isinstance(notes, (list, tuple)) else [notes]
    return [cut(_note(note), MAX_NOTE) for note in entries[:MAX_NOTES]]


def _note(value: Any) -> str:
    try:
        return str.__str__(value if isinstance(value, str) else repr(value))
    except BaseException as error:
        return f"<repr() raised {type(error).__name__}>"


def traceback_text(exc: BaseException) -> str:
    """Format as the interpreter does, causes and notes included, in at most about MAX_TEXT characters."""
    tb, lost = _both_ends(frames_of(exc))
    start = [f"({lost} frames in the middle of the last traceback are not shown)\n"] if lost else []
    try:
        lines = traceback.TracebackException(type(exc), exc, tb, limit=-_MAX_ENTRIES, compact=True).format()
        return _join([*start, *(cut(line, _MAX_LINE) for line in lines)])
    except BaseException:
        # Odd attributes (a __getattr__ that raises, a SyntaxError without numbers) stop the standard formatter.
        plain = [f'  File "{f.f_code.co_filename}", line {n}, in {f.f_code.co_name}\n' for f, n in walk(tb)]
        return _join([*start, *plain, f"{type_name(type(exc))}: {cut(message_of(exc), MAX_MESSAGE)}\n"])


def _join(chunks: list[str]) -> str:
    """Join about MAX_TEXT characters, both ends kept in whole lines."""
    text, half = "".join(chunks), MAX_TEXT // 2
    if len(text) <= MAX_TEXT:
        return text
    head, tail = text[:half].rpartition("\n")[0], text[-half:].partition("\n")[2]
    return f"{head}\n\n... {len(text) - len(head) - len(tail)} characters left out ...\n\n{tail}"


def frames_of(exc: BaseException) -> TracebackType | None:
    """Return the traceback without the engine's own frames at its beginning, whole where there are no others.

    None for an engine's error about a function's output: its text names the function, which has returned.
    """
    tb: TracebackType | None = get(exc, "__traceback__")
    inner = tb
    while inner is not None and str(inner.tb_frame.f_globals.get("__name__")).startswith(_OWN_FRAMES):
        inner = inner.tb_next
    if inner is None and not issubclass(type(exc), MessageError):
        return tb
    return inner


def walk(tb: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """Yield frames and lines, outermost first."""
    while tb is not None:
        yield tb.tb_frame, _line(tb)
        tb = tb.tb_next


def _line(tb: TracebackType) -> int:
    # None for instructions that belong to no line.
    return tb.tb_lineno or tb.tb_frame.f_code.co_firstlineno


def _both_ends(tb: TracebackType | None) -> tuple[TracebackType | None, int]:
    """Leave out the middle: both ends of a recursion matter, and formatting 1,000 frames is slow."""
    entries, inner = [], tb
    while inner is not None:
        entries.append(inner)
        inner = inner.tb_next
    lost, half = len(entries) - _MAX_ENTRIES, _MAX_ENTRIES // 2
    if lost <= 0:
        return tb, 0
    for entry in reversed(entries[:half] + entries[-half:]):
        inner = TracebackType(inner, entry.tb_frame, entry.tb_lasti, _line(entry))
    return inner, lost


def cut(text: str, limit: int) -> str:
    """Shorten a text to ``limit`` characters, both ends kept."""
    if len(text) <= limit:
        return text
    return cut_middle(text, 2 * (limit // 2 - 40), " ... (cut: {whole} characters in all) ... ")
