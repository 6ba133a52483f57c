"""``top``, live: what a person sees of another program's engine, and does to it.

Textual's pilot does what a person would; a few tests have a real pseudo-terminal.
"""

import asyncio
import fcntl
import html
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gates import ROOT, Gate, Log, eventually

pytest.importorskip("textual", reason="the extra 'top' is not installed")

from sqspipes_mp.cli.top import app as live
from sqspipes_mp.cli.top.app import Top
from sqspipes_mp.cli.top.watch import watch_of
from sqspipes_mp.ipc.running.folders import engines

if TYPE_CHECKING:
    from textual.pilot import Pilot

#: Guards against a deadlock only, seconds.
PATIENCE = 90

PIPE = """
import sys
from sqspipes_mp import Engine, SQLite, Task, current_message
from tests.gates import Gate, Log
gate, log = Gate(sys.argv[-2]), Log(sys.argv[-1])

def work(value):
    current_message().progress(0.25, "\\x1b[31m[bold]quarter of \\u202e" + value)
    log.note(value)
    gate.wait()

engine = Engine([Task(work, input=True, workers=2)], domain="shop", broker=SQLite("w.db"))

if __name__ == "__main__":
    engine.put_many(sys.argv[1].split(","))
    engine.run()
"""


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(tmp_path / "registry"))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(live, "_REFRESH", 0.1)


@contextmanager
def running(folder: Path, gate: Gate, log: Log, values: str) -> Iterator["subprocess.Popen[bytes]"]:
    (folder / "words.py").write_text(PIPE)
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "words.py", values, gate.path, log.path],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stderr=subprocess.DEVNULL,
            )
        )
        stack.callback(process.kill)
        log.wait_for(values.count(",") + 1)
        yield process


def screen(pilot: "Pilot[None]") -> str:
    """Return the text that is shown, without its line ends."""
    drawn = pilot.app.export_screenshot().partition("</defs>")[2]
    return html.unescape(re.sub(r"<[^>]*>", "", drawn)).replace("\xa0", " ")


async def shows(pilot: "Pilot[None]", *texts: str) -> None:
    until = time.monotonic() + PATIENCE
    while any(text not in screen(pilot) for text in texts):
        assert time.monotonic() < until, f"{texts} is not on the screen: {screen(pilot)}"
        await asyncio.sleep(0.1)


async def press(pilot: "Pilot[None]", key: str, screens: int) -> None:
    """Press a key that opens or closes a screen, and wait until so many are open: the next key is for the new one."""
    await pilot.press(key)
    until = time.monotonic() + PATIENCE
    while len(pilot.app.screen_stack) != screens:
        assert time.monotonic() < until, f"{key} left {pilot.app.screen_stack} open"
        await asyncio.sleep(0.02)


def piloted(
    does: Callable[["Pilot[None]"], Coroutine[Any, Any, None]],
    width: int = 80,
    height: int = 30,
    target: str | None = None,
) -> None:
    """Run ``top`` without a terminal, and do something with it."""
    watch = watch_of(target)

    async def run() -> None:
        async with Top(watch).run_test(size=(width, height)) as pilot:
            await does(pilot)

    asyncio.run(run())
    watch.close()


def test_a_person_sees_the_engine_and_gives_orders(tmp_path: Path, gate: Gate, log: Log) -> None:
    async def does(pilot: "Pilot[None]") -> None:
        await shows(pilot, "shop on SQLite", "every stage is ready", "2/2", "25%", "work[1]")
        # Texts of a message are text, neither markup nor a terminal's orders.
        await pilot.resize_terminal(140, 30)
        await shows(pilot, r"\x1b[31m[bold]quarter of \u202e")
        await pilot.press("p")
        await shows(pilot, "work is paused; calls that run still: 2 (this engine", "but work is paused")
        await shows(pilot, "work is paused: p has it go on", "p resume")
        await pilot.press("p")
        await shows(pilot, "work goes on", "p pause")
        # Presses add up, however old the number on the screen is.
        await pilot.press("plus", "plus", "plus")
        await shows(pilot, "work: 5 workers", "5/5")
        await pilot.press("minus", "minus", "minus")
        await shows(pilot, "work: 2 workers", "2/2")
        await pilot.press("s")
        await shows(pilot, "gate.wait()", "work[0] (pid ", "threads of the library: ")
        await press(pilot, "q", 1)
        await press(pilot, "question_mark", 2)
        await shows(pilot, "share of the workers", "arrows scroll, q closes")
        await press(pilot, "escape", 1)
        await pilot.press("down")
        # Nothing but y is a yes.
        await shows(pilot, "chosen: work[1]")
        await press(pilot, "c", 2)
        await shows(pilot, "Cancel the call of work[1], which runs for", "y kill the worker", "n keep it running")
        await press(pilot, "enter", 1)
        await pilot.press("up")
        await press(pilot, "c", 2)
        await shows(pilot, "Cancel the call of work[0]")
        await press(pilot, "y", 1)
        await shows(pilot, "is cancelled, its message is a dead letter", "1 call cancelled; 1 dead letter: cd ")
        await pilot.press("up")
        await press(pilot, "S", 2)
        await shows(pilot, "Stop shop (pid ")
        await press(pilot, "n", 1)
        assert process.poll() is None
        await press(pilot, "S", 2)
        await press(pilot, "y", 1)
        await shows(pilot, "it is stopping: running calls end first")
        gate.open()
        await shows(pilot, "HAS ENDED", "waiting for a run of shop", "ended")

    with running(tmp_path, gate, log, "one,two") as process:
        piloted(does)
        assert process.wait(PATIENCE) == 0


def test_an_engine_behind_an_address_is_shown_takes_orders_and_may_be_away(
    tmp_path: Path, gate: Gate, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sees(pilot: "Pilot[None]") -> None:
        await shows(pilot, "shop on SQLite", "pid -, up", "every stage is ready", "numbers only", "25%")
        await pilot.press("p")
        await shows(pilot, "set SQSPIPES_HTTP_TOKEN")

    async def steers(pilot: "Pilot[None]") -> None:
        await shows(pilot, f"pid {process.pid}, up")
        await pilot.press("p")
        await shows(pilot, "work is paused; calls that run still: 1 (this engine", "work is paused: p has it go on")
        await press(pilot, "S", 2)
        await shows(pilot, f"Stop {address}?")
        await press(pilot, "y", 1)
        gate.open()
        # Whether the engine has ended, or the way to it has, nobody knows.
        await shows(pilot, f"no answer from {address}: ")

    monkeypatch.setenv("SQSPIPES_HTTP", "127.0.0.1:0")
    monkeypatch.setenv("SQSPIPES_HTTP_TOKEN", "a token")
    with running(tmp_path, gate, log, "one") as process:
        monkeypatch.delenv("SQSPIPES_HTTP_TOKEN")
        eventually(lambda: [engine for engine in engines() if engine.text("http")], "it serves")
        address = f"http://{engines()[0].text('http')}"
        monkeypatch.setenv("SQSPIPES_RUN_DIR", "off")
        piloted(sees, target=address)
        monkeypatch.setenv("SQSPIPES_HTTP_TOKEN", "a token")
        piloted(steers, target=address)
        assert process.wait(PATIENCE) == 0


def test_the_advice_names_the_stage_that_its_key_is_for_and_outcomes_go_away(
    tmp_path: Path, gate: Gate, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def does(pilot: "Pilot[None]") -> None:
        await shows(pilot, "chosen: work[0]", "its stage work")
        await pilot.press("tab")
        await shows(pilot, "chosen: work")
        await pilot.press("tab", "p")
        await shows(pilot, "work is paused; calls that run still", "work is paused: p has it go on")
        monkeypatch.setattr(live, "_TOLD_FOR", 0.0)
        until = time.monotonic() + PATIENCE
        while "calls that run still" in screen(pilot):
            assert time.monotonic() < until
            await asyncio.sleep(0.05)
        # A stage that is not chosen is to be chosen first.
        top = pilot.app
        assert isinstance(top, Top)
        note = {**top._seen.state["notes"][0], "stage": "other"} if top._seen.state is not None else {}
        assert not top._is_chosen(note)
        assert top._is_chosen({**note, "stage": "work"})

    with running(tmp_path, gate, log, "one,two"):
        piloted(does, 60, 24)


def test_a_run_begins_while_somebody_watches_ends_and_the_next_one_is_shown(
    tmp_path: Path, gate: Gate, log: Log
) -> None:
    async def does(pilot: "Pilot[None]") -> None:
        await shows(pilot, "waiting for an engine to begin here")
        await pilot.press("s", "p", "plus", "c", "S", "down", "up", "up")
        await shows(pilot, "no engine runs")
        for values in ("one,two", "three,four"):
            with running(tmp_path, gate, log, values) as process:
                await shows(pilot, f"pid {process.pid}, up", "25%")
                process.kill()
                await shows(pilot, f"pid {process.pid} HAS ENDED", "waiting for a run of shop")
            os.truncate(log.path, 0)
        await pilot.press("q")

    piloted(does, 60, 24)


def test_a_supervisor_that_stands_still_is_shown_and_does_not_stop_the_screen(
    tmp_path: Path, gate: Gate, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqspipes_mp.ipc.running.asking.PATIENCE", 0.2)

    async def does(pilot: "Pilot[None]") -> None:
        await shows(pilot, "work[1]")
        process.send_signal(signal.SIGSTOP)
        await pilot.press("p")
        await press(pilot, "question_mark", 2)
        await shows(pilot, "share of the workers")

    with running(tmp_path, gate, log, "one,two") as process:
        try:
            piloted(does)
        finally:
            process.send_signal(signal.SIGCONT)


# -- a real pseudo-terminal -------------------------------------------------------------------------------------------


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, code: str, columns: int = 80, lines: int = 24) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.out = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
        )  # fmt: skip

    def read_until(self, text: bytes) -> None:
        until = time.monotonic() + PATIENCE
        while text not in self.out:
            assert time.monotonic() < until, self.out
            if select.select([self.master], [], [], 0.1)[0]:
                self.out += os.read(self.master, 1 << 16)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """Return the exit code, once the program has ended and left the terminal as it was."""
        until = time.monotonic() + PATIENCE
        while (code := self.process.poll()) is None:
            assert time.monotonic() < until, self.out
            if select.select([self.master], [], [], 0.05)[0]:
                self.out += os.read(self.master, 1 << 16)
        assert termios.tcgetattr(self.slave) == self.before
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


TOP = "import sys; from sqspipes_mp.cli.main import main; sys.exit(main(['top', *sys.argv[1:]]))"


@contextmanager
def terminal(code: str) -> Iterator[Terminal]:
    made = Terminal(code)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("leave", ["q", "ctrl-c", "SIGTERM"])
def test_a_real_terminal_is_left_as_it_was(leave: str, tmp_path: Path, gate: Gate, log: Log) -> None:
    with ExitStack() as stack:
        if leave == "q":
            stack.enter_context(running(tmp_path, gate, log, "one,two"))
        top = stack.enter_context(terminal(TOP))
        top.read_until(b"work[1]" if leave == "q" else b"waiting for")
        if leave == "SIGTERM":
            top.process.send_signal(signal.SIGTERM)
        else:
            top.type(b"q" if leave == "q" else b"\x03")
        assert top.end() == 0
        top.read_until(b"\x1b[?1049l")
        assert b"Traceback" not in top.out


def test_without_textual_it_is_plain_text_that_is_drawn_again(tmp_path: Path, gate: Gate, log: Log) -> None:
    with (
        running(tmp_path, gate, log, "one,two") as process,
        terminal(f"import sys; sys.modules['textual'] = None; {TOP}") as top,
    ):
        top.read_until(b"pip install 'sqspipes_mp[top]'")
        top.out = top.out[-20:]
        top.read_until(b"\x1b[H\x1b[J")
        gate.open()
        process.send_signal(signal.SIGTERM)
        top.read_until(b"the engine has ended")
        assert top.end() == 0
