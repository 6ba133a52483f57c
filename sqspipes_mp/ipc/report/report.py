"""An exception as bytes, and back (packed in a worker or the keeper, rebuilt in the parent).

::

    worker, keeper                                    parent
    ──────────────                                    ──────
    pack_exception ──▶ Report ── to_bytes ─▶ socket ─▶ from_bytes ── Report ──▶ rebuild
      words      the texts                                                  loading
      packing    the chain

``exception_state`` serves both sides. Trust: only bytes from the private socket of an own child.
"""

import json
from dataclasses import dataclass
from functools import partial

from sqspipes_mp.errors import ChildNote, RemoteError
from sqspipes_mp.ipc.report.exception_state import put_notes
from sqspipes_mp.ipc.report.exception_text import MAX_MESSAGE, cut, message_of, traceback_text, type_name
from sqspipes_mp.ipc.report.loading import load
from sqspipes_mp.ipc.report.packing import pack

#: Note of an exception that was raised before its process was ready.
BOOT_NOTE = "before it was ready"


@dataclass(frozen=True, slots=True)
class Report:
    """An exception on its way up."""

    type_name: str
    #: Its ``str()``, cut to MAX_MESSAGE characters.
    message: str
    #: The formatted traceback with causes and notes, cut to about MAX_TEXT characters.
    text: str
    #: The exception for ``rebuild``; None: it cannot travel.
    pickled: bytes | None
    notes: tuple[str, ...] = ()
    #: Stage and process, and the message's id.
    where: str = ""
    #: Whether its process was not ready yet.
    booting: bool = False
    #: Whether it was raised with a message.
    held: bool = False

    def to_bytes(self) -> bytes:
        """Encode for the blob of a frame: one line of JSON, then the pickles."""
        head = [self.type_name, self.message, self.text, self.pickled is not None, self.notes]
        # ASCII: names of files may hold lone surrogates, which UTF-8 refuses.
        line = json.dumps([*head, self.where, self.booting, self.held], separators=(",", ":"))
        return b"%s\n%s" % (line.encode("ascii"), self.pickled or b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> "Report":
        """Decode; bytes that are no report become a report that says so."""
        try:
            line, _, pickled = data.partition(b"\n")
            name, message, text, travels, notes, where, booting, held = json.loads(line)
            own = tuple(map(str, notes))
            body = pickled if travels else None
            return cls(str(name), str(message), str(text), body, own, str(where), bool(booting), bool(held))
        except Exception as error:
            why = f"{len(data)} bytes that are no report ({type(error).__name__}: {error})"
            return cls("unreadable report", why, f"{why}: {data[:200]!r}", None)


def pack_exception(
    exc: BaseException, *, stage: str | None, pid: int, message_id: str | None, booting: bool = False
) -> Report:
    """Describe ``exc`` for the parent; never raises, and leaves ``exc`` as it was.

    ``booting``: the process was not ready yet; ``stage`` None: the keeper.
    """
    where = f"in stage {stage!r}, worker {pid}" if stage is not None else f"in the keeper, process {pid}"
    where += f", message {message_id}" if message_id else ""
    described = partial(Report, where=where, booting=booting, held=bool(message_id))
    # BaseException throughout: code of the user runs here (__str__, __reduce__), and may call sys.exit().
    try:
        name, message, text = type_name(type(exc)), cut(message_of(exc), MAX_MESSAGE), traceback_text(exc)
    except BaseException as error:
        name, message = "exception", f"could not be described ({type(error).__name__})"
        return described(name, message, f"{name}: {message}", None)
    try:
        pickled, notes = pack(exc)
        return described(name, message, text, pickled, tuple(notes))
    except BaseException as error:
        left = f"the exception itself stayed in the worker ({type(error).__name__} while packing it)"
        return described(name, message, text, None, (left,))


def rebuild(report: Report) -> Exception:
    """Return the exception as itself, or ``RemoteError`` with the whole text; never imports a module.

    ``SystemExit``, ``KeyboardInterrupt`` and the like are ``RemoteError`` with the worker's frames: as themselves
    they would end the caller without a word, or pass for its own Ctrl-C.

    Loading runs code of the user's classes. The only exception it lets through is KeyboardInterrupt: a Ctrl-C that
    arrives meanwhile is the caller's, and nothing else (``sys.exit()`` included) may take the parent down.
    """
    error: BaseException | None = None
    try:
        error = None if report.pickled is None else load(report.pickled)
    except KeyboardInterrupt:
        raise
    except BaseException:
        error = None
    own: list[str] = []
    if not isinstance(error, Exception):
        frames = None if error is None else error.__traceback__
        error = RemoteError(report.type_name, report.message, report.text).with_traceback(frames)
        own = error.__notes__
    where = ", ".join([BOOT_NOTE] * report.booting + [report.where] * bool(report.where))
    told = [ChildNote(where, booting=report.booting, held=report.held)] if where else []
    put_notes(error, [*own, *report.notes, *told])
    return error
