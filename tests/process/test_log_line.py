"""The log of fresh children: it arrives where the program's does, bounded, and no child waits for it."""

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp import Task
from sqspipes_mp.ipc import log_line
from tests.gates import TIMEOUT, engine_at

logger = logging.getLogger("users.module")


def tells(value):
    logger.debug("not wanted")
    logger.info("value %d", value, extra={"fact": {"value": value}})
    try:
        raise KeyError(value)
    except KeyError:
        logger.exception("failed")
    return value


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.threads: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.threads.add(threading.current_thread().name)


@contextmanager
def kept(level: int) -> Iterator[Kept]:
    handler, root = Kept(), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_fresh_children_log_arrives_where_the_program_s_does(db: Path, method: str) -> None:
    engine = engine_at(db, [Task(tells, input=True)], start_method=method)
    with kept(logging.INFO) as handler:
        assert list(engine.map([7])) == [7]
    ours = [record for record in handler.records if record.name == "users.module"]
    assert [record.getMessage() for record in ours] == ["value 7", "failed"]
    assert ours[0].__dict__["fact"] == "{'value': 7}"
    assert isinstance(present(ours[1].exc_info)[1], KeyError)
    assert "KeyError: 7" in logging.Formatter().format(ours[1])
    # The supervisor's own, which is a process of its own here.
    assert any(record.getMessage().startswith("stopped (") for record in handler.records)


def present(info: Any) -> Any:
    assert info
    return info


def test_a_slow_handler_holds_no_child_up_and_what_does_not_fit_is_counted() -> None:
    entered, gate = threading.Event(), threading.Event()

    class Slow(Kept):
        def emit(self, record: logging.LogRecord) -> None:
            entered.set()
            assert gate.wait(TIMEOUT)
            super().emit(record)

    slow, target = Slow(), logging.getLogger("slow.program")
    target.addHandler(slow)
    target.propagate = False
    target.setLevel(logging.INFO)
    counted = logging.getLogger("sqspipes_mp.log")
    counted.addHandler(slow)
    reader = log_line.LogReader()
    child = log_line._ToProgram(reader.line.sock)
    try:
        for number in range(2000):
            child.emit(logging.makeLogRecord({"name": "slow.program", "levelno": 20, "msg": f"{number} " + "x" * 500}))
            # The handler holds the thread from the first record on.
            assert entered.wait(TIMEOUT)
        lost = child._lost
        assert 0 < lost < 2000
    finally:
        gate.set()
    clock, sent = threading.Event(), 2000
    while child._lost:
        child.emit(logging.makeLogRecord({"name": "slow.program", "levelno": 40, "msg": "the last"}))
        sent += 1
        clock.wait(0.01)
    reader.close()
    target.removeHandler(slow)
    counted.removeHandler(slow)
    messages = [record.getMessage() for record in slow.records]
    assert messages[0].startswith("0 ")
    assert messages[-1] == "the last"
    lost_told = [int(message.split()[0]) for message in messages if "records of the log" in message]
    assert lost_told
    assert len(messages) - len(lost_told) + sum(lost_told) == sent
    assert reader.line.sock.fileno() == -1


def test_a_child_whose_program_is_gone_goes_on() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    with theirs:
        log_line._ToProgram(theirs).emit(logging.makeLogRecord({"msg": "unheard"}))
