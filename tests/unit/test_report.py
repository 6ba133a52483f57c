"""report.py: what it promises whatever the exception, and what a user sees of one that was rebuilt."""

import copyreg
import dataclasses
import importlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import traceback
import types
from pathlib import Path
from typing import Any

import pytest

from sqspipes_mp.errors import ChildNote, RemoteError
from sqspipes_mp.ipc.report.report import Report, rebuild
from tests.unit.report_cases import (
    BreaksHere,
    CountsInits,
    InterruptedHere,
    KeywordOnly,
    Plain,
    catch,
    chain,
    forked,
    inline,
    pack,
    thrower,
)


def importing():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))}


# --- what is seen of it ---


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
    back = rebuild(pack(Plain("x"), message_id=None, booting=True))
    assert back.__notes__ == ["before it was ready, in stage 'resize', worker 4711"]
    note = back.__notes__[-1]
    assert isinstance(note, ChildNote)
    assert (note.booting, note.held) == (True, False)
    # Whoever pickles the error loses nothing of it.
    again = pickle.loads(pickle.dumps(note))
    assert (again, again.booting, again.held) == (note, True, False)


def test_the_original_is_left_as_it_was():
    exc = catch(thrower(Plain("x")))
    before = (exc.__traceback__, dict(exc.__dict__))
    pack(exc)
    assert (exc.__traceback__, exc.__dict__) == before


def test_engine_frames_are_hidden_only_around_the_user():
    scope: dict[str, Any] = {"__name__": "sqspipes_mp.worker.run.runner"}
    exec("def engine(fn):\n    fn()\ndef own():\n    raise ValueError('ours')", scope)  # noqa: S102  (functions of another module)

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


def test_uncaught_it_is_printed_as_any_other_without_blank_lines(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent("""
        from sqspipes_mp.ipc.report.report import pack_exception, rebuild

        def inner(n):
            return 1 / (n - n)

        def outer(n):
            return [inner(n)]

        try:
            outer(3)
        except ZeroDivisionError as error:
            report = pack_exception(error, stage="s", pid=1, message_id="m")
        raise rebuild(report)
        """)
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=importing(), check=False)
    lines = [line for line in done.stderr.splitlines() if ("File" not in line and line.strip(" ^~") != "") or not line]
    assert lines == [
        "Traceback (most recent call last):",
        "    raise rebuild(report)",
        "    outer(3)",
        "    return [inner(n)]",
        "    return 1 / (n - n)",
        "ZeroDivisionError: division by zero",
        "in stage 's', worker 1, message m",
    ]


def test_debuggers_find_the_line_of_every_frame():
    def deep():
        raise Plain("here")

    (frame, line), *_ = reversed(list(traceback.walk_tb(rebuild(forked(deep)).__traceback__)))
    assert line == frame.f_lineno == deep.__code__.co_firstlineno + 1
    assert frame.f_globals["__file__"] == __file__


# --- what must not happen here ---


def test_no_init_runs_while_rebuilding():
    report = inline(thrower(CountsInits("x")))
    before = CountsInits.inits
    assert type(rebuild(report)) is CountsInits
    assert CountsInits.inits == before


def test_loading_that_exits_only_here_is_remote_error():
    report = forked(lambda: thrower(BreaksHere(os.getpid()))())  # noqa: PLW0108  (the fork's pid)
    assert report.pickled is not None
    assert type(rebuild(report)) is RemoteError


def test_loading_a_cause_that_exits_only_here_only_loses_the_cause():
    def both():
        raise Plain("root") from BreaksHere(os.getpid())

    back = rebuild(forked(both))
    assert type(back) is Plain
    assert type(back.__cause__) is RemoteError


@pytest.fixture
def ctrl_c():
    # Ignored where the tests run in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_loading_is_not_swallowed(ctrl_c):
    report = forked(lambda: thrower(InterruptedHere(os.getpid()))())  # noqa: PLW0108  (the fork's pid)
    with pytest.raises(KeyboardInterrupt):
        rebuild(report)


def test_ctrl_c_while_loading_a_cause_is_not_swallowed(ctrl_c):
    def both():
        raise Plain("root") from InterruptedHere(os.getpid())

    report = forked(both)
    with pytest.raises(KeyboardInterrupt):
        rebuild(report)


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
    assert type(back) is RemoteError
    assert back.type_name == "only_in_worker.Far"
    assert back.message == "away"
    assert "only_in_worker" not in sys.modules


def test_lazy_module_is_not_made_to_load(monkeypatch):
    asked = []
    module = types.ModuleType("lazy_here")
    module.__getattr__ = lambda name: asked.append(name) or ValueError  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_here", module)

    def far():
        kind = type("Far", (Exception,), {"__module__": "lazy_here"})
        module.Far = kind  # type: ignore[attr-defined]
        raise kind("away")

    report = forked(far)
    asked.clear()
    assert type(rebuild(report)) is RemoteError
    assert not asked


def test_unknown_module_in_a_cause_only_loses_the_cause(tmp_path):
    (tmp_path / "far_cause.py").write_text("class Far(Exception): pass\n")

    def far():
        sys.path.insert(0, str(tmp_path))
        try:
            raise importlib.import_module("far_cause").Far("away")
        except Exception as exc:
            raise Plain("near") from exc

    back = rebuild(forked(far))
    assert type(back) is Plain
    assert back.__cause__.type_name == "far_cause.Far"
    assert "far_cause" not in sys.modules


def test_nothing_is_registered_in_this_process():
    before = dict(copyreg.dispatch_table)
    rebuild(inline(chain(3, explicit=True)))
    assert copyreg.dispatch_table == before


def test_works_where_the_user_has_installed_tblib():
    pytest.importorskip("tblib")
    script = """
        import tblib.pickling_support; tblib.pickling_support.install()
        from sqspipes_mp.ipc.report.report import pack_exception, rebuild
        try: b"\\xff".decode()
        except UnicodeDecodeError as e:
            back = rebuild(pack_exception(e, stage="s", pid=1, message_id=None))
            assert type(back) is UnicodeDecodeError and str(back) == str(e), back
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


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
    assert report.type_name == "unreadable report"
    assert type(rebuild(report)) is RemoteError


@pytest.mark.parametrize("pickled", [b"", b"\x00\x00\x00\x02{}", b"garbage" * 9, pickle.dumps(ValueError("x"))])
def test_garbage_pickle_is_remote_error(pickled):
    back = rebuild(Report("a.B", "m", "t", pickled, ("n",)))
    assert type(back) is RemoteError
    assert back.__notes__ == ["In the worker:\nt", "n"]


@pytest.mark.parametrize("cut", range(0, 400, 37))
def test_damaged_pickle_never_raises(cut):
    report = inline(thrower(KeywordOnly(code=3)))
    damaged = report.pickled[:cut] + b"\xff" + report.pickled[cut + 1 :]
    assert isinstance(rebuild(dataclasses.replace(report, pickled=damaged)), BaseException)
    assert isinstance(rebuild(dataclasses.replace(report, pickled=report.pickled[:cut])), BaseException)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_classes_of_main_come_back_in_every_start_method(method, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        from sqspipes_mp.ipc.report.report import Report, pack_exception, rebuild

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
    subprocess.run([sys.executable, str(script), method], check=True, timeout=60, env=importing())
