"""The log of fresh children (spawn, forkserver), which have none of the program's handlers (any process).

::

    child                                   program
    ─────                                   ───────
    root logger ── handler ── socket ─▶ a thread ── the logger of the same name, its handlers

A child never waits: a record that does not fit into the socket is counted, and the next one that fits tells of it. The
program's handlers run in the thread, not in the supervisor. Trust: only records from the private socket of own
children.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
from dataclasses import dataclass, replace
from typing import Any

from sqspipes_mp.ipc.report.report import Report, pack_exception, rebuild
from sqspipes_mp.messages.shorten import cut_middle

log = logging.getLogger("sqspipes_mp.log")

#: Most bytes of one record, and most characters of one text in it: the kernel takes 200 KB in all.
_MOST, _TEXT = 60_000, 8_000
#: Ends the thread.
_END = b"\0"
#: Seconds that the end of a run waits for the program's handlers.
_PATIENCE = 5.0
_FLAGS: int = socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0)
#: Whole packets with no limit on their number where the system has such; macOS has not.
_KIND = socket.SOCK_SEQPACKET if hasattr(socket, "MSG_NOSIGNAL") else socket.SOCK_DGRAM
#: Attributes of a record that stay behind: the message is formed, the exception travels as a report.
_LEFT = frozenset({"args", "msg", "message", "exc_info", "exc_text", "stack_info", "asctime"})


@dataclass(frozen=True, slots=True)
class LogLine:
    """The children's end of the line."""

    sock: socket.socket
    #: The level of each of the program's loggers that has one; "" is the root.
    levels: dict[str, int]
    #: The level up to which the program has logging disabled.
    disabled: int


class LogReader:
    """The program's end: a thread that hands records on to the program's loggers."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, _KIND)
        loggers = logging.root.manager.loggerDict.items()
        levels = {name: each.level for name, each in loggers if isinstance(each, logging.Logger) and each.level}
        self.line = LogLine(theirs, {"": logging.root.level, **levels}, logging.root.manager.disable)
        self._thread = threading.Thread(target=self._read, name="sqspipes-log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hand on what has come; wait a few seconds at most for handlers that are slow."""
        poll = select.poll()
        poll.register(self.line.sock, select.POLLOUT)
        if poll.poll(_PATIENCE * 1000):
            with contextlib.suppress(OSError):
                self.line.sock.send(_END, _FLAGS)
        self.line.sock.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(_PATIENCE)

    def _read(self) -> None:
        with self._ours:
            while (data := self._ours.recv(_MOST + 1)) not in (b"", _END):
                # The user's filters and handlers may raise; the next record may pass.
                with contextlib.suppress(Exception):
                    _hand_on(data)


def join(line: LogLine | None) -> None:
    """Have this fresh child log where the program does, unless the user's ``setup`` has given it handlers.

    ``line``: None in a forked child, which has the program's handlers.
    """
    root = logging.root
    if line is None or root.handlers:
        return
    root.addHandler(_ToProgram(line.sock))
    for name, level in line.levels.items():
        logger = logging.getLogger(name)
        if logger is root or logger.level == logging.NOTSET:
            logger.setLevel(level)
    logging.disable(line.disabled)


class _ToProgram(logging.Handler):
    """Sends records, and never waits."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = _packed(record, self._lost)
        except Exception:
            # As of every handler: the arguments do not fit the text, say.
            self.handleError(record)
            return
        try:
            if len(data) <= _MOST:
                self._sock.send(data, _FLAGS)
        except BlockingIOError:
            self._lost += 1
        except OSError:
            # The run is over.
            pass
        else:
            self._lost = 0 if len(data) <= _MOST else self._lost + 1


def _packed(record: logging.LogRecord, lost: int) -> bytes:
    fields = {name: _plain(value) for name, value in vars(record).items() if name not in _LEFT}
    fields["msg"] = _cut(record.getMessage())
    fields["stack_info"] = None if record.stack_info is None else _cut(record.stack_info)
    report = b""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        told = replace(pack_exception(error, stage=None, pid=os.getpid(), message_id=None), where="")
        fields["exc_text"] = _cut(told.text.rstrip("\n"))
        report = told.to_bytes()
    head = json.dumps([lost, fields]).encode("ascii") + b"\n"
    return head + report if len(head) + len(report) <= _MOST else head


def _hand_on(data: bytes) -> None:
    head, _, report = data.partition(b"\n")
    lost, fields = json.loads(head)
    record = logging.makeLogRecord(fields)
    if lost:
        log.warning("%d records of the log of process %s did not fit, and are lost", lost, record.process)
    if report:
        error = rebuild(Report.from_bytes(report))
        record.exc_info = (type(error), error, error.__traceback__)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _cut(value if isinstance(value, str) else repr(value))


def _cut(text: str) -> str:
    return cut_middle(text, _TEXT)
